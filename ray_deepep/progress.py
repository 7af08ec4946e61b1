"""Where a rank is in its work: what it says about itself while it can, for whoever must explain why it stands still."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator

from .errors import CommFaultError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Beacon:
    """What was last heard of a rank's progress."""

    step: int = 0
    """Optimizer step, as the program counts; 0 where it does not say."""
    phase: str = ""
    """``dispatch``, ``combine`` or ``allocate`` inside a call of ours, else the program's own word, such as ``data``,
    ``forward``, ``backward``, ``optimizer`` or ``checkpoint``; empty where it does not say."""
    age_s: float = 0.0
    """Seconds since step or phase was last set, as told."""
    silent_s: float = 0.0
    """Seconds since it was told: more than a few where the process is gone, stopped, or holds the interpreter."""

    @property
    def stood_s(self) -> float:
        """Seconds since the last sign of progress."""
        return self.age_s + self.silent_s

    @property
    def where(self) -> str:
        """Step and phase, in words."""
        step = f"step {self.step}" if self.step else ""
        phase = f"phase {self.phase}" if self.phase else ""
        return ", ".join(part for part in (step, phase) if part) or "no step or phase told"

    def __str__(self) -> str:
        return f"{self.where} for {self.age_s:.1f} s, told {self.silent_s:.1f} s ago"


class Progress:
    """Step and phase of this rank, set with plain assignments from the thread that works and read from any other.

    progress.step = 7
    progress.phase = "forward"
    """

    __slots__ = ("_now",)

    def __init__(self) -> None:
        # Replaced as a whole, so a reader never sees half of a change.
        self._now = (0, "", time.monotonic())

    @property
    def step(self) -> int:
        """See :class:`Beacon`."""
        return self._now[0]

    @step.setter
    def step(self, step: int) -> None:
        self._now = (step, self._now[1], time.monotonic())

    @property
    def phase(self) -> str:
        """See :class:`Beacon`."""
        return self._now[1]

    @phase.setter
    def phase(self, phase: str) -> None:
        self._now = (self._now[0], phase, time.monotonic())

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """``phase`` inside a ``with`` block; afterwards the one before, also where the block raised. A fault leaves it
        as it is: nothing comes after, and it says where this rank ended."""
        before, self.phase = self.phase, phase
        try:
            yield
        except CommFaultError:
            raise
        except BaseException:
            self.phase = before
            raise
        self.phase = before

    def beacon(self) -> Beacon:
        """As it is now."""
        step, phase, since = self._now
        return Beacon(step=step, phase=phase, age_s=time.monotonic() - since)
