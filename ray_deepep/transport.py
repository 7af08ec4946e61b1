"""What a transport must do: the seam between :class:`~ray_deepep.Buffer` and the code that moves rows.

``Buffer`` checks arguments and builds handles; a transport gets requests that are already valid on this rank, moves
rows, and checks only what needs other ranks (that all of them asked for the same thing).
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import torch

from .handle import DispatchHandle, Layout

REDUCE_MODES = ("exact", "fast", "expert_order")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BufferGeometry:
    """Sizes a buffer is made for; the same on every rank."""

    num_experts: int
    """E, a multiple of the number of ranks."""
    hidden: int
    """H, elements of a row."""
    num_topk: int
    """Largest K, at most 32."""
    max_tokens: int
    """Largest T of any rank."""
    max_capacity: int = 0
    """Largest capacity of a :class:`~ray_deepep.Padded` layout; 0: no such layout is used."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DispatchRequest:
    """A dispatch. With ``handle`` (a cached dispatch), ``topk_idx``, ``topk_weights`` and ``locations`` are None."""

    x: torch.Tensor
    """``[T, H]`` contiguous."""
    x_scales: torch.Tensor | None
    """``[T, H / 128]`` float32 contiguous, for fp8 rows."""
    topk_idx: torch.Tensor | None
    """``[T, K]`` int64 contiguous, global expert ids, -1 = none."""
    topk_weights: torch.Tensor | None
    """``[T, K]`` float32 contiguous."""
    locations: torch.Tensor | None
    """``[T, K]`` int32 contiguous, slot of each route in its padded block."""
    layout: Layout
    handle: DispatchHandle | None
    scale_by_weights: bool
    """Multiply each route's row by its weight (in float32, rounded once) on arrival; not for token-major rows."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DispatchOutput:
    """What a transport returns from a dispatch; fields as in :class:`~ray_deepep.handle.DispatchResult`."""

    x: torch.Tensor
    x_scales: torch.Tensor | None
    topk_idx: torch.Tensor | None
    topk_weights: torch.Tensor | None
    num_recv_tokens: int
    num_recv_tokens_per_expert: tuple[int, ...]
    expert_offsets: tuple[int, ...]
    plan: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class CombineRequest:
    """A combine of rows laid out as ``handle`` says."""

    rows: torch.Tensor
    """``[S, H]`` contiguous."""
    handle: DispatchHandle
    topk_weights: torch.Tensor | None
    """Row weights to carry back: ``[R, K]`` token-major, ``[S]`` otherwise, float32 contiguous."""
    weighted: bool
    """Multiply each route's row by its weight from the dispatch (float32) before the sum."""
    reduce: str
    """``exact``: routes summed at the source in float32, k order. ``fast``: summed over local experts first (float32,
    rounded once to the rows' dtype), then over ranks in rank order. ``expert_order``: as ``exact``, but by
    ascending expert (bit-equal to ``torch.index_add`` over expert-major rows, which adds in float32 and rounds once).
    Token-major rows are always summed over ranks in rank order, in float32."""
    keep_routes: bool
    """Also return each route's row as it came, ``[K, T, H]``; not for token-major rows nor ``fast``."""
    bias: torch.Tensor | None
    """``[T, H]``, added in float32 before the result is rounded."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CombineOutput:
    """What a transport returns from a combine."""

    x: torch.Tensor
    topk_weights: torch.Tensor | None
    routes: torch.Tensor | None


class Transport(Protocol):
    """One buffer's way to move rows. All but
    ``close`` are collective and block until this rank's rows are complete.

    Raises:
        MismatchError: ranks asked for different things; nothing was moved.
        CommFaultError: a peer died or did not come within the deadline; the transport then refuses all further calls.
    """

    device_type: str | None
    """Type of the device on which all tensors must be; None: any."""

    def dispatch(self, request: DispatchRequest) -> DispatchOutput: ...

    def combine(self, request: CombineRequest) -> CombineOutput: ...

    def combine_weights(self, topk_weights: torch.Tensor, handle: DispatchHandle) -> torch.Tensor: ...

    def check(self) -> None:
        """Raise the fault of an operation that ended after its call returned. Local."""

    def close(self) -> None: ...
