"""Counters of communication: calls, seconds and bytes per operation, summed on the rank that measured them.

What a transport cannot measure is None, never 0. Ranks N and local experts L count within the EP group.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .gpu_times import CapturedTimes, GpuTimes


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransportCounters:
    """What a transport has counted since it was made; it may be asked from any thread, at any time."""

    wait_ns: tuple[int, ...]
    """``[N]``, ns: how long after this rank had published its part of an operation each other rank published its own;
    nothing for those that were there already. As in ``LowLatencyStats``."""
    recv_bytes: tuple[int, ...]
    """``[N]``: bytes of rows read from each rank, this one included, a row that serves several local experts once."""
    heap_bytes: int
    """Of this rank's heap: what the largest operations took so far, and what tensors of ``symm_empty`` take now."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommStats:
    """Totals since the last reset."""

    num_dispatch: int = 0
    num_combine: int = 0
    dispatch_ms: float = 0.0
    """Wall time inside dispatch, waits for peers included, ms."""
    combine_ms: float = 0.0
    dispatch_bytes: int = 0
    """Bytes of rows received by dispatches; of the room that they gave, with ``max_recv_tokens``."""
    combine_bytes: int = 0
    """Bytes of rows given to combines."""
    wait_ns: tuple[int, ...] | None = None
    """As in :class:`TransportCounters`, since the last reset."""
    recv_bytes: tuple[int, ...] | None = None
    """As in :class:`TransportCounters`, since the last reset."""
    num_tokens_per_expert: tuple[int, ...] | None = None
    """``[L]``: routes that dispatches with a new plan brought to each local expert. None if a count stayed on a GPU."""
    num_dropped: int | None = None
    """Routes that were marked -1 in such dispatches of this rank. None on GPUs, where asking would be a wait."""
    heap_bytes: int | None = None
    """As in :class:`TransportCounters`; not reset."""
    timed: bool = True
    """Whether ms are those of the operations. False on GPUs, where calls return before the rows are there, unless
    ``CommConfig.time_gpu_calls``: ms are then those of the calls that had ended when this was asked for."""

    def __add__(self, other: CommStats) -> CommStats:
        names = ("num_dispatch", "num_combine", "dispatch_ms", "combine_ms", "dispatch_bytes", "combine_bytes")
        sums = {name: getattr(self, name) + getattr(other, name) for name in names}
        for name in ("wait_ns", "recv_bytes", "num_tokens_per_expert"):
            sums[name] = add_counts(getattr(self, name), getattr(other, name))
        for name in ("num_dropped", "heap_bytes"):
            known = [n for n in (getattr(self, name), getattr(other, name)) if n is not None]
            sums[name] = sum(known) if known else None
        return CommStats(**sums, timed=self.timed and other.timed)


