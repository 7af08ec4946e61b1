"""Asking the workers of a healthy run to make room for more of them, with a checkpoint and without losing a step.

The Train controller writes a wish into the cluster's key-value store, as a driver does that wants a run to stop (see
``stop.py``). Rank 0 looks there twice a second; the trainer has all ranks save after the same step, and then wait.
Rank 0 answers, and the controller replaces the workers. A wish has a name of its own, so an answer to an old one counts
for nothing.
"""

from __future__ import annotations

import time
import uuid

from ray.experimental import internal_kv

from ..errors import RayDeepEPError
from .stop import StopWatch

_NAMESPACE = b"ray_deepep"
_NAP_S = 0.2
HANDOVER_DEADLINE_S = 120.0


class HandoverError(RayDeepEPError, RuntimeError):
    """Workers were asked to make room, and nobody replaced them.

    Attributes: ``step``, ``waited_s``.
    """

    def __init__(self, step: int, waited_s: float) -> None:
        self.step, self.waited_s = step, waited_s
        super().__init__(f"waited {waited_s:.0f} s after the checkpoint of step {step} to be replaced")

    def __reduce__(self):
        return type(self), (self.step, self.waited_s)


def request_resize(run: str) -> str:
    """Ask the workers of ``run`` to save and wait; returns the wish's name. Needs a connection to Ray, as all here."""
    wish = uuid.uuid4().hex
    internal_kv._internal_kv_put(_key("wish", run), wish.encode(), namespace=_NAMESPACE)
    return wish


def resize_requested(run: str) -> bool:
    """Whether somebody did."""
    return _get("wish", run) is not None


def answer_resize(run: str) -> None:
    """The workers have saved and wait."""
    wish = _get("wish", run)
    if wish is not None:
        internal_kv._internal_kv_put(_key("answer", run), wish, namespace=_NAMESPACE)


def resize_answered(run: str, wish: str) -> bool:
    """Whether the workers have answered this wish."""
    return _get("answer", run) == wish.encode()


def forget_resize(run: str) -> None:
    """Leave nothing in the store."""
    for kind in ("wish", "answer"):
        internal_kv._internal_kv_del(_key(kind, run), namespace=_NAMESPACE)


def _get(kind: str, run: str) -> bytes | None:
    return internal_kv._internal_kv_get(_key(kind, run), namespace=_NAMESPACE)


def _key(kind: str, run: str) -> bytes:
    return f"resize {kind}/{run}".encode()


class ResizeHandover:
    """What the trainer of an elastic run asks on each rank. A context manager; only rank 0 looks into the store."""

    def __init__(self, run: str, rank: int, *, deadline_s: float = HANDOVER_DEADLINE_S) -> None:
        self._run, self._deadline_s = run, deadline_s
        self._watch = StopWatch(run, asked=resize_requested) if rank == 0 else None

    def asked(self) -> bool:
        """Whether the workers are to make room. Never waits."""
        return self._watch is not None and self._watch()

    def hand_over(self, step: int) -> None:
        """Say that the checkpoint of ``step`` is there, and wait for the end of this process.

        Raises HandoverError at the deadline.
        """
        if self._watch is not None:
            answer_resize(self._run)
        begin = time.monotonic()
        while (waited_s := time.monotonic() - begin) < self._deadline_s:
            time.sleep(_NAP_S)
        raise HandoverError(step, waited_s)

    def __enter__(self) -> ResizeHandover:
        if self._watch is not None:
            self._watch.__enter__()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._watch is not None:
            self._watch.__exit__(*exc_info)
