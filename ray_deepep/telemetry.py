"""Counters of communication: calls, seconds and bytes per operation, summed on the rank that measured them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager


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
    """Adds up :class:`CommStats` for one buffer."""

    def __init__(self) -> None:
        self._stats = CommStats()

    @contextmanager
    def measure(self, operation: str) -> Iterator[None]:
        """Time one ``dispatch`` or ``combine``; failed calls are not counted."""
        start = time.perf_counter()
        yield
        elapsed_ms = (time.perf_counter() - start) * 1e3
        self._stats += CommStats(**{f"num_{operation}": 1, f"{operation}_ms": elapsed_ms})

    def add_bytes(self, operation: str, num_bytes: int) -> None:
        """Count bytes of one ``dispatch`` or ``combine``."""
        self._stats += CommStats(**{f"{operation}_bytes": num_bytes})

    def stats(self, *, reset: bool = False) -> CommStats:
        """Totals since the last reset."""
        stats = self._stats
        if reset:
            self._stats = CommStats()
        return stats
