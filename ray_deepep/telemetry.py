"""Counters of communication: calls, seconds and bytes per operation, summed on the rank that measured them."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommStats:
    """Totals since the last reset."""

    num_dispatch: int = 0
    num_combine: int = 0
    dispatch_ms: float = 0.0
    """Wall time inside dispatch, waits for peers included, ms."""
    combine_ms: float = 0.0
    dispatch_bytes: int = 0
    """Bytes of rows received by dispatches."""
    combine_bytes: int = 0
    """Bytes of rows given to combines."""

    def __add__(self, other: CommStats) -> CommStats:
        names = [field.name for field in dataclasses.fields(self)]
        return CommStats(**{name: getattr(self, name) + getattr(other, name) for name in names})


class CommRecorder:
    """Counts for one buffer. Plain numbers: it runs twice per operation."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._calls = {"dispatch": 0, "combine": 0}
        self._seconds = {"dispatch": 0.0, "combine": 0.0}
        self._bytes = {"dispatch": 0, "combine": 0}

    def add(self, operation: str, seconds: float, num_bytes: int) -> None:
        """Count one completed ``dispatch`` or ``combine``."""
        self._calls[operation] += 1
        self._seconds[operation] += seconds
        self._bytes[operation] += num_bytes

    def stats(self, *, reset: bool = False) -> CommStats:
        """Totals since the last reset."""
        stats = CommStats(
            num_dispatch=self._calls["dispatch"],
            num_combine=self._calls["combine"],
            dispatch_ms=self._seconds["dispatch"] * 1e3,
            combine_ms=self._seconds["combine"] * 1e3,
            dispatch_bytes=self._bytes["dispatch"],
            combine_bytes=self._bytes["combine"],
        )
        if reset:
            self._clear()
        return stats
