"""Layouts, handles and results of dispatch and combine: frozen values that name what moved and where it landed.

Shapes: T tokens of this rank, R rows received token-major (one per token and rank), S rows (slots) of an output,
H hidden, K top-k, E experts, N ranks, L = E / N local experts. Rows come in order of (source rank, token), and
expert-major rows in order of (local expert, source rank, token, k).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .errors import ReceiveOverflowError
from .fields import check_int, known_fields

NUM_PLAN_COUNTS = 4
"""Numbers in ``DispatchHandle.counts`` before those of the experts."""


@known_fields
@dataclasses.dataclass(frozen=True)
class TokenMajor:
    """One row per (token, rank) with a chosen expert: ``S = R``."""


@known_fields
@dataclasses.dataclass(frozen=True)
class ExpertMajor:
    """One row per route (token, k), grouped by local expert; each group starts at a multiple of ``alignment`` and
    its tail is zero. ``S`` is the sum of the aligned group sizes."""

    alignment: int = 1

    def __post_init__(self) -> None:
        # Plans count rows in int32.
        check_int("alignment", self.alignment, least=1, most=2**31 - 1)


@known_fields
@dataclasses.dataclass(frozen=True)
class Padded:
    """Fixed room: ``[N, L, capacity]`` slots, one block per source rank and local expert, zero where nothing was
    sent. The caller says with ``locations`` which slot of its block a route takes (DeepSpeed's layout)."""

    capacity: int

    def __post_init__(self) -> None:
        check_int("capacity", self.capacity, least=0, most=2**31 - 1)


Layout = TokenMajor | ExpertMajor | Padded


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceCounts:
    """What a dispatch received, int32 on the rows' device: readable by kernels without a host wait. Views of the plan:
    not to be written to. After an overflow they are meaningless; see ``DispatchHandle.check``."""

    num_recv_tokens: torch.Tensor
    """0-d: R."""
    num_rows: torch.Tensor
    """0-d: rows of the layout, S."""
    num_recv_tokens_per_expert: torch.Tensor
    """``[L]``: routes received per local expert, without padding."""
    expert_offsets: torch.Tensor
    """``[L + 1]``: first row of each local expert, aligned, and the end. Only for expert-major rows."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DispatchHandle:
    """What a dispatch planned; combine, cached dispatches and both backwards reuse it.

    Valid for the buffer that made it, until that buffer is closed. With ``max_recv_tokens`` the host does not learn
    what arrived: then S is ``max_recv_tokens``, and so is R of token-major rows; ``device_counts`` has the real ones.
    """

    layout: Layout
    num_tokens: int
    """T: tokens that this rank sent."""
    num_topk: int
    """K."""
    num_ranks: int
    """N."""
    num_local_experts: int
    """L."""
    num_recv_tokens: int | None
    """R: (token, rank) pairs that this rank received. None for expert-major rows with ``max_recv_tokens``."""
    num_rows: int
    """S: rows of the dispatched output in its layout."""
    num_recv_tokens_per_expert: tuple[int, ...] | None
    """Routes received per local expert, length L, without padding. None with ``max_recv_tokens``."""
    expert_offsets: tuple[int, ...] | None
    """First row of each local expert and the end, length L + 1 (expert-major; else empty). None with
    ``max_recv_tokens``."""
    max_recv_tokens: int | None
    """Rows that the dispatch was given room for; None if it took as many as came."""
    topk_weights: torch.Tensor | None
    """``[T, K]`` float32: this rank's own weights, for a weighted combine; None if they were left out."""
    recv_topk_weights: torch.Tensor | None
    """Weights received beside the rows: ``[R, K]`` token-major, ``[S]`` otherwise, float32."""
    counts: torch.Tensor
    """int32, begins with: R; S; 0 or 1 + the first rank that overflowed; rows which that rank needs;
    ``num_recv_tokens_per_expert``; ``expert_offsets``. Read them through ``device_counts``."""
    first_rank: int
    """Which rank ``counts`` calls 0: over several nodes of GPUs, the node's first."""
    plan: Any
    """The transport's own plan; opaque."""
    check_faults: Callable[[], None]
    """Raises if an operation of the buffer has failed since its call returned."""
    owner: int
    """Identity of the buffer that made the handle."""

    @functools.cached_property
    def device_counts(self) -> DeviceCounts:
        """The counts where the rows are."""
        counts, first_offset = self.counts, NUM_PLAN_COUNTS + self.num_local_experts
        return DeviceCounts(
            num_recv_tokens=counts[0],
            num_rows=counts[1],
            num_recv_tokens_per_expert=counts[NUM_PLAN_COUNTS:first_offset],
            expert_offsets=counts[first_offset : first_offset + self.num_local_experts + 1],
        )

    @functools.cached_property
    def expert_sizes(self) -> tuple[int, ...]:
        """Rows of each local expert in the layout, length L: unused slots of padded blocks and tails of aligned groups
        count. Not for token-major rows, and not with ``max_recv_tokens``."""
        if isinstance(self.layout, Padded):
            return (self.num_ranks * self.layout.capacity,) * self.num_local_experts
        return tuple(end - begin for begin, end in itertools.pairwise(self.expert_offsets))

    def split(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Views of ``rows`` ``[S, ...]``, one per local expert: ``[rows of its group, ...]`` expert-major,
        ``[N, capacity, ...]`` padded (not contiguous if there are several). As ``expert_sizes``."""
        if isinstance(self.layout, Padded):
            blocks = (self.num_ranks, self.num_local_experts, self.layout.capacity)
            return rows.view(*blocks, *rows.shape[1:]).unbind(1)
        return rows.split(self.expert_sizes)

    def join(self, blocks: Sequence[torch.Tensor]) -> torch.Tensor:
        """The opposite of :meth:`split`, a copy: ``[S, ...]`` from blocks ``[rows of the expert, ...]``."""
        if isinstance(self.layout, Padded):
            by_source = [block.view(self.num_ranks, self.layout.capacity, *block.shape[1:]) for block in blocks]
            return torch.stack(by_source, 1).view(self.num_rows, *blocks[0].shape[1:])
        return torch.cat(tuple(blocks))

    def check(self) -> None:
        """Raise if the dispatch brought more rows than ``max_recv_tokens``. Nothing to do without ``max_recv_tokens``.

        Waits for the current stream, so call it once per step rather than after each dispatch. On GPUs every rank
        of the node learns of an overflow; on CPUs only the ranks that overflowed do.

        Raises:
            ReceiveOverflowError: naming the rank, the rows that it needed and those it had.
            CommFaultError: the dispatch, or a later operation, failed because of another rank.
        """
        if self.max_recv_tokens is None:
            return
        overflowed, needed = self.counts[2:NUM_PLAN_COUNTS].tolist()
        # After a fault the counts are not written.
        self.check_faults()
        if overflowed:
            raise ReceiveOverflowError(self.first_rank + overflowed - 1, needed, self.max_recv_tokens)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DispatchResult:
    """Rows received by this rank."""

    x: torch.Tensor
    """``[S, H]``, dtype of the input (float8 with a cast). Rows after the last that came are zero."""
    x_scales: torch.Tensor | None
    """``[S, H / 128]`` float32, for fp8 rows."""
    topk_idx: torch.Tensor | None
    """``[R, K]`` int64, token-major only: local expert ids, -1 where the expert lives elsewhere and in rows
    after the last that came. None for a dispatch along an earlier plan."""
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
