"""Where the time of a step goes."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any

from deepspeed.accelerator import get_accelerator


class Clock:
    """Adds up milliseconds by name.

    On GPUs laps are events in the current stream, so that the host may run ahead; it waits where times are read.
    """

    def __init__(self) -> None:
        self._accelerator = get_accelerator()
        self._uses_events = not self._accelerator.is_synchronized_device()
        self._ms: dict[str, float] = defaultdict(float)
        self._total_ms = 0.0
        self._last = self._mark()
        self._open: list[tuple[str, Any]] = []

    def lap(self, name: str) -> None:
        """Book the time since the last lap under `name`."""
        self._open.append((name, self._mark()))

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

    def _mark(self) -> Any:
        if not self._uses_events:
            return time.perf_counter()
        event = self._accelerator.Event(enable_timing=True)
        event.record()
        return event

    def _settle(self) -> None:
        if self._open and self._uses_events:
            self._open[-1][1].synchronize()
        for name, mark in self._open:
            passed_ms = self._last.elapsed_time(mark) if self._uses_events else (mark - self._last) * 1e3
            self._ms[name] += passed_ms
            self._total_ms += passed_ms
            self._last = mark
        self._open.clear()
