"""Low-latency operations in flight: what may be sent and received when. The same for all transports."""

from __future__ import annotations

import dataclasses
import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from .errors import HookError, InvalidArgumentError
from .low_latency import LowLatencyHandle, LowLatencyStats
from .low_latency_transport import LowLatencyTransport

if TYPE_CHECKING:
    from .communicator import Communicator
    from .transport import BufferGeometry, Transport

MAX_IN_FLIGHT = 2
"""Operations that may be sent and not yet received: two micro-batches."""


@dataclasses.dataclass(eq=False, kw_only=True)
class Flight:
    """One operation from its send to its receive."""

    rank: int
    operation: str
    number: int
    receive: Callable[[], Any] | None = None
    plan: Any = None
    over: str = ""
    """Why it cannot be received (again)."""

    def __str__(self) -> str:
        return f"{self.operation} #{self.number}"


class LowLatency:
    """Operations in flight on one transport, and the statistics of the buffer. Making one is collective."""

    def __init__(self, comm: Communicator, geometry: BufferGeometry, normal: Transport) -> None:
        self.transport: LowLatencyTransport = comm.make_low_latency(geometry, normal)
        self.rank, self.num_ranks = comm.rank, comm.num_ranks
        self.num_local_experts = geometry.num_experts // comm.num_ranks
        self.device = self.transport.device
        self.stats = LowLatencyStats(
            num_tokens_per_expert=torch.zeros(self.num_local_experts, dtype=torch.int64, device=self.device),
            wait_ns=torch.zeros(comm.num_ranks, dtype=torch.int64, device=self.device),
        )
        self._lock = threading.RLock()
        self._flying: deque[Flight] = deque()
        self._number = 0

    def send(self, operation: str, send: Callable[[], Any], receive: Callable[[Any], Any], *, hook: bool) -> Flight:
        """Send; and receive, unless a hook will.

        Raises:
            HookError: an earlier operation has to be received first. Nothing was sent.
        """
        with self._lock:
            self._check_room(operation, hook=hook)
            call = send()
            self._number += 1
            flight = Flight(rank=self.rank, operation=operation, number=self._number, receive=lambda: receive(call))
            self._flying.append(flight)
            if not hook:
                self.receive(flight)
            return flight

    def receive(self, flight: Flight) -> None:
        """What a hook does."""
        with self._lock:
            name = f"the hook of {flight}"
            if flight.over:
                raise HookError(name, "", flight.over)
            first = self._flying[0]
            if first is not flight:
                raise HookError(name, f"the hook of {first}", f"{first} was sent before")
            self._flying.popleft()
            receive, flight.receive, flight.over = flight.receive, None, "it had failed"
            flight.plan = receive()
            flight.over = "it was called before"

    def plan_of(self, handle: LowLatencyHandle) -> Any:
        """The plan of a dispatch that was received."""
        flight = handle.flight
        if not flight.over:
            raise HookError("low_latency_combine", f"the hook of {flight}", f"{flight} was not received yet")
        if flight.plan is None:
            rule = "must come from a dispatch that was received"
            raise InvalidArgumentError("handle", f"{flight}, which failed", rule)
        return flight.plan

    def check(self) -> None:
        """As ``Buffer.check``."""
        self.transport.check()

    def rejoin(self, deadline_s: float) -> None:
        """Forget what is in flight, and take part again."""
        with self._lock:
            self.give_up("this rank rejoined since")
            self.transport.rejoin(deadline_s)

    def close(self) -> None:
        """Free this rank's room."""
        with self._lock:
            self.give_up("the buffer is closed")
            self.transport.close()

    def give_up(self, why: str) -> None:
        """Operations in flight cannot be received any more."""
        for flight in self._flying:
            flight.receive, flight.over = None, why
        self._flying.clear()

    def _check_room(self, operation: str, *, hook: bool) -> None:
        if not self._flying:
            return
        first = self._flying[0]
        if not hook:
            raise HookError(operation, f"the hook of {first}", "without return_recv_hook it receives at once")
        if len(self._flying) == MAX_IN_FLIGHT:
            reason = f"{' and '.join(map(str, self._flying))} are in flight, as many as can be"
            raise HookError(operation, f"the hook of {first}", reason)