def add_counts(ours: Sequence[int] | None, others: Sequence[int] | None) -> tuple[int, ...] | None:
    """Index by index; the longer one says how many there are. None counts for nothing."""
    if ours is None or others is None:
        known = others if ours is None else ours
        return None if known is None else tuple(known)
    return tuple(a + b for a, b in itertools.zip_longest(ours, others, fillvalue=0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Begin:
    """When an operation began."""

    at_s: float
    """By the host's clock."""
    event: Any
    """In the GPU's stream; None where calls are not timed there."""


class CapturedCalls:
    """Calls that were captured into one CUDA graph: what they count, they count at each replay."""

    def __init__(self, times: CapturedTimes | None) -> None:
        self.times = times
        """None where calls are not timed on the GPU."""
        self.num_bytes: list[tuple[str, int]] = []
        """By call: the operation and the bytes of its rows."""


class CommRecorder:
    """Counts for one buffer. Plain numbers: it runs twice per operation.

    gpu_times: a ``GpuTimes``, where calls are to be timed on the GPU.
    """

    def __init__(self, gpu_times: GpuTimes | None = None) -> None:
        self._gpu_times = gpu_times
        self._timed = True
        self._seen: TransportCounters | None = None
        self._capturing: CapturedCalls | None = None
        self._clear()

    def _clear(self) -> None:
        self._calls = {"dispatch": 0, "combine": 0}
        self._seconds = {"dispatch": 0.0, "combine": 0.0}
        self._bytes = {"dispatch": 0, "combine": 0}
        self._tokens: tuple[int, ...] | None = None
        self._dropped: int | None = None

    def begin(self) -> Begin:
        """Before an operation."""
        mark = None
        if self._gpu_times is not None:
            mark = self._gpu_times.mark if self._capturing is None else self._gpu_times.mark_captured
        return Begin(at_s=time.perf_counter(), event=mark() if mark else None)

    def add(self, operation: str, begin: Begin, num_bytes: int, *, on_gpu: bool = False) -> None:
        """Count one ``dispatch`` or ``combine``. on_gpu: it may still run there when its call returns."""
        if self._capturing is not None:
            self._capturing.num_bytes.append((operation, num_bytes))
            if self._gpu_times is not None:
                self._gpu_times.add_captured(self._capturing.times, operation, begin.event)
            return
        self._calls[operation] += 1
        self._bytes[operation] += num_bytes
        if on_gpu and self._gpu_times is not None:
            self._timed = self._gpu_times.add(operation, begin.event) and self._timed
            return
        self._timed = self._timed and not on_gpu
        self._seconds[operation] += time.perf_counter() - begin.at_s

    @contextlib.contextmanager
    def capture(self) -> Iterator[CapturedCalls]:
        """Calls inside go into a CUDA graph; they are counted by :meth:`replay`."""
        self._capturing = calls = CapturedCalls(self._gpu_times.captured() if self._gpu_times else None)
        try:
            yield calls
        finally:
            self._capturing = None

    @contextlib.contextmanager
    def replay(self, calls: CapturedCalls) -> Iterator[None]:
        """Around the launch of their graph."""
        if self._gpu_times is not None:
            self._timed = self._gpu_times.before_replay(calls.times) and self._timed
        yield
        for operation, num_bytes in calls.num_bytes:
            self._calls[operation] += 1
            self._bytes[operation] += num_bytes
        if self._gpu_times is not None:
            self._gpu_times.after_replay(calls.times)
        else:
            self._timed = False

    def forget(self, calls: CapturedCalls) -> None:
        """Their graph will not be launched again."""
        if self._gpu_times is not None:
            self._gpu_times.forget(calls.times)

    def add_routes(self, num_tokens_per_expert: Sequence[int], num_dropped: int) -> None:
        """Count what the plan of one dispatch says, where the host knows it."""
        self._tokens = add_counts(self._tokens, num_tokens_per_expert)
        self._dropped = (self._dropped or 0) + num_dropped

    def stats(self, counters: TransportCounters | None = None, *, reset: bool = False) -> CommStats:
        """Totals since the last reset. counters: the transport's, as they are now."""
        since = _difference(counters, self._seen)
        on_gpu_ms = self._gpu_times.take_ms(reset=reset) if self._gpu_times else {}
        stats = CommStats(
            num_dispatch=self._calls["dispatch"],
            num_combine=self._calls["combine"],
            dispatch_ms=self._seconds["dispatch"] * 1e3 + on_gpu_ms.get("dispatch", 0.0),
            combine_ms=self._seconds["combine"] * 1e3 + on_gpu_ms.get("combine", 0.0),
            dispatch_bytes=self._bytes["dispatch"],
            combine_bytes=self._bytes["combine"],
            wait_ns=None if since is None else since.wait_ns,
            recv_bytes=None if since is None else since.recv_bytes,
            num_tokens_per_expert=self._tokens,
            num_dropped=self._dropped,
            heap_bytes=None if since is None else since.heap_bytes,
            timed=self._timed,
        )
        if reset:
            self._clear()
            self._seen = counters
        return stats


def _difference(now: TransportCounters | None, before: TransportCounters | None) -> TransportCounters | None:
    if now is None or before is None:
        return now
    return TransportCounters(
        wait_ns=tuple(a - b for a, b in zip(now.wait_ns, before.wait_ns)),
        recv_bytes=tuple(a - b for a, b in zip(now.recv_bytes, before.recv_bytes)),
        heap_bytes=now.heap_bytes,
    )
