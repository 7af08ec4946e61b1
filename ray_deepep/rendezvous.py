"""Exchange functions for bootstrap: all-gather of short byte strings with a deadline that names who is missing."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable

import torch.distributed as dist
from torch.distributed import distributed_c10d

from .errors import BootstrapError

_MET = "met"


def store_exchange(
    group: dist.ProcessGroup, rank: int, num_ranks: int, deadline_s: float
) -> Callable[[str, bytes], list[bytes]]:
    """Exchange through the key-value store behind a torch process group.

    A store has what a collective lacks: per-key waits with a deadline, so a missing rank can be named, and it works
    alike for gloo and NCCL. Ranks may bootstrap one group many times, also after attempts that failed.
    """
    ranks = "-".join(map(str, dist.get_process_group_ranks(group)))
    # The default store, not the group's own: destroying and re-making a group must not meet stale keys either.
    store = dist.PrefixStore(f"ray_deepep/{ranks}", distributed_c10d._get_default_store())
    return _StoreExchange(store, rank, num_ranks, deadline_s)


class _StoreExchange:
    """One attempt to bring ranks together.

    Keys carry the number of the attempt, which ranks agree on in the first exchange: each joins the attempt that is
    open, and its outcome is decided once, by an atomic compare-and-set. Whoever sees that all have come says "met";
    whoever waited too long says who is missing, and then the attempt fails on every rank in it. Either opens the next
    attempt. So a rank that comes late, or calls again, never reads what ranks left in an attempt that is over.
    """

    def __init__(self, store: dist.Store, rank: int, num_ranks: int, deadline_s: float) -> None:
        self._store, self._rank, self._num_ranks, self._deadline_s = store, rank, num_ranks, deadline_s
        self._attempt: int | None = None

    def __call__(self, phase: str, payload: bytes) -> list[bytes]:
        try:
            return self._exchange(phase, payload)
        except dist.DistNetworkError as error:
            # Most often rank 0's; torch does not say whose it is.
            detail = f"the process that hosts torch's store is gone: {error}"
            raise BootstrapError(phase, [], self._deadline_s, detail) from None

    def _exchange(self, phase: str, payload: bytes) -> list[bytes]:
        if self._attempt is None:
            self._attempt = self._join(phase, payload)
        else:
            self._store.set(self._keys(self._attempt, phase)[self._rank], payload)
            self._wait_for_all(phase)
        return [self._store.get(key) for key in self._keys(self._attempt, phase)]

    def _join(self, phase: str, payload: bytes) -> int:
        """Number of the attempt in which all ranks met."""
        attempt = int(self._store.compare_set("open", "", "0"))
        while self._store.check([self._outcome_key(attempt)]):
            attempt = self._open_next(attempt)
        keys = self._keys(attempt, phase)
        self._store.set(keys[self._rank], payload)
        try:
            # Whoever comes last sees all others, so one of them always says it.
            if self._store.check(keys):
                self._decide(attempt, _MET)
            self._wait([self._outcome_key(attempt)], self._deadline_s)
            outcome = self._store.get(self._outcome_key(attempt)).decode()
        except RuntimeError:
            missing = self._missing(keys)
            outcome = self._decide(attempt, json.dumps([phase, missing]) if missing else _MET)
        except BaseException:
            # Interrupted: this rank leaves, so the others must not count on it.
            self._decide(attempt, json.dumps([phase, [self._rank]]))
            raise
        self._open_next(attempt)
        if outcome != _MET:
            raise BootstrapError(*json.loads(outcome), self._deadline_s)
        return attempt

    def _wait_for_all(self, phase: str) -> None:
        end = time.monotonic() + self._deadline_s
        for key in (keys := self._keys(self._attempt, phase)):
            try:
                self._wait([key], max(end - time.monotonic(), 0.001))
            except RuntimeError:
                if missing := self._missing(keys):
                    raise BootstrapError(phase, missing, self._deadline_s) from None

    def _wait(self, keys: list[str], seconds: float) -> None:
        """Raises ``RuntimeError`` (``DistStoreError`` is one) when the time is over."""
        self._store.wait(keys, datetime.timedelta(seconds=seconds))

    def _missing(self, keys: list[str]) -> list[int]:
        return [peer for peer, key in enumerate(keys) if not self._store.check([key])]

    def _decide(self, attempt: int, outcome: str) -> str:
        """The outcome of ``attempt``: this one, unless another rank was first."""
        return self._store.compare_set(self._outcome_key(attempt), "", outcome).decode()

    def _open_next(self, attempt: int) -> int:
        """Number of the open attempt, once ``attempt`` is decided."""
        return int(self._store.compare_set("open", str(attempt), str(attempt + 1)))

    def _keys(self, attempt: int, phase: str) -> list[str]:
        return [f"{attempt}/{phase}/{peer}" for peer in range(self._num_ranks)]

    @staticmethod
    def _outcome_key(attempt: int) -> str:
        return f"{attempt}/outcome"
