"""Layouts, handles and results of dispatch and combine: frozen values that name what moved and where it landed.

Shapes: T tokens of this rank, R rows received token-major (one per token and rank), S rows (slots) of an output,
H hidden, K top-k, E experts, N ranks, L = E / N local experts. Rows come in order of (source rank, token), and
expert-major rows in order of (local expert, source rank, token, k).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from .errors import InvalidArgumentError


@dataclasses.dataclass(frozen=True)
class TokenMajor:
    """One row per (token, rank) with a chosen expert: ``S = R``."""


@dataclasses.dataclass(frozen=True)
class ExpertMajor:
    """One row per route (token, k), grouped by local expert; each group starts at a multiple of ``alignment`` and
    its tail is zero. ``S`` is the sum of the aligned group sizes."""

    alignment: int = 1

    def __post_init__(self) -> None:
        if self.alignment < 1:
            raise InvalidArgumentError("alignment", self.alignment, "must be >= 1")


@dataclasses.dataclass(frozen=True)
class Padded:
    """Fixed room: ``[N, L, capacity]`` slots, one block per source rank and local expert, zero where nothing was
    sent. The caller says with ``locations`` which slot of its block a route takes (DeepSpeed's layout)."""

    capacity: int

    def __post_init__(self) -> None:
        if self.capacity < 0:
            raise InvalidArgumentError("capacity", self.capacity, "must be >= 0")


Layout = TokenMajor | ExpertMajor | Padded


@dataclasses.dataclass(frozen=True, kw_only=True)
class DispatchHandle:
    """What a dispatch planned; combine, cached dispatches and both backwards reuse it.

    Valid for the buffer that made it, until that buffer is closed.
    """

    layout: Layout
    num_tokens: int
    """T: tokens that this rank sent."""
    num_topk: int
    """K."""
    num_recv_tokens: int
    """R: (token, rank) pairs that this rank received."""
    num_rows: int
    """S: rows of the dispatched output in its layout."""
    num_recv_tokens_per_expert: tuple[int, ...]
    """Routes received per local expert, length L, without padding."""
    expert_offsets: tuple[int, ...]
    """First row of each local expert and the end, length L + 1 (expert-major; else empty)."""
    topk_weights: torch.Tensor | None
    """``[T, K]`` float32: this rank's own weights, for a weighted combine."""
    recv_topk_weights: torch.Tensor | None
    """Weights received beside the rows: ``[R, K]`` token-major, ``[S]`` otherwise, float32."""
    plan: Any
    """The transport's own plan; opaque."""
    owner: int
    """Identity of the buffer that made the handle."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DispatchResult:
    """Rows received by this rank."""

    x: torch.Tensor
    """``[S, H]``, dtype of the input."""
    x_scales: torch.Tensor | None
    """``[S, H / 128]`` float32, for fp8 rows."""
    topk_idx: torch.Tensor | None
    """``[R, K]`` int64, token-major only: local expert ids, -1 where the expert lives elsewhere. None
    for a dispatch along an earlier plan."""
    topk_weights: torch.Tensor | None
    """``[R, K]`` token-major (0 where ``topk_idx`` is -1), ``[S]`` otherwise (0 in padding), float32."""
    handle: DispatchHandle


@dataclasses.dataclass(frozen=True, kw_only=True)
class CombineResult:
    """Rows back at their source."""

    x: torch.Tensor
    """``[T, H]``, dtype of the rows: sum over the routes (or ranks) of each token; 0 where it had none."""
    topk_weights: torch.Tensor | None
    """``[T, K]`` float32: the row weights given to combine, back at their (token, k); 0 where there was no route."""
    routes: torch.Tensor | None
    """``[K, T, H]``, dtype of the rows: each route's row as it came, 0 where there was none (``keep_routes``)."""
