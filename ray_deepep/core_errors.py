"""The compiled cores' exceptions as public ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .errors import BootstrapError, CommFaultError, FaultRecord, InvalidArgumentError, MismatchError

if TYPE_CHECKING:
    from .shm import ShmDomain


@contextmanager
def public_errors(domain: ShmDomain, on_fault: Callable[[FaultRecord], None]) -> Iterator[None]:
    """Turn the core's exceptions inside a block into ray_deepep's; ``on_fault`` gets the record of a fault first."""
    core = domain.core
    try:
        yield
    except core.CoreFault as error:
        fields = dict(error.args[0])
        peer = domain.peers[fields["peer"]]
        record = FaultRecord(**fields, peer_host=peer.host, peer_pid=peer.pid, peer_gpu=peer.gpu)
        on_fault(record)
        raise CommFaultError(record) from None
    except core.CoreMismatch as error:
        raise MismatchError(*error.args) from None
    except core.CoreBootstrapError as error:
        raise BootstrapError(*error.args) from None
    except core.CoreArgumentError as error:
        raise InvalidArgumentError(*error.args) from None
