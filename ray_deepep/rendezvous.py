"""Exchange functions for bootstrap: all-gather of short byte strings with a deadline that names who is missing."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from .bounded_store import BoundedStore, StoreLostError
from .errors import BootstrapError

R = TypeVar("R")

_MET = "met"
_GRACE_S = 0.5
"""For the store to answer after the deadline, when ranks find out who is missing."""


def store_exchange(
    group: dist.ProcessGroup, rank: int, num_ranks: int, deadline_s: float
) -> Callable[[str, bytes], list[bytes]]:
    """Exchange through the key-value store behind a torch process group.

    A store can say which keys are there, which a collective cannot, so a missing rank can be named; and it works alike
    for gloo and NCCL. Ranks may bootstrap one group many times, also after attempts that failed.
    """
    ranks = "-".join(map(str, dist.get_process_group_ranks(group)))
    # The default store, not the group's own: destroying and re-making a group must not meet stale keys either.
    return _StoreExchange(BoundedStore(f"ray_deepep/{ranks}"), rank, num_ranks, deadline_s)


class _StoreExchange:
    """One attempt to bring ranks together.

    Keys carry the number of the attempt, which ranks agree on in the first exchange: each joins the attempt that is
    open, and its outcome is decided once, by an atomic compare-and-set. Whoever sees that all have come says "met";
    whoever waited too long says who is missing, and then the attempt fails on every rank in it. Either opens the next
    attempt. So a rank that comes late, or calls again, never reads what ranks left in an attempt that is over.
    """

    def __init__(self, store: BoundedStore, rank: int, num_ranks: int, deadline_s: float) -> None:
        self._store, self._rank, self._num_ranks, self._deadline_s = store, rank, num_ranks, deadline_s
        self._attempt: int | None = None
        self._end = 0.0

    def __call__(self, phase: str, payload: bytes) -> list[bytes]:
        self._end = time.monotonic() + self._deadline_s
        try:
            return self._exchange(phase, payload)
        except StoreLostError as error:
            # Most often that of the job's rank 0; torch does not say.
            raise BootstrapError(phase, [], self._deadline_s, str(error)) from None

    def _exchange(self, phase: str, payload: bytes) -> list[bytes]:
        if self._attempt is None:
            self._attempt = self._join(phase, payload)
        else:
            key = self._keys(self._attempt, phase)[self._rank]
            self._ask(lambda store: store.set(key, payload))
            self._wait_for_all(phase)
        keys = self._keys(self._attempt, phase)
        return self._ask(lambda store: [store.get(key) for key in keys])

    def _join(self, phase: str, payload: bytes) -> int:
        """Number of the attempt in which all ranks met."""
        attempt = int(self._ask(lambda store: store.compare_set("open", "", "0")))
        while self._present([self._outcome_key(attempt)]):
            attempt = self._open_next(attempt)
        keys = self._keys(attempt, phase)
        self._ask(lambda store: store.set(keys[self._rank], payload))
        try:
            # Whoever comes last sees all others, so one of them always says it.
            if self._present(keys):
                self._decide(attempt, _MET)
            self._wait([self._outcome_key(attempt)])
            outcome = self._ask(lambda store: store.get(self._outcome_key(attempt))).decode()
        except TimeoutError:
            missing = self._missing(keys)
            outcome = self._decide(attempt, json.dumps([phase, missing]) if missing else _MET)
        except StoreLostError:
            raise
        except BaseException:
            # Interrupted: this rank leaves, so the others must not count on it.
            self._decide(attempt, json.dumps([phase, [self._rank]]))
            raise
        self._open_next(attempt)
        if outcome != _MET:
            raise BootstrapError(*json.loads(outcome), self._deadline_s)
        return attempt

    def _wait_for_all(self, phase: str) -> None:
        keys = self._keys(self._attempt, phase)
        try:
            self._wait(keys)
        except TimeoutError:
            if missing := self._missing(keys):
                raise BootstrapError(phase, missing, self._deadline_s) from None

    def _wait(self, keys: list[str]) -> None:
        """Until all keys are there; ``TimeoutError`` at the deadline. Asks now and then, for a store that is asked to
        wait answers nothing else meanwhile."""
        start = time.monotonic()
        while not self._present(keys):
            now = time.monotonic()
            if now >= self._end:
                raise TimeoutError
            time.sleep(min(0.0005 + (now - start) / 20, 0.05))

    def _ask(self, question: Callable[[dist.Store], R]) -> R:
        return self._store.ask(max(self._end - time.monotonic(), _GRACE_S), question)

    def _present(self, keys: list[str]) -> bool:
        return self._ask(lambda store: store.check(keys))

    def _missing(self, keys: list[str]) -> list[int]:
        return [peer for peer, key in enumerate(keys) if not self._present([key])]

    def _decide(self, attempt: int, outcome: str) -> str:
        """The outcome of ``attempt``: this one, unless another rank was first."""
        return self._ask(lambda store: store.compare_set(self._outcome_key(attempt), "", outcome)).decode()

    def _open_next(self, attempt: int) -> int:
        """Number of the open attempt, once ``attempt`` is decided."""
        return int(self._ask(lambda store: store.compare_set("open", str(attempt), str(attempt + 1))))

    def _keys(self, attempt: int, phase: str) -> list[str]:
        return [f"{attempt}/{phase}/{peer}" for peer in range(self._num_ranks)]

    @staticmethod
    def _outcome_key(attempt: int) -> str:
        return f"{attempt}/outcome"
