"""Stock's gates with sums over tokens that GPUs are quick at.

Where each route stands in its expert's block, a gate finds with ``torch.cumsum`` down the columns of a mask ``[T, E]``,
once for each of a token's experts. On a GPU a thread then walks down each column: 0.7 ms for 4,096 tokens and 64
experts. Along rows the same integers take so little that a profile of the layer does not show them.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch


def sums_down(x: torch.Tensor, dim: int) -> torch.Tensor:
    """``torch.cumsum``; of the columns of a matrix as if they were rows."""
    if dim != 0 or x.dim() != 2:
        return torch.cumsum(x, dim=dim)
    return torch.cumsum(x.t().contiguous(), dim=1).t()


def sums_where_quick(x: torch.Tensor, dim: int) -> torch.Tensor:
    """``torch.cumsum``; on a GPU :func:`sums_down`. On CPUs to turn the matrix costs what it saves."""
    return sums_down(x, dim) if x.is_cuda else torch.cumsum(x, dim=dim)


def with_sums(gating: Callable[..., Any], cumsum: Callable[..., torch.Tensor] = sums_where_quick) -> Callable[..., Any]:
    """A gating function of ``sharded_moe`` as it is written there, its ``torch.cumsum`` being ``cumsum``.

    Anything but a plain Python function is returned as it is.
    """
    if not isinstance(gating, types.FunctionType):
        return gating
    namespace = {**gating.__globals__, "torch": _Torch(cumsum)}
    twin = types.FunctionType(gating.__code__, namespace, gating.__name__, gating.__defaults__, gating.__closure__)
    twin.__kwdefaults__, twin.__doc__, twin.__module__ = gating.__kwdefaults__, gating.__doc__, gating.__module__
    return twin


class _Torch:
    """``torch`` but for its ``cumsum``."""

    def __init__(self, cumsum: Callable[..., torch.Tensor]) -> None:
        self.cumsum = cumsum

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)
