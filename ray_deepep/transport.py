"""What a transport must do: the seam between :class:`~ray_deepep.Buffer` and the code that moves rows.

``Buffer`` checks arguments and builds handles; a transport gets requests that are already valid on this rank, moves
rows, and checks only what needs other ranks (that all of them asked for the same thing).

Requests and outputs are made in every call, before or beside a kernel of some microseconds. So they are not frozen,
which would double what they cost; nobody writes to them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Protocol, TypeVar

import torch

from .errors import FaultRecord, InvalidArgumentError, InvalidTypeError
from .float8 import Float8Cast
from .handle import DispatchHandle, Layout
from .telemetry import TransportCounters
from .work import Work

R = TypeVar("R")

REDUCE_MODES = ("exact", "fast", "expert_order")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BufferGeometry:
    """Sizes a buffer is made for; the same on every rank."""

    num_experts: int
    """E, a multiple of the number of ranks."""
    hidden: int
    """H, elements of a row."""
    num_topk: int
    """Largest K, at most 32."""
    max_tokens: int
    """Largest T of any rank."""
    max_capacity: int = 0
    """Largest capacity of a :class:`~ray_deepep.Padded` layout; 0: no such layout is used."""
    low_latency_max_tokens: int = 0
    """M, largest T of any rank in low-latency calls, at most 1,024; 0: there are no such calls."""
    symm_bytes: int = 0
    """Bytes of each rank's heap for the user's own tensors (``Buffer.symm_empty``)."""
    max_rows: int | None = None
    """Most rows that a dispatch may bring to a rank; None: the worst case. GPU transports only."""
    max_element_size: int = 4
    """Bytes of the largest element that rows may have."""
    num_parts: ClassVar[int] = 1

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            if name == "max_rows" and value is None:
                continue
            if type(value) is not int:
                raise InvalidTypeError(name, type(value).__name__, "must be an int")
            # Plans count tokens, rows and experts in int32.
            bits = 63 if name == "symm_bytes" else 31
            if value >= 2**bits:
                raise InvalidArgumentError(name, value, f"must be < 2**{bits}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DomainGeometry(BufferGeometry):
    """Sizes of the buffer inside one domain of several; no user's buffer has them."""

    num_parts: int = 1
    """Parts in which a rank's tokens come; see ``DispatchRequest.part_tokens``."""


@dataclasses.dataclass(kw_only=True, slots=True)
class DispatchRequest:
    """A dispatch. With ``handle`` (a cached dispatch), ``topk_idx``, ``topk_weights`` and ``locations`` are None."""

    x: torch.Tensor
    """``[T, H]`` contiguous."""
    x_scales: torch.Tensor | None
    """``[T, H / 128]`` float32 contiguous, for fp8 rows."""
    topk_idx: torch.Tensor | None
    """``[T, K]`` int64 or int32 contiguous, global expert ids, -1 = none."""
    topk_weights: torch.Tensor | None
    """``[T, K]`` float32 contiguous; None: all ones (if there is no handle)."""
    locations: torch.Tensor | None
    """``[T, K]`` int32 contiguous, slot of each route in its padded block."""
    layout: Layout
    handle: DispatchHandle | None
    scale_by_weights: bool
    """Multiply each route's row by its weight (in float32, rounded once) on arrival; not for token-major rows."""
    max_recv_tokens: int | None
    """Rows that the output has, whatever arrives; None: as many as arrive. A handle brings its own."""
    cast: Float8Cast | None
    """Rows leave as float8; only transports with ``casts_rows`` see it."""
    num_sms: int | None
    """Multiprocessors of this call; None: those of the configuration."""
    part_tokens: tuple[int, ...] = ()
    """Tokens of each part, if the geometry has several: rows then come in order of part, rank, token, and padded
    blocks in order of part, rank. Not with ``handle``. For transports with ``takes_parts``."""


@dataclasses.dataclass(kw_only=True, slots=True)
class DispatchOutput:
    """What a transport returns from a dispatch; fields as in :class:`~ray_deepep.handle.DispatchResult`."""

    x: torch.Tensor
    x_scales: torch.Tensor | None
    topk_idx: torch.Tensor | None
    topk_weights: torch.Tensor | None
    num_recv_tokens: int | None
    num_recv_tokens_per_expert: tuple[int, ...] | None
    expert_offsets: tuple[int, ...] | None
    counts: torch.Tensor
    """As ``DispatchHandle.counts``."""
    plan: Any
    first_rank: int = 0
    """As ``DispatchHandle.first_rank``."""


@dataclasses.dataclass(kw_only=True, slots=True)
class CombineRequest:
    """A combine of rows laid out as ``handle`` says."""

    rows: torch.Tensor | None
    """``[S, H]`` contiguous; None with ``expert_rows``."""
    expert_rows: tuple[torch.Tensor, ...]
    """Instead of ``rows`` a block per local expert, as in ``Buffer.combine_experts``, contiguous; only transports with
    ``takes_expert_rows`` see it. Empty with ``rows``."""
    handle: DispatchHandle
    topk_weights: torch.Tensor | None
    """Row weights to carry back: ``[R, K]`` token-major, ``[S]`` otherwise, float32 contiguous."""
    weighted: bool
    """Multiply each route's row by its weight from the dispatch (float32) before the sum."""
    reduce: str
    """``exact``: routes summed at the source in float32, k order. ``fast``: summed over local experts first (float32,
    rounded once to the rows' dtype), then over ranks in rank order. ``expert_order``: as ``exact``, but by
    ascending expert (bit-equal to ``torch.index_add`` over expert-major rows, which adds in float32 and rounds once).
    Token-major rows are always summed over ranks in rank order, in float32. With several nodes, sums over ranks are
    sums over those of a node, rounded to the rows' dtype, and then over nodes in node order."""
    keep_routes: bool
    """Also return each route's row as it came, ``[K, T, H]``; not for token-major rows nor ``fast``."""
    bias: torch.Tensor | None
    """``[T, H]``, added in float32 before the result is rounded."""
    num_sms: int | None
    num_routes: int | None = None
    """If given, no sum is wanted, only the routes' rows, so many: ``[num_routes, H]`` by (token, k), without those that
    are -1. Not for token-major rows nor ``fast``. For transports with ``takes_parts``."""


