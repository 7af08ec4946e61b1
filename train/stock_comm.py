"""How long stock DeepSpeed spends moving tokens: a timer around `_AllToAll`, put in and taken out again.

`MOELayer.forward` calls `_AllToAll` twice, first with tokens for the experts, then with their outputs; the backward
pass calls it in the opposite direction. What is timed is the all-to-all alone: building the padded buffer before it and
the weighted sum after it are not counted, nor is the wait for a rank that is late told apart from the transfer.
"""

from __future__ import annotations

import time

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.moe import sharded_moe
from torch import Tensor


class StockCommTimer:
    """Context manager: inside, MoE all-to-alls of this process are timed, forward and backward.

    On a GPU each timed call waits for the device before and after, so that its own time is seen: use it to
    compare communication, and leave it out to measure throughput alone.
    """

    def __init__(self) -> None:
        self._original: type | None = None
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
        stats = {"dispatch_ms": self._dispatch_ms, "combine_ms": self._combine_ms, "num_calls": self._num_calls}
        if reset:
            self._reset()
        return stats

    def _reset(self) -> None:
        self._dispatch_ms = 0.0
        self._combine_ms = 0.0
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
        synchronize = get_accelerator().synchronize if x.device.type != "cpu" else lambda: None
        synchronize()
        start = time.perf_counter()
        with torch.no_grad():
            y = original.apply(group, x)
        synchronize()
        elapsed_ms = (time.perf_counter() - start) * 1e3
        if towards_experts:
            self._dispatch_ms += elapsed_ms
        else:
            self._combine_ms += elapsed_ms
        self._num_calls += 1
        return y
