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
    """Turns the core's exceptions inside a ``with`` block into ray_deepep's; ``on_fault`` gets the record of a fault
    first. One object serves any number of blocks, also at the same time."""

    def __init__(self, domain: ShmDomain, on_fault: Callable[[FaultRecord], None]) -> None:
        self._core, self._peers, self._on_fault = domain.core, domain.peers, on_fault

    def record(self, fields: Mapping[str, Any] | None) -> FaultRecord | None:
        """A core's record with the peer's process and GPU."""
        if fields is None:
            return None
        peer = self._peers[fields["peer"]]
        return FaultRecord(**fields, peer_host=peer.host, peer_pid=peer.pid, peer_gpu=peer.gpu)

    def __enter__(self) -> None:
        return None

    def __exit__(self, error_type: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if error is None:
            return
        core = self._core
        if isinstance(error, core.CoreFault):
            record = self.record(error.args[0])
            self._on_fault(record)
            raise CommFaultError(record) from None
        if isinstance(error, core.CoreMasked):
            raise RankMaskedError(*error.args) from None
        if isinstance(error, core.CoreMismatch):
            raise MismatchError(*error.args) from None
        if isinstance(error, core.CoreBootstrapError):
            raise BootstrapError(*error.args) from None
        if isinstance(error, core.CoreArgumentError):
            raise InvalidArgumentError(*error.args) from None