@dataclasses.dataclass(kw_only=True, slots=True)
class CombineOutput:
    """What a transport returns from a combine."""

    x: torch.Tensor | None
    """None if no sum was wanted."""
    topk_weights: torch.Tensor | None
    routes: torch.Tensor | None


class Transport(Protocol):
    """One buffer's way to move rows. ``dispatch``, ``combine`` and ``combine_weights`` are collective and return when
    this rank's rows are complete, or will be in the order of the current stream.

    Raises:
        MismatchError: ranks asked for different things; nothing was moved.
        CommFaultError: a peer died or did not come within the deadline; the transport then refuses all further calls.
    """

    device: torch.device | None
    """Where all tensors must be; None: anywhere."""
    casts_rows: bool
    """Whether ``DispatchRequest.cast`` may be given."""
    takes_expert_rows: bool
    """Whether ``CombineRequest.expert_rows`` may be given."""
    takes_parts: bool
    """Whether it can serve one domain of several: ``DispatchRequest.part_tokens``, ``CombineRequest.num_routes``."""
    can_capture: bool
    """Whether operations can be captured into a CUDA graph; such a transport has ``launching``, for replays."""

    def dispatch(self, request: DispatchRequest) -> DispatchOutput: ...

    def combine(self, request: CombineRequest) -> CombineOutput: ...

    def combine_weights(
        self, topk_weights: torch.Tensor, handle: DispatchHandle, num_sms: int | None
    ) -> torch.Tensor: ...

    def start(
        self, run: Callable[[], R], inputs: tuple[torch.Tensor | None, ...], after: torch.cuda.Event | None
    ) -> Work[R]:
        """Call ``run``, an operation on this transport that reads ``inputs``, on the communication stream if there is
        one: behind ``after``, or behind all work of the current stream."""

    def wait_for(self, after: torch.cuda.Event) -> None:
        """Let the current stream wait for an event."""

    def symm_empty(self, num_rows: int, dtype: torch.dtype) -> torch.Tensor:
        """``[num_rows, H]``, in this rank's heap if rows can be read there. Local."""

    def check(self) -> None:
        """Raise the fault of an operation that ended after its call returned. Local."""

    def fault_record(self) -> FaultRecord | None:
        """The fault of an operation, seen or not yet seen by the thread that called it; None where there is none.

        For another thread, while this one waits: never raises, waits for nobody and makes no CUDA call.
        """

    def counters(self) -> TransportCounters | None:
        """What it has counted since it was made; None where it counts nothing. From any thread; waits for nobody."""

    def give_up_on_gone_peers(self) -> None:
        """End waits for ranks whose process is gone, where the waiting thread cannot see to that itself. Local."""

    def close(self) -> None: ...


def make_handle(
    request: DispatchRequest,
    output: DispatchOutput,
    *,
    num_ranks: int,
    num_local_experts: int,
    check_faults: Callable[[], None],
    owner: int,
) -> DispatchHandle:
    """The handle of a new dispatch."""
    return DispatchHandle(
        layout=request.layout,
        num_tokens=request.x.shape[0],
        num_topk=request.topk_idx.shape[1],
        num_ranks=num_ranks,
        num_local_experts=num_local_experts,
        num_recv_tokens=output.num_recv_tokens,
        num_rows=output.x.shape[0],
        num_recv_tokens_per_expert=output.num_recv_tokens_per_expert,
        expert_offsets=output.expert_offsets,
        max_recv_tokens=request.max_recv_tokens,
        topk_weights=request.topk_weights,
        recv_topk_weights=output.topk_weights,
        counts=output.counts,
        first_rank=output.first_rank,
        plan=output.plan,
        check_faults=check_faults,
        owner=owner,
    )


class BlockingTransport:
    """What transports share whose operations have ended when their calls return."""

    casts_rows = False
    takes_expert_rows = False
    takes_parts = False
    can_capture = False
    _geometry: BufferGeometry

    def start(
        self, run: Callable[[], R], inputs: tuple[torch.Tensor | None, ...], after: torch.cuda.Event | None
    ) -> Work[R]:
        """See :meth:`Transport.start`."""
        if after is not None:
            self.wait_for(after)
        return Work(run())

    def wait_for(self, after: torch.cuda.Event) -> None:
        """Refused: nothing here runs on a stream."""
        raise InvalidArgumentError("after", "an event", "goes with transport cuda only")

    def symm_empty(self, num_rows: int, dtype: torch.dtype) -> torch.Tensor:
        """See :meth:`Transport.symm_empty`."""
        return torch.empty(num_rows, self._geometry.hidden, dtype=dtype)

    def check(self) -> None:
        """Nothing to do."""

    def fault_record(self) -> FaultRecord | None:
        """Nothing beside what operations raise, and the communicator then holds."""
        return None

    def counters(self) -> TransportCounters | None:
        """Nothing is counted."""
        return None

    def give_up_on_gone_peers(self) -> None:
        """Nothing to do: who waits here looks for itself."""
