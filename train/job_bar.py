"""The progress bar of a training job that another process runs, fed with the lines of its log."""

from __future__ import annotations

import sys
import threading
from types import TracebackType

from tqdm import tqdm

from ray_deepep import job_log

# Before the first step, what Ray and the run print as they get on; the rest of a line may be anything.
_STAGES = (
    ("Running entrypoint for job", "the job's Python starts"),
    ("Requesting resources", "Ray Train starts"),
    ("Attempting to start training worker group", "starting workers"),
    ("Started training worker group", "workers are there"),
    ("attempt ", "building the model"),
)
_TICK_S = 1.0


def stage_of(line: str) -> str:
    """What a job does that has just printed `line`, in words; empty if the line does not tell."""
    text = job_log.bare(line)
    return next((stage for begin, stage in _STAGES if text.startswith(begin)), "")


class JobBar:
    """A bar of optimizer steps. Until the first one its clock ticks (on a terminal) and it says what the job does.

    >>> with JobBar("ray_deepep", num_steps=200) as bar:
    ...     runner.run(command, log_path, bar.show)
    """

    def __init__(self, title: str, *, num_steps: int) -> None:
        self._bar = tqdm(total=num_steps, desc=title, unit="step", dynamic_ncols=True, mininterval=0.5)
        self._bar.set_postfix_str("submitted")
        self._first_step = threading.Event()
        self._ticker = threading.Thread(target=self._tick, name="job bar", daemon=True)

    def __enter__(self) -> JobBar:
        if sys.stderr.isatty():
            self._ticker.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._first_step.set()
        if self._ticker.is_alive():
            self._ticker.join()
        self._bar.close()

    def show(self, line: str) -> None:
        """Take in a line of the job's log. Faults, errors and what a job waits for are printed above the bar."""
        if step := job_log.parse_step(line):
            self._first_step.set()
            self._bar.set_postfix_str(str(step).split(" ", 2)[2], refresh=False)
            self._bar.update(step.step - self._bar.n)
            self._bar.refresh()
        elif line.startswith(("RAY_DEEPEP_FAULT", "error:", "waiting:")):
            self._bar.write(line)
        elif (stage := stage_of(line)) and not self._first_step.is_set():
            self._bar.set_postfix_str(stage)

    def _tick(self) -> None:
        while not self._first_step.wait(_TICK_S):
            self._bar.refresh()
