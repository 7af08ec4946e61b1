"""How long calls take on the GPU: between events in their stream. Whoever asks waits for nothing."""

from __future__ import annotations

import collections
import threading
from typing import Any

import torch

_MOST_OPEN = 64


class GpuTimes:
    """Milliseconds by operation, of calls that have ended on the GPU; waits for peers are in them.

    Calls that are captured into a CUDA graph are not timed: their kernels run later, and more than once.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: list[Any] = []
        self._open: collections.deque[tuple[str, Any, Any]] = collections.deque()
        self._ms: dict[str, float] = collections.defaultdict(float)

    def mark(self) -> Any:
        """An event in the current stream; None while a graph is captured."""
        if torch.cuda.is_current_stream_capturing():
            return None
        try:
            event = self._free.pop()
        except IndexError:
            event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, operation: str, begin: Any) -> bool:
        """What was launched since ``begin`` was an operation. Whether it will be timed."""
        end = None if begin is None else self.mark()
        if end is None:
            return False
        self._open.append((operation, begin, end))
        if len(self._open) > _MOST_OPEN:
            with self._lock:
                self._settle()
        return True

    def take_ms(self, *, reset: bool) -> dict[str, float]:
        """By operation, of the calls that have ended; those that have not count later. From any thread."""
        with self._lock:
            self._settle()
            found = dict(self._ms)
            if reset:
                self._ms.clear()
        return found

    def _settle(self) -> None:
        while self._open and self._open[0][2].query():
            operation, begin, end = self._open.popleft()
            self._ms[operation] += begin.elapsed_time(end)
            self._free += (begin, end)
