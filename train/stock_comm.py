"""How long stock DeepSpeed spends moving tokens: a timer around `_AllToAll`, put in and taken out again.

`MOELayer.forward` calls `_AllToAll` twice, first with tokens for the experts, then with their outputs; the backward
pass calls it in the opposite direction. What is timed is the all-to-all alone: building the padded buffer before it and
the weighted sum after it are not counted, nor is the wait for a rank that is late told apart from the transfer.
"""

from __future__ import annotations

import torch
from deepspeed.moe import sharded_moe
from torch import Tensor

from train.clock import Spans


class StockCommTimer:
    """Context manager: inside, MoE all-to-alls of this process are timed, forward and backward.

    On a GPU between two events in the stream, so that a step takes no longer for it.
    """

    def __init__(self) -> None:
        self._original: type | None = None
        self._spans = Spans()
        self._reset()

    def __enter__(self) -> StockCommTimer:
        if self._original is not None:
            raise RuntimeError("StockCommTimer is already active")
        self._original = sharded_moe._AllToAll
        self._next_is_dispatch = True
        sharded_moe._AllToAll = self._timed_class(self._original)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Put DeepSpeed's own class back. Safe to call twice."""
        if self._original is not None:
            sharded_moe._AllToAll = self._original
            self._original = None

    def comm_stats(self, reset: bool = True) -> dict[str, float]:
        """Milliseconds to the experts (`dispatch_ms`) and back (`combine_ms`), and `num_calls`, since the reset."""
        for name, calls_ms in self._spans.take().items():
            self._ms[name] += sum(calls_ms)
            self._num_calls += len(calls_ms)
        stats = {f"{name}_ms": ms for name, ms in self._ms.items()} | {"num_calls": self._num_calls}
        if reset:
            self._reset()
        return stats

    def _reset(self) -> None:
        self._ms = {"dispatch": 0.0, "combine": 0.0}
        self._num_calls = 0

    def _timed_class(self, original: type) -> type:
        timer = self

        class TimedAllToAll(torch.autograd.Function):
            """DeepSpeed's `_AllToAll` with a clock around it; same arguments, same result."""

            @staticmethod
            def forward(ctx, group, x: Tensor) -> Tensor:
                ctx.group = group
                ctx.is_dispatch = timer._next_is_dispatch
                timer._next_is_dispatch = not timer._next_is_dispatch
                return timer._run(original, group, x, towards_experts=ctx.is_dispatch)

            @staticmethod
            def backward(ctx, grad: Tensor) -> tuple[None, Tensor]:
                return None, timer._run(original, ctx.group, grad, towards_experts=not ctx.is_dispatch)

        return TimedAllToAll

    def _run(self, original: type, group: object, x: Tensor, *, towards_experts: bool) -> Tensor:
        with self._spans.during("dispatch" if towards_experts else "combine"), torch.no_grad():
            return original.apply(group, x)
