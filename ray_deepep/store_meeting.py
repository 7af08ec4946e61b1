"""Meetings of ranks before an operation, through the key-value store behind torch.distributed.

Every rank shows what it asks for. A store, unlike a collective, can say *who* has not come.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import torch.distributed as dist

from . import rendezvous
from .bounded_store import BoundedStore, StoreLostError, hosts_default_store
from .errors import CommFaultError, FaultRecord, MismatchError

if TYPE_CHECKING:
    from .communicator import Communicator

R = TypeVar("R")

# Only then it is worth asking who is missing and whether they have closed.
_LATE_S = 0.2
# For the store to answer after the deadline, and for a rank that leaves to say so.
_GRACE_S = 0.3

Signature = dict[str, object]
"""What a rank asks for: JSON values by field name; all fields must agree between ranks."""


def check_signatures(operation: str, signatures: Sequence[Signature], ranks: Sequence[int] | None = None) -> None:
    """Raise ``MismatchError`` for the first field of the first rank that differs from the first one's.

    ``ranks`` are those that the signatures are of; all if None.
    """
    ranks = range(len(signatures)) if ranks is None else ranks
    for peer, signature in zip(ranks, signatures):
        for field, expected in signatures[0].items():
            if signature.get(field) != expected:
                raise MismatchError(operation, peer, field, str(expected), str(signature.get(field)), ranks[0])


class StoreMeeting:
    """What the ranks of one buffer need to meet. Making one is collective over all ranks of ``comm``.

    Raises:
        BootstrapError: naming the ranks that did not come within ``comm.config.bootstrap_deadline_s``.
        MismatchError: ranks passed different ``settings``.
    """

    def __init__(self, comm: Communicator, settings: Signature) -> None:
        self._comm, self._deadline_s = comm, comm.config.deadline_s
        self.sequence = 0
        self._operation, self._start = "allocate", time.monotonic()
        exchange = rendezvous.store_exchange(comm.group, comm.rank, comm.num_ranks, comm.config.bootstrap_deadline_s)
        payload = {"settings": settings, "token": secrets.token_hex(8), "hosts_store": hosts_default_store()}
        replies = [json.loads(reply) for reply in exchange("allocate", json.dumps(payload).encode())]
        check_signatures("allocate", [reply["settings"] for reply in replies])
        self._store = BoundedStore(f"ray_deepep/reference/{replies[0]['token']}")
        # -1: a process outside the group, such as a launcher.
        self._store_host = next((rank for rank, reply in enumerate(replies) if reply["hosts_store"]), -1)

    def close(self) -> None:
        """Tell peers that still wait; does not wait for them."""
        # If the store's host is gone already, nobody is left to be told.
        with contextlib.suppress(StoreLostError):
            self._store.ask(_GRACE_S, lambda store: store.set(f"closed/{self._comm.rank}", b"1"))

    def _key(self, kind: str, peer: int, step: int = 0) -> str:
        return f"{kind}/{self.sequence + step}/{peer}"

    def _open(self, operation: str, signature: Signature) -> Signature:
        """Count an operation; what this rank asks for."""
        self._comm.check_usable(operation)
        self.sequence += 1
        self._operation, self._start = operation, time.monotonic()
        return {"operation": operation, **signature}

    def _meet(self, kind: str, ranks: Sequence[int], payload: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Show ``payload`` to ``ranks``, this one among them. Returns theirs."""
        own, text = self._comm.rank, json.dumps(payload)
        self._store_call("publish", lambda store: store.set(self._key(kind, own), text))
        self._wait_all_published(kind, ranks)
        keys = [self._key(kind, peer) for peer in ranks]
        told = [json.loads(value) for value in self._store_call("publish", lambda store: store.multi_get(keys))]
        # All ranks came here, so all have read the operation before this one.
        self._store_call("publish", lambda store: store.delete_key(self._key(kind, own, -1)))
        return told

    def _wait_all_published(self, kind: str, ranks: Sequence[int]) -> None:
        keys = [self._key(kind, peer) for peer in ranks]
        # Polls instead of Store.wait, which holds the client's lock while it blocks and logs every expiry.
        while not self._present(keys):
            elapsed_s = time.monotonic() - self._start
            if elapsed_s > _LATE_S:
                self._judge_late(kind, ranks, elapsed_s)
            time.sleep(min(0.0001 + elapsed_s / 20, 0.02))

    def _judge_late(self, kind: str, ranks: Sequence[int], elapsed_s: float) -> None:
        missing = [p for p in ranks if not self._present([self._key(kind, p)])]
        for peer in missing:
            # Asked again after: a peer may finish this very operation and close between the two questions.
            if self._present([f"closed/{peer}"]) and not self._present([self._key(kind, peer)]):
                self._fail("wait_published", "peer_closed", peer, elapsed_s)
        if missing and elapsed_s >= self._deadline_s:
            self._fail("wait_published", "timeout", missing[0], elapsed_s)

    def _present(self, keys: list[str]) -> bool:
        return self._store_call("wait_published", lambda store: store.check(keys))

    def _store_call(self, phase: str, question: Callable[[dist.Store], R]) -> R:
        left_s = self._start + self._deadline_s - time.monotonic()
        try:
            return self._store.ask(max(left_s, _GRACE_S), question)
        except StoreLostError as error:
            cause = "timeout" if error.silent else "peer_died"
            self._fail(phase, cause, self._store_host, time.monotonic() - self._start)

    def _fail(self, phase: str, cause: str, peer: int, elapsed_s: float) -> NoReturn:
        info = self._comm.peers[peer] if peer >= 0 else None
        record = FaultRecord(
            operation=self._operation,
            sequence=self.sequence,
            phase=phase,
            cause=cause,
            rank=self._comm.rank,
            peer=peer,
            expected=self.sequence,
            seen=self.sequence - (phase == "wait_published"),
            elapsed_s=elapsed_s,
            deadline_s=self._deadline_s,
            peer_host=info.host if info else "",
            peer_pid=info.pid if info else 0,
        )
        raise CommFaultError(self._comm.mark_fault(record))
