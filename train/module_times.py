"""Where the time inside a model goes: attention, gates and MoE layers, forward and backward passes together."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from deepspeed.moe.layer import MoE
from torch import nn

from train.clock import Spans
from train.model import Attention


@dataclass(frozen=True, kw_only=True)
class PartTimes:
    """Milliseconds of one step of this rank, forward and backward passes."""

    attention_ms: float
    gate_ms: float
    moe_ms: float
    """MoE layers, their gates, dispatch and combine included."""


class ModuleTimes:
    """Times parts of a model by hooks, which read the clock (on GPUs: record an event) where a part begins and ends.

    A block that is computed again in the backward pass counts both times. Experts have no hooks of their own: whoever
    runs them another way, all at once or without their container, shall do so here too.
    """

    def __init__(self, model: nn.Module) -> None:
        self._spans = Spans()
        self._begun: dict[tuple[nn.Module, str], Any] = {}
        for module in model.modules():
            if isinstance(module, Attention):
                self._watch(module, "attention")
            elif isinstance(module, MoE):
                self._watch(module.deepspeed_moe, "moe")
                self._watch(module.deepspeed_moe.gate, "gate")

    def take(self) -> PartTimes:
        """Of all passes since the last call; waits for a GPU."""
        total = {name: sum(passes_ms) for name, passes_ms in self._spans.take().items()}
        self._begun.clear()
        return PartTimes(**{f"{name}_ms": total.get(name, 0.0) for name in ("attention", "gate", "moe")})

    def split(self, comm_ms: float) -> dict[str, float]:
        """Fields of a step's metrics. comm_ms: what dispatch and combine took of the MoE layers."""
        parts = self.take()
        experts_ms = max(0.0, parts.moe_ms - parts.gate_ms - comm_ms)
        return {"attention_ms": parts.attention_ms, "gate_ms": parts.gate_ms, "experts_ms": experts_ms}

    def _watch(self, module: nn.Module, name: str) -> None:
        forward, backward = (module, "forward"), (module, "backward")
        module.register_forward_pre_hook(partial(self._begin, forward))
        module.register_forward_hook(partial(self._end, forward, name))
        module.register_full_backward_pre_hook(partial(self._begin, backward))
        module.register_full_backward_hook(partial(self._end, backward, name))

    def _begin(self, key: tuple[nn.Module, str], *_: object) -> None:
        self._begun[key] = self._spans.begin()

    def _end(self, key: tuple[nn.Module, str], name: str, *_: object) -> None:
        begin = self._begun.pop(key, None)
        if begin is not None:
            self._spans.end(name, begin)
