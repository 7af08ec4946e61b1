"""Layouts, handles, results and statistics of the low-latency calls: frozen values that name what landed where.

Shapes: T tokens of this rank, M ``low_latency_max_tokens`` of the buffer, H hidden, K top-k, E experts, N ranks,
L = E / N local experts. Rows of an expert are packed from the front of its group, in order of (source rank, token).
What arrived stands in tensors beside the rows, so nothing waits on the host for counts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from .errors import ReceiveOverflowError
from .handle import ExpertMajor

MAX_LOW_LATENCY_TOKENS = 1024
"""Largest ``low_latency_max_tokens`` of a buffer."""
LOW_LATENCY_REDUCE_MODES = ("fast", "exact")
ON_TIMEOUT = ("raise", "mask")


@dataclasses.dataclass(frozen=True)
class ExpertBlocks:
    """One block of ``N * M`` rows per local expert, ``[L, N * M, H]``: room for every token of every rank. For grouped
    products that take a count per group. Rows of a block after its count are not written: they may hold anything."""


LowLatencyLayout = ExpertBlocks | ExpertMajor


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayoutRanges:
    """Which rows of an expert's group came from which rank, int32 ``[L, N]``, in rows from the group's first."""

    begin: torch.Tensor
    count: torch.Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowLatencyStats:
    """Running totals, added to by every call they are given to, on the rows' device and without synchronisation.

    A buffer has its own; give others with ``stats=``, one per layer for instance. ``zero_()`` them to start again.
    """

    num_tokens_per_expert: torch.Tensor
    """``[L]`` int64: routes that reached each local expert."""
    wait_ns: torch.Tensor
    """``[N]`` int64, ns: how long after this rank began to receive each source rank sent; 0 for those that were there
    already, and the whole wait for a rank that was given up."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowLatencyHandle:
    """What a low-latency dispatch planned; its combine needs it. Valid once the dispatch was received."""

    layout: LowLatencyLayout
    num_tokens: int
    """T: tokens that this rank sent."""
    num_topk: int
    """K."""
    rows_shape: tuple[int, ...]
    """Shape of the dispatched rows, and of those that combine takes."""
    absent: torch.Tensor
    """``[N]`` bool: ranks that took no part."""
    needed: torch.Tensor
    """``[1]`` int32: rows that what arrived takes, with alignment."""
    flight: Any
    """The call that made it; opaque."""
    owner: int
    """Identity of the buffer that made it."""

    def check(self) -> None:
        """Raise if ``max_recv_tokens`` was too few. Waits for the current stream; of overflows it knows this rank's.

        Raises:
            ReceiveOverflowError: rows did not fit and were left out; combine adds nothing for them.
        """
        if isinstance(self.layout, ExpertMajor) and int(self.needed) > self.rows_shape[0]:
            raise ReceiveOverflowError(self.flight.rank, int(self.needed), self.rows_shape[0])


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowLatencyDispatchResult:
    """Rows received by this rank. With ``return_recv_hook`` all tensors are undefined until ``hook()`` returned."""

    x: torch.Tensor
    """``[L, N * M, H]``, or ``[max_recv_tokens, H]`` for :class:`~ray_deepep.ExpertMajor`; dtype of the input, or
    float8 with a cast. Rows that no token reached are undefined, but zero in the padding of aligned groups."""
    x_scales: torch.Tensor | None
    """Shape of ``x`` with ``H / 128`` in place of H, float32; for float8 rows."""
    counts: torch.Tensor
    """``[L]`` int32: rows of each local expert."""
    ranges: LayoutRanges
    expert_offsets: torch.Tensor
    """``[L + 1]`` int32: first row of each local expert in ``x.view(-1, H)``, and the end."""
    absent: torch.Tensor
    """``[N]`` bool: ranks that took no part, masked or given up just now; no rows of theirs are here."""
    handle: LowLatencyHandle
    hook: Callable[[], None] | None
    """Receives; None if the call has. Call it once, in the order in which operations were sent. It holds this thread
    until all ranks have sent, or until the time-out.

    Raises ``HookError``, ``MismatchError``, ``RankMaskedError`` and ``CommFaultError``."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowLatencyCombineResult:
    """Rows back at their source. With ``return_recv_hook`` all tensors are undefined until ``hook()`` returned."""

    x: torch.Tensor
    """``[T, H]``, dtype of the rows; ``out`` if it was given. 0 where a token had no expert."""
    absent: torch.Tensor
    """``[N]`` bool: ranks whose experts' contributions are missing in ``x``."""
    hook: Callable[[], None] | None
    """As in :class:`LowLatencyDispatchResult`."""
