"""Exchanges of the reference transport, each with a deadline and a name for whom it waited.

Ranks meet through a store, which can say *who* has not come (``store_meeting.py``); rows go through collectives of the
process group (gloo or NCCL), which cannot.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist

from .bounded_store import StoreLostError
from .store_meeting import Signature, StoreMeeting, check_signatures

if TYPE_CHECKING:
    from .communicator import Communicator

R = TypeVar("R")

# A failed collective says nothing about the culprit, so survivors sign a list and look who is not on it.
_ROLL_CALL_S = 0.5


class ReferenceGroup(StoreMeeting):
    """The ranks of one buffer. Making one is collective; raises as its base."""

    def __init__(self, comm: Communicator, settings: Signature) -> None:
        super().__init__(comm, settings)
        self._group, self._ranks = comm.group, range(comm.num_ranks)

    def begin(self, operation: str, signature: Signature, num_tokens: int) -> list[int]:
        """Start an operation: all ranks show what they ask for.

        Returns:
            ``num_tokens`` of every rank.

        Raises:
            MismatchError: on every rank, if signatures differ.
            CommFaultError: a rank did not come within the deadline, or closed.
        """
        mine = self._open(operation, signature)
        asked = self._meet("ask", self._ranks, {"signature": mine, "num_tokens": num_tokens})
        check_signatures(asked[0]["signature"]["operation"], [a["signature"] for a in asked])
        return [a["num_tokens"] for a in asked]

    def all_gather(self, value: torch.Tensor, lengths: Sequence[int]) -> list[torch.Tensor]:
        """``value`` (``lengths[rank]`` rows) of every rank; padded on the way, since collectives want equal shapes."""
        longest = max(lengths)
        if longest == 0:
            return [value] * len(lengths)
        padded = value.new_zeros(longest, *value.shape[1:])
        padded[: len(value)] = value
        gathered = [torch.empty_like(padded) for _ in lengths]
        self._collective("all_gather", lambda: dist.all_gather(gathered, padded, group=self._group, async_op=True))
        return [rows[:length] for rows, length in zip(gathered, lengths)]

    def all_to_all(self, value: torch.Tensor, num_send: Sequence[int], num_recv: Sequence[int]) -> torch.Tensor:
        """Rows of ``value`` (``num_send[r]`` for each rank r, one after the other) to their ranks."""
        # Bytes, because collectives know fewer dtypes than rows have.
        send = as_bytes(value)
        recv = send.new_empty(sum(num_recv), send.shape[1])
        if send.shape[1]:
            self._collective(
                "all_to_all",
                lambda: dist.all_to_all_single(
                    recv, send, list(num_recv), list(num_send), group=self._group, async_op=True
                ),
            )
        return from_bytes(recv, value.dtype)

    def _collective(self, phase: str, start_collective: Callable[[], dist.Work]) -> None:
        start = time.monotonic()
        try:
            start_collective().wait(datetime.timedelta(seconds=self._deadline_s))
        except RuntimeError as error:
            cause = "timeout" if "timed out" in str(error).lower() else "peer_died"
            self._fail(phase, cause, self._roll_call(start + self._deadline_s + _ROLL_CALL_S), time.monotonic() - start)

    def _roll_call(self, end: float) -> int:
        """The rank that does not report the failed collective, -1 if all do; if the store is lost, the rank that hosts
        it.

        Ranks may notice at different times (at once where the connection broke, else at their deadline), so wait for
        all but one.
        """
        others = [p for p in self._ranks if p != self._comm.rank]

        def ask(question: Callable[[dist.Store], R]) -> R:
            return self._store.ask(max(end - time.monotonic(), 0.1), question)

        try:
            ask(lambda store: store.set(self._key("failed", self._comm.rank), b"1"))
            while True:
                silent = ask(lambda store: [p for p in others if not store.check([self._key("failed", p)])])
                if len(silent) <= 1 or time.monotonic() > end:
                    return silent[0] if silent else -1
                time.sleep(0.02)
        except StoreLostError:
            return self._store_host


def as_bytes(value: torch.Tensor) -> torch.Tensor:
    """``[rows, ...]`` of any dtype as ``[rows, bytes]`` uint8: torch moves few things in float8 otherwise."""
    # A dimension of size 1 may have any stride in a contiguous tensor, but not in one that is viewed as bytes.
    value = value.contiguous() if value.stride(-1) == 1 else value.clone(memory_format=torch.contiguous_format)
    return value.view(torch.uint8).flatten(1)


def from_bytes(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Inverse of :func:`as_bytes` for two-dimensional rows."""
    return value.view(dtype)
