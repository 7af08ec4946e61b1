"""A buffer of transport ``cuda`` for cases that make and compare tensors on the CPU."""

from __future__ import annotations

import dataclasses

import torch

from ray_deepep import (
    Buffer,
    CombineResult,
    DispatchHandle,
    DispatchResult,
    LowLatencyCombineResult,
    LowLatencyDispatchResult,
)
from ray_deepep.low_latency import LayoutRanges


def _moved(value: object, device: str) -> object:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def poison() -> None:
    """Freed blocks come back full of this: what a kernel does not write is seen."""
    block = torch.full((1 << 22,), float("nan"), device="cuda")
    del block


class Received:
    """A low-latency result whose tensors come to the CPU when they are looked at."""

    def __init__(self, buffer: Buffer, result: LowLatencyDispatchResult | LowLatencyCombineResult) -> None:
        self._buffer, self._result = buffer, result

    def hook(self) -> None:
        """Receive, and raise what the kernel has reported."""
        self._result.hook()
        torch.cuda.synchronize()
        self._buffer.check()

    def __getattr__(self, name: str) -> object:
        value = getattr(self._result, name)
        if isinstance(value, LayoutRanges):
            return LayoutRanges(begin=value.begin.cpu(), count=value.count.cpu())
        return _moved(value, "cpu")


class OnDevice:
    """Passes calls on with all tensors on the GPU, and brings results back."""

    def __init__(self, buffer: Buffer) -> None:
        self.buffer = buffer
        self.geometry = buffer.geometry
        self.comm = buffer.comm

    def dispatch(self, *args: object, **kwargs: object) -> DispatchResult:
        return self._call(self.buffer.dispatch, *args, **kwargs)

    def combine(self, *args: object, **kwargs: object) -> CombineResult:
        return self._call(self.buffer.combine, *args, **kwargs)

    def combine_weights(self, topk_weights: torch.Tensor, handle: DispatchHandle) -> torch.Tensor:
        home = self.buffer.combine_weights(topk_weights.cuda(), handle)
        torch.cuda.synchronize()
        return home.cpu()

    def low_latency_dispatch(self, *args: object, **kwargs: object) -> Received:
        return self._low_latency(self.buffer.low_latency_dispatch, *args, **kwargs)

    def low_latency_combine(self, *args: object, **kwargs: object) -> Received:
        return self._low_latency(self.buffer.low_latency_combine, *args, **kwargs)

    def __getattr__(self, name: str) -> object:
        return getattr(self.buffer, name)

    def __enter__(self) -> OnDevice:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.buffer.close()

    def _low_latency(self, operation, *args: object, **kwargs: object) -> Received:
        poison()
        moved = {k: _moved(v, "cuda") for k, v in kwargs.items()}
        result = operation(*(_moved(a, "cuda") for a in args), **moved)
        if kwargs.get("return_recv_hook"):
            # Of what was sent, nothing need be there any more, but for rows that are read in place.
            for tensor in (*args[1 if kwargs.get("zero_copy") else 0 :], *moved.values()):
                if isinstance(tensor, torch.Tensor) and tensor.is_cuda:
                    tensor.zero_()
            return Received(self.buffer, result)
        self.settle()
        return Received(self.buffer, result)

    def settle(self) -> None:
        """Raise what a kernel has reported."""
        torch.cuda.synchronize()
        self.buffer.check()

    def _call(self, operation, *args: object, **kwargs: object):
        poison()
        result = operation(*(_moved(a, "cuda") for a in args), **{k: _moved(v, "cuda") for k, v in kwargs.items()})
        torch.cuda.synchronize()
        self.buffer.check()
        fields = {f.name: getattr(result, f.name) for f in dataclasses.fields(result)}
        return type(result)(**{name: _moved(value, "cpu") for name, value in fields.items()})
