"""The compiled cores' exceptions as public ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from .errors import (
    BootstrapError,
    CommFaultError,
    FaultRecord,
    InvalidArgumentError,
    MismatchError,
    RankMaskedError,
)

if TYPE_CHECKING:
    from .shm import ShmDomain


class PublicErrors:
    """Turns the core's exceptions inside a ``with`` block into ray_deepep's. One object serves any number of blocks,
    also at the same time. The core counts the ranks of its domain; errors name them as the communicator does.

    ``on_fault`` gets the record of a fault first, and returns the one to raise.
    """

    def __init__(self, domain: ShmDomain, on_fault: Callable[[FaultRecord], FaultRecord]) -> None:
        self._core, self._domain, self._peers, self._on_fault = domain.core, domain, domain.peers, on_fault

    def record(self, fields: Mapping[str, Any] | None) -> FaultRecord | None:
        """A core's record with the peer's process and GPU."""
        if fields is None:
            return None
        # Waits between nodes are for a node, whose rank is the one of the same local rank.
        peers = self._domain.hop_peers if fields["phase"] == "wait_hop" else self._peers
        peer, rank = peers[fields["peer"]], self._name(fields["rank"])
        found = {**fields, "rank": rank, "peer": peer.rank}
        return FaultRecord(**found, peer_host=peer.host, peer_pid=peer.pid, peer_gpu=peer.gpu)

    def _name(self, rank: int) -> int:
        return self._peers[rank].rank

    def __enter__(self) -> None:
        return None

    def __exit__(self, error_type: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if error is None:
            return
        core = self._core
        if isinstance(error, core.CoreFault):
            raise CommFaultError(self._on_fault(self.record(error.args[0]))) from None
        if isinstance(error, core.CoreMasked):
            operation, by = error.args
            raise RankMaskedError(operation, [self._name(rank) for rank in by]) from None
        if isinstance(error, core.CoreMismatch):
            operation, peer, *what, first = error.args
            raise MismatchError(operation, self._name(peer), *what, self._name(first)) from None
        if isinstance(error, core.CoreBootstrapError):
            phase, missing, *more = error.args
            raise BootstrapError(phase, [self._name(rank) for rank in missing], *more) from None
        if isinstance(error, core.CoreArgumentError):
            raise InvalidArgumentError(*error.args) from None
