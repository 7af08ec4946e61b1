"""Where the time of a step goes."""

from __future__ import annotations

import time
from collections import defaultdict

from deepspeed.accelerator import get_accelerator


class Clock:
    """Adds up milliseconds by name; each lap is taken when the device has finished its queue."""

    def __init__(self) -> None:
        self.ms: dict[str, float] = defaultdict(float)
        self._start = self._last = self._now()

    def lap(self, name: str) -> None:
        """Book the time since the last lap under `name`."""
        now = self._now()
        self.ms[name] += (now - self._last) * 1e3
        self._last = now

    @property
    def total_ms(self) -> float:
        """From the start to the last lap."""
        return (self._last - self._start) * 1e3

    @staticmethod
    def _now() -> float:
        get_accelerator().synchronize()
        return time.perf_counter()
