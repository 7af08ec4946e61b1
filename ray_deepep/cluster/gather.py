"""Waiting for one answer per rank with a deadline, and saying who did not come."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import ray

from ..config import CommConfig
from ..errors import BootstrapError, RayDeepEPError, SharedGpuError
from ..rank_info import shared_gpus


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answers:
    """What came back from one call per rank, by rank."""

    values: dict[int, Any]
    errors: dict[int, Exception]
    missing: tuple[int, ...]
    """Ranks that did not answer in time, or were not waited for after another rank's error."""

    @property
    def dead(self) -> tuple[int, ...]:
        """Ranks whose actor is gone, ascending."""
        return tuple(
            sorted(rank for rank, error in self.errors.items() if isinstance(error, ray.exceptions.RayActorError))
        )


def gather(refs: Sequence[ray.ObjectRef], deadline_s: float, *, stop_at_error: bool = True) -> Answers:
    """Wait for ``refs[rank]`` of every rank; at the first error at once if ``stop_at_error``, else to the deadline.

    An actor that is gone counts as an error. What a rank raised, or returned as an exception, comes back as it was.
    """
    rank_of = {ref: rank for rank, ref in enumerate(refs)}
    values: dict[int, Any] = {}
    errors: dict[int, Exception] = {}
    pending = list(refs)
    deadline = Deadline(deadline_s)
    while pending and not (stop_at_error and errors):
        done, pending = ray.wait(pending, num_returns=1, timeout=deadline.remaining())
        if not done:
            break
        for ref in done:
            try:
                value = ray.get(ref)
                (errors if isinstance(value, Exception) else values)[rank_of[ref]] = value
            except ray.exceptions.RayTaskError as error:
                errors[rank_of[ref]] = error.cause if isinstance(error.cause, Exception) else error
            except ray.exceptions.RayError as error:
                errors[rank_of[ref]] = error
    return Answers(values=values, errors=errors, missing=tuple(rank_of[ref] for ref in pending))


def first_error(
    answers: Answers, *, phase: str, deadline_s: float, who: Sequence[object]
) -> RayDeepEPError | Exception | None:
    """The error that a failed gathering should raise, None if all went well.

    A dead actor first (the others' errors follow from it), then what a rank raised, then ranks that did not answer.

    Args:
        answers: from :func:`gather`.
        phase: what the ranks were to reach.
        deadline_s: how long they had.
        who: each rank, printed as it is, such as a ``ProcessId``.
    """
    if answers.dead:
        details = "; ".join(f"rank {r}, {who[r]}: {one_line(answers.errors[r])}" for r in answers.dead)
        return BootstrapError(phase, list(answers.dead), deadline_s, details)
    if answers.errors:
        return answers.errors[min(answers.errors)]
    if answers.missing:
        details = "; ".join(f"rank {r}, {who[r]}, did not answer" for r in answers.missing)
        return BootstrapError(phase, list(answers.missing), deadline_s, details)
    return None


def refuse_shared_gpus(gpus: Sequence[str], config: CommConfig) -> None:
    """Raise ``SharedGpuError`` if two world ranks have the same GPU and ``config`` does not allow it.

    Args:
        gpus: UUID of each world rank's GPU, empty where it uses none.
        config: of all ranks.
    """
    shared = {} if config.allow_shared_gpus else shared_gpus(gpus)
    if shared:
        raise SharedGpuError(shared)


def one_line(error: object, limit: int = 300) -> str:
    """An error's text in one line, shortened."""
    text = " ".join(str(error).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


class Deadline:
    """A moment on the monotonic clock."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def remaining(self) -> float:
        """Seconds left, 0 after it."""
        return max(self._end - time.monotonic(), 0.0)
