"""Where the time of a DeepSpeed MoE layer goes, the same way for any backend: by hooks on its modules and tensors.

Hooks stand at the layer, its gate and its experts, which every backend keeps. *Communication* is what lies between:

- forward: from the gate's end to the experts' start, and from the experts' end to the layer's end;
- backward: from the layer's output gradient to the experts' output gradient, and from the experts' input gradient to
  the gradient of the gate's weights (autograd runs the gate's own backward last, it was recorded first).

So it holds all of stock's ``_route_slots``, ``_sparse_encode``, both ``_AllToAll`` and ``_sparse_decode``, and all that
the swapped layer does instead. An expert container's split and concatenation count as the experts' work, unless a
backend calls the experts itself: then they count as communication.

A rank that computes longer makes the others wait. With ``aligned``, ranks meet at a barrier before each of the four
spans begins, outside the clock, so that communication is what moving the rows takes; without, it holds the waiting too.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch.distributed as dist
from deepspeed.moe.sharded_moe import MOELayer
from torch import Tensor

_GATE_WEIGHTS = 5  # position in what a gate returns


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Mark:
    wall: float
    cpu: float


class LayerClock:
    """Clocks each forward and backward of ``layer``; ``parts()`` tells of the last one.

    ``each_expert`` says that the layer's backend calls the experts itself.
    """

    def __init__(self, layer: MOELayer, *, each_expert: bool) -> None:
        self.aligned = False
        """Whether ranks meet before each span of communication; the same on every rank."""
        self._marks: dict[str, _Mark] = {}
        layer.register_forward_pre_hook(lambda *_: self._start())
        layer.gate.register_forward_hook(self._gate_ended)
        # A hook on the container makes a swapped layer call it.
        container = () if each_expert else (layer.experts,)
        for module in (*container, *layer.experts.deepspeed_experts):
            module.register_forward_pre_hook(self._experts_begin)
            module.register_forward_hook(self._experts_end)
        layer.register_forward_hook(self._layer_ended)

    def end_backward(self) -> None:
        """Call when the backward has returned."""
        self._mark("backward_end")

    def parts(self) -> dict[str, float]:
        """Wall ms of each part on this rank, and ``*_cpu``: processor time of this process in them."""
        spans = {
            "gate": (("start", "gate_end"), ("gate_grad", "backward_end")),
            "experts": (("experts_begin", "experts_end"), ("experts_out_grad", "experts_in_grad")),
            "dispatch_forward": (("gate_end", "experts_begin"),),
            "combine_forward": (("experts_end", "forward_end"),),
            "combine_backward": (("out_grad", "experts_out_grad"),),
            "dispatch_backward": (("experts_in_grad", "gate_grad"),),
        }
        parts: dict[str, float] = {}
        for name, pairs in spans.items():
            parts[name] = sum(self._marks[end].wall - self._marks[begin].wall for begin, end in pairs) * 1e3
            parts[f"{name}_cpu"] = sum(self._marks[end].cpu - self._marks[begin].cpu for begin, end in pairs) * 1e3
        communication = ("dispatch_forward", "combine_forward", "combine_backward", "dispatch_backward")
        parts["communication"] = sum(parts[name] for name in communication)
        parts["communication_cpu"] = sum(parts[f"{name}_cpu"] for name in communication)
        return parts

    def _mark(self, name: str) -> None:
        self._marks[name] = _Mark(wall=time.perf_counter(), cpu=time.process_time())

    def _mark_exchange(self, name: str) -> None:
        """Communication begins here."""
        if self.aligned:
            dist.barrier()
        self._mark(name)

    def _mark_first(self, name: str) -> None:
        if name not in self._marks:
            self._mark(name)

    def _start(self) -> None:
        self._marks.clear()
        self._mark("start")

    def _gate_ended(self, module: object, inputs: object, output: tuple[Any, ...]) -> None:
        output[_GATE_WEIGHTS].register_hook(lambda grad: self._mark("gate_grad"))
        self._mark_exchange("gate_end")

    def _experts_begin(self, module: object, inputs: tuple[Tensor, ...]) -> None:
        # The container begins before its first expert and its gradient comes after the last, so both ends are right
        # whether a backend calls the container or the experts one by one.
        inputs[0].register_hook(lambda grad: self._mark_exchange("experts_in_grad"))
        self._mark_first("experts_begin")

    def _experts_end(self, module: object, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        output.register_hook(lambda grad: self._mark_first("experts_out_grad"))
        self._mark_exchange("experts_end")

    def _layer_ended(self, module: object, inputs: object, output: Tensor) -> None:
        output.register_hook(lambda grad: self._mark_exchange("out_grad"))
        self._mark("forward_end")
