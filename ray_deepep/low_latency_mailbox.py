"""Messages between ranks through a key-value store: sent now, read later, with ranks that may be left out.

The protocol is that of ``csrc/host/low_latency.h``: an operation's messages stay until the fourth after it is sent.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn, TypeVar

import torch
import torch.distributed as dist

from . import rendezvous
from .bounded_store import BoundedStore, StoreLostError, hosts_default_store
from .errors import BootstrapError, CommFaultError, FaultRecord, RankMaskedError
from .reference_group import Signature, check_signatures

if TYPE_CHECKING:
    from .communicator import Communicator

NUM_AREAS = 4
_CHUNK_BYTES = 4 << 20
"""The store refuses values of 8 MiB."""
_LATE_S = 0.2
_POLL_S = 0.01
_GRACE_S = 0.3
"""For the store to answer after the deadline, and for a rank that leaves to say so."""

R = TypeVar("R")

Message = Sequence[torch.Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arrivals:
    """What one operation brought; lists are by rank."""

    absent: list[bool]
    messages: list[list[torch.Tensor] | None]
    """None where the rank was absent. CPU tensors."""
    wait_ns: list[int]


class Mailbox:
    """One rank's end. Making one is collective.

    Raises:
        BootstrapError: naming the ranks that did not come.
    """

    def __init__(self, comm: Communicator) -> None:
        self._comm, self._rank, self._num_ranks = comm, comm.rank, comm.num_ranks
        self.masked: set[int] = set()
        self._sequence, self._operation = 0, "allocate"
        self._admitted = {peer: (0, 0) for peer in range(comm.num_ranks)}
        """By peer: how often this rank let it in again, and the last operation before."""
        self._admissions = [0] * comm.num_ranks
        self._rejoining = False
        self._kept: deque[list[str]] = deque()
        # ``mask`` may be called by another thread than the one that waits.
        self._view_lock = threading.Lock()
        exchange = rendezvous.store_exchange(comm.group, comm.rank, comm.num_ranks, comm.config.bootstrap_deadline_s)
        offer = json.dumps([secrets.token_hex(8), hosts_default_store()]).encode()
        tokens, hosting = zip(*(json.loads(reply) for reply in exchange("allocate", offer)))
        self._store = BoundedStore(f"ray_deepep/low_latency/{tokens[0]}")
        # -1: a process outside the group, such as a launcher.
        self._store_host = hosting.index(True) if True in hosting else -1
        self._begin(comm.config.deadline_s)
        self._call(lambda store: store.set(f"last/{self._rank}", "0"))
        self._show()
        exchange("ready", b"ready")

    def send(self, operation: str, signature: Signature, messages: Sequence[Message]) -> tuple[int, frozenset[int]]:
        """Leave a message for every rank. Never waits for one. Returns the sequence number, and who is masked."""
        self._operation = operation
        self._begin(self._comm.config.deadline_s)
        self._refuse_if_masked()
        self._sequence += 1
        keys = []
        for peer, message in enumerate(messages):
            data = _pack(message)
            num_chunks = math.ceil(len(data) / _CHUNK_BYTES)
            for i in range(num_chunks):
                keys.append(f"{self._sequence}/{self._rank}/{peer}/{i}")
                chunk = data[i * _CHUNK_BYTES : (i + 1) * _CHUNK_BYTES]
                self._call(lambda store, key=keys[-1], value=chunk: store.set(key, value))
        header = {"signature": {"operation": operation, **signature}, "masked": sorted(self.masked)}
        keys.append(f"{self._sequence}/{self._rank}/header")
        self._call(lambda store: store.set(keys[-1], json.dumps(header)))
        self._call(lambda store: store.set(f"last/{self._rank}", str(self._sequence)))
        self._kept.append(keys)
        if len(self._kept) > NUM_AREAS:
            for key in self._kept.popleft():
                self._call(lambda store, key=key: store.delete_key(key))
        return self._sequence, frozenset(self.masked)

    def receive(
        self, operation: str, sequence: int, masked: frozenset[int], timeout_s: float, *, on_timeout: str
    ) -> Arrivals:
        """Wait for all ranks that take part, and read what they left.

        Raises:
            RankMaskedError: a peer took no notice of this rank.
            MismatchError: ranks asked for different things.
            CommFaultError: a rank did not come, and ``on_timeout`` is not ``mask``.
        """
        self._operation, start, absent = operation, time.monotonic(), set(masked)
        wait_ns = [0] * self._num_ranks
        self._begin(timeout_s)
        for peer in range(self._num_ranks):
            if peer in absent or not (waited_s := self._wait_for(peer, sequence, start, timeout_s, on_timeout)):
                continue
            wait_ns[peer] = int(waited_s * 1e9)
        absent |= self.masked
        present = [peer for peer in range(self._num_ranks) if peer not in absent]
        headers = [json.loads(self._read(f"{sequence}/{peer}/header", [peer])) for peer in present]
        ignored = [peer for peer, header in zip(present, headers) if self._rank in header["masked"]]
        if ignored:
            raise RankMaskedError(self._operation, ignored)
        signatures = [header["signature"] for header in headers]
        check_signatures(signatures[0]["operation"], signatures, present)
        messages: list[list[torch.Tensor] | None] = [None] * self._num_ranks
        for peer in present:
            messages[peer] = self._message(f"{sequence}/{peer}/{self._rank}", peer)
        return Arrivals(absent=[p in absent for p in range(self._num_ranks)], messages=messages, wait_ns=wait_ns)

    def mask(self, rank: int, masked: bool) -> None:
        """Leave a rank out, or let it in again from the next operation on."""
        with self._view_lock:
            self._begin(self._comm.config.deadline_s)
            if masked:
                self.masked = self.masked | {rank}
            else:
                self.masked = self.masked - {rank}
                self._admitted[rank] = (self._admitted[rank][0] + 1, self._sequence)
            self._show()

    def returning(self) -> tuple[int, ...]:
        """Masked ranks that want to take part again."""
        self._begin(self._comm.config.deadline_s)
        return tuple(peer for peer in sorted(self.masked) if self._view(peer)["rejoining"])

    def rejoin(self, deadline_s: float) -> None:
        """Wait until all others let this rank in, before the same operation."""
        end = time.monotonic() + deadline_s
        self._begin(deadline_s)
        others = [p for p in range(self._num_ranks) if p != self._rank and p not in self.masked]
        self._set_rejoining(True)
        try:
            while True:
                admitted = {peer: self._view(peer)["admitted"][str(self._rank)] for peer in others}
                fresh = {peer: at for peer, (times, at) in admitted.items() if times > self._admissions[peer]}
                first = next(iter(fresh.values()), self._sequence)
                waiting = [peer for peer in others if fresh.get(peer) != first]
                if not waiting:
                    break
                if time.monotonic() > end:
                    raise BootstrapError("rejoin", waiting, deadline_s)
                time.sleep(_POLL_S)
        finally:
            self._set_rejoining(False)
        for peer, (times, _) in admitted.items():
            self._admissions[peer] = times
        self._sequence = first
        self._call(lambda store: store.set(f"last/{self._rank}", str(first)))

    def close(self) -> None:
        """Tell peers that still wait; does not wait for them."""
        # If the store's host is gone already, nobody is left to be told.
        with contextlib.suppress(StoreLostError):
            self._store.ask(_GRACE_S, lambda store: store.set(f"closed/{self._rank}", b"1"))

    def _wait_for(self, peer: int, sequence: int, start: float, timeout_s: float, on_timeout: str) -> float:
        """Seconds waited for ``peer``, 0 if it had sent before. Masks it where that is asked for."""
        waited_s = 0.0
        while peer not in self.masked and self._last(peer) < sequence:
            waited_s = time.monotonic() - start
            lost = ""
            if waited_s >= timeout_s:
                lost = "timeout"
            elif waited_s > _LATE_S and self._call(lambda store: store.check([f"closed/{peer}"])):
                # Asked again after: it may have sent and closed between the two questions.
                lost = "" if self._last(peer) >= sequence else "peer_closed"
            elif waited_s > _LATE_S and on_timeout == "mask" and self._masked_by_others(peer):
                lost = "timeout"
            if lost and on_timeout == "mask":
                self.mask(peer, True)
                break
            if lost:
                self._fail(lost, peer, sequence, waited_s, timeout_s)
            time.sleep(min(0.0001 + waited_s / 20, 0.02))
        return waited_s

    def _masked_by_others(self, peer: int) -> bool:
        others = (p for p in range(self._num_ranks) if p not in (peer, self._rank) and p not in self.masked)
        return any(peer in self._view(other)["masked"] for other in others)

    def _refuse_if_masked(self) -> None:
        """Raise if a peer masked this rank, or is too far ahead to have waited for it. Only before a send: an operation
        that came whole is good, also if a peer masked this rank since."""
        others = [p for p in range(self._num_ranks) if p != self._rank and p not in self.masked]
        by = [
            peer
            for peer in others
            if self._rank in self._view(peer)["masked"] or self._last(peer) > self._sequence + NUM_AREAS
        ]
        if by:
            raise RankMaskedError(self._operation, by)

    def _message(self, prefix: str, peer: int) -> list[torch.Tensor]:
        data = self._read(f"{prefix}/0", [peer])
        (num_bytes,) = torch.frombuffer(bytearray(data[:8]), dtype=torch.int64).tolist()
        for i in range(1, math.ceil(num_bytes / _CHUNK_BYTES)):
            data += self._read(f"{prefix}/{i}", [peer])
        return _unpack(data)

    def _read(self, key: str, by: list[int]) -> bytes:
        """A value that was there a moment ago; gone if its sender went on without this rank."""
        if not self._call(lambda store: store.check([key])):
            raise RankMaskedError(self._operation, by)
        return self._call(lambda store: store.get(key))

    def _last(self, peer: int) -> int:
        return int(self._call(lambda store: store.get(f"last/{peer}")))

    def _view(self, peer: int) -> dict:
        return json.loads(self._call(lambda store: store.get(f"view/{peer}")))

    def _set_rejoining(self, rejoining: bool) -> None:
        with self._view_lock:
            self._rejoining = rejoining
            self._show()

    def _show(self) -> None:
        view = {"masked": sorted(self.masked), "admitted": self._admitted, "rejoining": self._rejoining}
        self._call(lambda store: store.set(f"view/{self._rank}", json.dumps(view)))

    def _begin(self, deadline_s: float) -> None:
        """From now on the store has so long to answer, all questions together."""
        self._started, self._deadline_s = time.monotonic(), deadline_s

    def _call(self, question: Callable[[dist.Store], R]) -> R:
        left_s = self._started + self._deadline_s - time.monotonic()
        try:
            return self._store.ask(max(left_s, _GRACE_S), question)
        except StoreLostError as error:
            cause = "timeout" if error.silent else "peer_died"
            elapsed_s = time.monotonic() - self._started
            self._fail(cause, self._store_host, self._sequence, elapsed_s, self._deadline_s, seen=0)

    def _fail(
        self, cause: str, peer: int, sequence: int, elapsed_s: float, deadline_s: float, seen: int | None = None
    ) -> NoReturn:
        info = self._comm.peers[peer] if peer >= 0 else None
        record = FaultRecord(
            operation=self._operation,
            sequence=sequence,
            phase="wait_published",
            cause=cause,
            rank=self._rank,
            peer=peer,
            expected=sequence,
            seen=self._last(peer) if seen is None else seen,
            elapsed_s=elapsed_s,
            deadline_s=deadline_s,
            peer_host=info.host if info else "",
            peer_pid=info.pid if info else 0,
        )
        raise CommFaultError(self._comm.mark_fault(record))


def _pack(message: Message) -> bytes:
    """Tensors as bytes: the length of all, that of a JSON header, the header, the data."""
    parts = [part.detach().cpu().contiguous() for part in message]
    header = json.dumps([[str(part.dtype).removeprefix("torch."), list(part.shape)] for part in parts]).encode()
    data = b"".join(part.view(torch.uint8).numpy().tobytes() if part.numel() else b"" for part in parts)
    sizes = torch.tensor([16 + len(header) + len(data), len(header)])
    return sizes.numpy().tobytes() + header + data


def _unpack(data: bytes) -> list[torch.Tensor]:
    """Inverse of :func:`_pack`."""
    _, header_bytes = torch.frombuffer(bytearray(data[:16]), dtype=torch.int64).tolist()
    at, parts = 16 + header_bytes, []
    for name, shape in json.loads(data[16:at]):
        part = torch.empty(shape, dtype=getattr(torch, name))
        if part.numel():
            num_bytes = part.numel() * part.element_size()
            part.view(-1).view(torch.uint8).copy_(
                torch.frombuffer(bytearray(data[at : at + num_bytes]), dtype=torch.uint8)
            )
            at += num_bytes
        parts.append(part)
    return parts
