"""How long calls take on the GPU: between events in their stream. Whoever asks waits for nothing."""

from __future__ import annotations

import collections
import threading
from typing import Any

import torch

_MOST_OPEN = 64


class CapturedTimes:
    """Calls of one graph, between events that the graph records each time it runs."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any, Any]] = []
        self.running = False
        """Whether a replay's times have not been taken."""


class GpuTimes:
    """Milliseconds by operation, of calls that have ended on the GPU; waits for peers are in them.

    Calls that are captured into a CUDA graph run later, and more than once: they are timed at each replay if they were
    captured for that (:class:`CapturedTimes`), and else not.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: list[Any] = []
        self._open: collections.deque[tuple[str, Any, Any]] = collections.deque()
        self._captured: list[CapturedTimes] = []
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

    def captured(self) -> CapturedTimes:
        """For the calls of a graph that is to be captured."""
        return CapturedTimes()

    def mark_captured(self) -> Any:
        """An event that the graph under capture will record."""
        event = torch.cuda.Event(enable_timing=True, external=True)
        event.record()
        return event

    def add_captured(self, times: CapturedTimes, operation: str, begin: Any) -> None:
        """What was captured since ``begin`` is an operation of the graph of ``times``."""
        times.calls.append((operation, begin, self.mark_captured()))

    def before_replay(self, times: CapturedTimes) -> bool:
        """Take the times of the last replay, whose events the next one uses again; False if it has not ended."""
        with self._lock:
            self._settle_captured(times)
            lost, times.running = times.running, False
        return not lost

    def after_replay(self, times: CapturedTimes) -> None:
        """The graph was launched."""
        with self._lock:
            times.running = bool(times.calls)
            if times not in self._captured:
                self._captured.append(times)

    def forget(self, times: CapturedTimes) -> None:
        """The graph will not be launched again."""
        with self._lock:
            self._settle_captured(times)
            if times in self._captured:
                self._captured.remove(times)

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
        for times in self._captured:
            self._settle_captured(times)

    def _settle_captured(self, times: CapturedTimes) -> None:
        if times.running and times.calls[-1][2].query():
            for operation, begin, end in times.calls:
                self._ms[operation] += begin.elapsed_time(end)
            times.running = False
