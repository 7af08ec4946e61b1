"""Where the time of a step goes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from deepspeed.accelerator import get_accelerator


class Marks:
    """Moments of this process: of the host's clock, or on a GPU events in the current stream, so that the host may run
    ahead of it."""

    def __init__(self) -> None:
        self._accelerator = get_accelerator()
        self._uses_events = not self._accelerator.is_synchronized_device()

    def now(self) -> Any:
        """A mark that has passed when all that was given to the device before is done."""
        if not self._uses_events:
            return time.perf_counter()
        event = self._accelerator.Event(enable_timing=True)
        event.record()
        return event

    def wait(self, mark: Any) -> None:
        """Until it has passed."""
        if self._uses_events:
            mark.synchronize()

    def ms_between(self, start: Any, end: Any) -> float:
        """Both have passed."""
        return start.elapsed_time(end) if self._uses_events else (end - start) * 1e3


class Clock:
    """Adds up milliseconds by name, of the time between laps. It waits for a GPU where times are read."""

    def __init__(self) -> None:
        self._marks = Marks()
        self._ms: dict[str, float] = defaultdict(float)
        self._total_ms = 0.0
        self._last = self._marks.now()
        self._open: list[tuple[str, Any]] = []

    def lap(self, name: str) -> None:
        """Book the time since the last lap under `name`."""
        self._open.append((name, self._marks.now()))

    @property
    def ms(self) -> dict[str, float]:
        """By name, to the last lap; 0 for names without one."""
        self._settle()
        return self._ms

    @property
    def total_ms(self) -> float:
        """From the start to the last lap."""
        self._settle()
        return self._total_ms

    def _settle(self) -> None:
        if self._open:
            self._marks.wait(self._open[-1][1])
        for name, mark in self._open:
            passed_ms = self._marks.ms_between(self._last, mark)
            self._ms[name] += passed_ms
            self._total_ms += passed_ms
            self._last = mark
        self._open.clear()


class Spans:
    """Adds up milliseconds by name, of blocks. It waits for a GPU where times are taken."""

    def __init__(self) -> None:
        self._marks = Marks()
        self._open: list[tuple[str, Any, Any]] = []

    @contextmanager
    def during(self, name: str) -> Iterator[None]:
        """Book what the block takes under `name`."""
        begin = self.begin()
        yield
        self.end(name, begin)

    def begin(self) -> Any:
        """A mark for `end`, where what is timed is no block."""
        return self._marks.now()

    def end(self, name: str, begin: Any) -> None:
        """Book the time since `begin` under `name`."""
        self._open.append((name, begin, self._marks.now()))

    def take(self) -> dict[str, list[float]]:
        """Of each block since the last call, by name."""
        found: dict[str, list[float]] = defaultdict(list)
        if self._open:
            self._marks.wait(self._open[-1][2])
        for name, start, end in self._open:
            found[name].append(self._marks.ms_between(start, end))
        self._open.clear()
        return found
