"""What a transport with low-latency calls must do, beside :class:`~ray_deepep.transport.Transport`.

Sending and receiving are apart. The caller (``low_latency_buffer.py``) has checked the requests, allocated the outputs,
and sees to the order: receives come in the order of the sends, and no more than two are outstanding.
"""

from __future__ import annotations

import dataclasses
import threading
from typing import TYPE_CHECKING, Any, Protocol

import torch

from .errors import FaultRecord
from .float8 import Float8Cast
from .low_latency import LowLatencyLayout, LowLatencyStats

if TYPE_CHECKING:
    from .core_errors import PublicErrors
    from .symm_pool import SymmPool


@dataclasses.dataclass(kw_only=True, slots=True)
class LowLatencyWait:
    """How a receive waits."""

    timeout_s: float
    on_timeout: str
    """``raise``: a rank that does not come is a fault. ``mask``: it is masked, and the others go on."""
    stats: LowLatencyStats


@dataclasses.dataclass(kw_only=True, slots=True)
class LowLatencyDispatchRequest:
    """A dispatch; shapes as for ``Buffer.low_latency_dispatch``."""

    x: torch.Tensor
    x_scales: torch.Tensor | None
    topk_idx: torch.Tensor
    """int64 or int32."""
    topk_weights: torch.Tensor | None
    """None: all ones."""
    layout: LowLatencyLayout
    max_recv_tokens: int | None
    """Rows of a compact output; always given with it."""
    cast: Float8Cast | None
    reuses_input: bool
    """The caller may overwrite ``x`` and the others as soon as they are sent."""
    num_sms: int | None


@dataclasses.dataclass(kw_only=True, slots=True)
class LowLatencyDispatchOutputs:
    """Tensors that a receive fills; shapes as in ``LowLatencyDispatchResult`` and ``LowLatencyHandle``."""

    x: torch.Tensor
    x_scales: torch.Tensor | None
    counts: torch.Tensor
    range_begin: torch.Tensor
    range_count: torch.Tensor
    expert_offsets: torch.Tensor
    needed: torch.Tensor
    absent: torch.Tensor


@dataclasses.dataclass(kw_only=True, slots=True)
class LowLatencyCombineRequest:
    """A combine of rows laid out by the dispatch that made ``plan``."""

    rows: torch.Tensor
    plan: Any
    topk_weights: torch.Tensor | None
    """Only with ``exact``; None: those of the dispatch."""
    zero_copy: bool
    """With ``exact``: peers read ``rows`` where they are; ``reuses_input`` is not about them then."""
    reduce: str
    """``fast``: a rank adds up its experts' rows of a token (float32, k order, rounded once) and sends one row; the
    source adds these by rank. ``exact``: every route's row comes, and the source adds them in k order, in float32."""
    reuses_input: bool
    """The caller may overwrite ``rows`` and ``topk_weights`` as soon as they are sent."""
    num_sms: int | None


@dataclasses.dataclass(kw_only=True, slots=True)
class LowLatencyCombineOutputs:
    """Tensors that a receive fills."""

    x: torch.Tensor
    absent: torch.Tensor


class LowLatencyTransport(Protocol):
    """Sends return something that the receive is given; a dispatch's receive returns its plan."""

    device: torch.device | None
    """Where all tensors must be; None: anywhere."""

    heap_bytes: int
    """That this rank set aside and its peers read."""

    def send_dispatch(self, request: LowLatencyDispatchRequest) -> Any: ...

    def receive_dispatch(
        self, call: Any, request: LowLatencyDispatchRequest, out: LowLatencyDispatchOutputs, wait: LowLatencyWait
    ) -> Any: ...

    def send_combine(self, request: LowLatencyCombineRequest) -> Any: ...

    def receive_combine(
        self, call: Any, request: LowLatencyCombineRequest, out: LowLatencyCombineOutputs, wait: LowLatencyWait
    ) -> None: ...

    def in_heap(self, rows: torch.Tensor) -> bool:
        """Whether peers can read ``rows`` where they are, or need not because rows are sent as messages."""

    def empty(self, *shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Memory of an output, not initialised."""

    def mask(self, rank: int, masked: bool) -> None: ...

    def masked(self) -> tuple[int, ...]: ...

    def returning(self) -> tuple[int, ...]:
        """Masked ranks that wait in ``rejoin``."""

    def rejoin(self, deadline_s: float) -> None: ...

    def check(self) -> None:
        """As :meth:`~ray_deepep.transport.Transport.check`."""

    def fault_record(self) -> FaultRecord | None:
        """As :meth:`~ray_deepep.transport.Transport.fault_record`."""

    def give_up_on_gone_peers(self) -> None:
        """As :meth:`~ray_deepep.transport.Transport.give_up_on_gone_peers`."""

    def close(self) -> None: ...


class HostLowLatency:
    """What transports share whose calls have ended when they return, and that wait on the host."""

    heap_bytes = 0

    def check(self) -> None:
        """Nothing to do."""

    def fault_record(self) -> FaultRecord | None:
        """Nothing beside what operations raise, and the communicator then holds."""
        return None

    def give_up_on_gone_peers(self) -> None:
        """Nothing to do: who waits here looks for itself."""


class CoreLowLatency:
    """What transports share whose ``_buffer`` is of a compiled core: masks, and where rows can be read in place."""

    _buffer: Any
    _symm_pool: SymmPool
    _errors: PublicErrors
    _lock: threading.Lock

    def in_heap(self, rows: torch.Tensor) -> bool:
        """See the protocol."""
        return self._symm_pool.holds(rows.data_ptr(), rows.nbytes)

    def mask(self, rank: int, masked: bool) -> None:
        """See the protocol. On a GPU, to let a rank in again waits for the operations before."""
        with self._errors:
            if masked:
                # Without the lock: it also ends a wait of another thread.
                self._buffer.mask(rank, True)
                return
            with self._lock:
                self._buffer.mask(rank, False)

    def masked(self) -> tuple[int, ...]:
        """See the protocol."""
        return tuple(self._buffer.masked())

    def returning(self) -> tuple[int, ...]:
        """See the protocol."""
        return tuple(self._buffer.returning())

    def rejoin(self, deadline_s: float) -> None:
        """See the protocol."""
        with self._lock, self._errors:
            self._buffer.rejoin(deadline_s)
