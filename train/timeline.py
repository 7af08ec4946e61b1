"""Where the time goes between submitting a job and its first training step, and between a fault and training again."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class StartTimes:
    """Moments of a start, in seconds since the epoch, in the order they pass."""

    submitted: float
    """The job was handed to Ray; for a run that is no job, its process was started."""
    driver_started: float
    """The process of the job's entry point began."""
    driver_imported: float
    """It had imported Ray Train and torch."""
    ray_connected: float
    """It was connected to Ray (or had started one)."""
    worker_started: float
    """The process of worker 0 began: controller and placement are done."""
    worker_entered: float
    """Worker 0 entered the training function: imports, process group and communicator are done."""
    first_step_began: float
    """Data, model and DeepSpeed engine were ready."""
    first_step_done: float
    """The first optimizer step was over."""

    @property
    def total_s(self) -> float:
        """From submission to the end of the first step."""
        return self.first_step_done - self.submitted

    def parts_s(self) -> dict[str, float]:
        """Seconds of each part, in order; they add up to `total_s`."""
        moments = [
            self.submitted,
            self.driver_started,
            self.driver_imported,
            self.ray_connected,
            self.worker_started,
            self.worker_entered,
            self.first_step_began,
            self.first_step_done,
        ]
        names = (
            "job start",
            "driver imports",
            "connect",
            "controller and placement",
            "worker imports, process group, communicator",
            "data, model, engine",
            "first step",
        )
        return {name: after - before for name, before, after in zip(names, moments, moments[1:])}

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.parts_s().items())
        return f"{self.total_s:.1f} s ({parts})"


def process_started() -> float:
    """When this process began, in seconds since the epoch; now, where /proc does not say."""
    try:
        stat = Path("/proc/self/stat").read_text(encoding="utf-8")
        ticks = int(stat[stat.rindex(")") + 2 :].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, AttributeError):
        age = 0.0
    return time.time() - age
