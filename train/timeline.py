"""Where the time goes between submitting a job and its first training step, and between a fault and training again."""

from __future__ import annotations

import dataclasses
import itertools
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class _Moments:
    """Moments in the order they pass; the metadata of every field but the first names the part that it ends."""

    @property
    def total_s(self) -> float:
        """From the first moment to the last."""
        return sum(self.parts_s().values())

    def parts_s(self) -> dict[str, float]:
        """Seconds of each part, in order."""
        fields = dataclasses.fields(self)
        return {
            after.metadata["ends"]: getattr(self, after.name) - getattr(self, before.name)
            for before, after in itertools.pairwise(fields)
        }

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.parts_s().items())
        return f"{self.total_s:.1f} s ({parts})"


def _end_of(part: str) -> Any:
    return dataclasses.field(metadata={"ends": part})


@dataclass(frozen=True, kw_only=True)
class StartTimes(_Moments):
    """From submitting a job to its first training step, in seconds since the epoch."""

    submitted: float
    """The job was handed to Ray; for a run that is no job, its process was started."""
    driver_started: float = _end_of("job start")
    """The process of the job's entry point began."""
    driver_imported: float = _end_of("driver imports")
    """It had imported Ray Train and torch."""
    ray_connected: float = _end_of("connect")
    """It was connected to Ray (or had started one)."""
    worker_started: float = _end_of("controller and placement")
    """The process of worker 0 began."""
    worker_entered: float = _end_of("worker imports, process group, communicator")
    """Worker 0 entered the training function."""
    first_step_began: float = _end_of("data, model, engine")
    first_step_done: float = _end_of("first step")


@dataclass(frozen=True, kw_only=True)
class RecoveryTimes(_Moments):
    """From a fault to the first training step after it, in seconds since the epoch."""

    fault: float
    """The fault happened."""
    worker_started: float = _end_of("detection and teardown")
    """The process of the new worker 0 began."""
    worker_entered: float = _end_of("worker imports, process group, communicator")
    """It entered the training function."""
    first_step_began: float = _end_of("model, engine, checkpoint")
    first_step_done: float = _end_of("first step")


def process_started() -> float:
    """When this process began, in seconds since the epoch; now, where /proc does not say."""
    try:
        stat = Path("/proc/self/stat").read_text(encoding="utf-8")
        ticks = int(stat[stat.rindex(")") + 2 :].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, AttributeError):
        age = 0.0
    return time.time() - age
