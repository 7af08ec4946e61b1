"""``FaultBoard``: ranks of several nodes tell each other who is to blame.

Inside a node the core finds the culprit, for ranks see whom their peers wait for. Between nodes they do not: a rank
that waits for another one's node may wait for a victim. So whoever fails writes it here, in the key-value store behind
torch.distributed, and whoever is late shows for whom it waits. Nobody looks here while all goes well.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch.distributed as dist

from .bounded_store import BoundedStore, StoreLostError
from .errors import FaultRecord

if TYPE_CHECKING:
    from .rank_info import RankInfo

R = TypeVar("R")

_ANSWER_S = 0.3
"""Time for the store to answer."""


class FaultBoard:
    """One per communicator; ``token`` is the same on its ranks, and new. Where the store is gone, nothing is found."""

    def __init__(self, token: str, rank: int, peers: Sequence[RankInfo]) -> None:
        self._rank, self._peers = rank, peers
        self._store = BoundedStore(f"ray_deepep/faults/{token}")

    def settle(self, record: FaultRecord) -> FaultRecord:
        """Make a fault known; the record to raise. It blames whom the first fault of all ranks blames."""
        if record.cause == "timeout" and record.peer >= 0:
            peer = self._peers[self._follow_waits(record.peer)]
            record = dataclasses.replace(
                record, peer=peer.rank, peer_host=peer.host, peer_pid=peer.pid, peer_gpu=peer.gpu
            )
        told = self._ask(lambda store: store.compare_set("fault", "", record.to_json()))
        return record if told is None else blaming(record, FaultRecord.from_json(told.decode()))

    def found(self) -> FaultRecord | None:
        """The first fault of all ranks."""
        told = self._ask(lambda store: store.get("fault") if store.check(["fault"]) else None)
        return None if told is None else FaultRecord.from_json(told.decode())

    def wait_found(self, seconds: float) -> None:
        """Give other ranks this time to make a fault known."""
        end = time.monotonic() + seconds
        while self.found() is None and time.monotonic() < end:
            time.sleep(0.02)

    def show_wait(self, peer: int) -> None:
        """This rank waits for ``peer``."""
        self._ask(lambda store: store.set(f"wait/{self._rank}", str(peer)))

    def hide_wait(self) -> None:
        """It waits no more."""
        self._ask(lambda store: store.delete_key(f"wait/{self._rank}"))

    def _follow_waits(self, peer: int) -> int:
        """``peer``, or whom it waits for, to the end of the chain."""
        seen = {self._rank}
        while peer not in seen:
            seen.add(peer)
            key = f"wait/{peer}"
            told = self._ask(lambda store, key=key: store.get(key) if store.check([key]) else None)
            if told is None or int(told) in seen:
                return peer
            peer = int(told)
        return peer

    def _ask(self, question: Callable[[dist.Store], R]) -> R | None:
        try:
            return self._store.ask(_ANSWER_S, question)
        except StoreLostError:
            return None


def blaming(record: FaultRecord, cause: FaultRecord) -> FaultRecord:
    """``record`` with the rank that ``cause`` blames, and for its reason."""
    return dataclasses.replace(
        record,
        peer=cause.peer,
        cause=cause.cause,
        peer_host=cause.peer_host,
        peer_pid=cause.peer_pid,
        peer_gpu=cause.peer_gpu,
    )
