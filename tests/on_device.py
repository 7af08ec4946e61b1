"""A buffer of transport ``cuda`` for cases that make and compare tensors on the CPU."""

from __future__ import annotations

import dataclasses

import torch

from ray_deepep import Buffer, CombineResult, DispatchHandle, DispatchResult


def _moved(value: object, device: str) -> object:
    return value.to(device) if isinstance(value, torch.Tensor) else value


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

    def __enter__(self) -> OnDevice:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.buffer.close()

    def _call(self, operation, *args: object, **kwargs: object):
        # Freed blocks come back full of this: what a kernel does not write is seen.
        poison = torch.full((1 << 22,), float("nan"), device="cuda")
        del poison
        result = operation(*(_moved(a, "cuda") for a in args), **{k: _moved(v, "cuda") for k, v in kwargs.items()})
        torch.cuda.synchronize()
        self.buffer.check()
        fields = {f.name: getattr(result, f.name) for f in dataclasses.fields(result)}
        return type(result)(**{name: _moved(value, "cpu") for name, value in fields.items()})
