"""Transport ``cuda``: the compiled CUDA core, for ranks whose GPUs reach each other's memory (one NVLink domain).

As ``shm.py``, this file calls a compiled core (``ray_deepep._cuda``) and allocates outputs; ``cuda_arguments.py``
unpacks torch tensors for it. Work runs on the current CUDA stream. The host waits once per new dispatch, for the counts
that give the outputs their sizes, mostly while rows move already, into as much room as the last dispatch makes likely
(``guessed_rows.py``); with ``max_recv_tokens`` it does not wait at all.

A kernel takes tens of microseconds, so the host must not take as long: launch first, and make results while it runs.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

import torch

from .cuda_arguments import CudaArguments, CudaPlan, check_address, check_rows
from .cuda_heap import CudaHeap, load_core
from .errors import FaultRecord, InvalidArgumentError, ReceiveOverflowError
from .float8 import FLOAT8, SCALE_BLOCK
from .guessed_rows import GuessedRows
from .handle import DispatchHandle, ExpertMajor, TokenMajor
from .shm import ShmDomain
from .streams import Streams
from .symm_pool import SymmPool
from .telemetry import TransportCounters
from .transport import BufferGeometry, CombineOutput, CombineRequest, DispatchOutput, DispatchRequest
from .work import Work

if TYPE_CHECKING:
    from .nvshmem import NvshmemRuntime

R = TypeVar("R")


def core_version() -> tuple[str, str]:
    """Version of the CUDA core, or an empty string and what kept it from loading."""
    try:
        return load_core().version, ""
    except ImportError as error:
        return "", str(error)


def cuda_problem() -> str:
    """Why this process cannot use the CUDA core; empty if it can."""
    _, problem = core_version()
    if problem:
        return f"no CUDA core ({problem})"
    return "" if torch.cuda.is_available() else "torch sees no GPU"


def gpu_index() -> int:
    """Index of the current GPU."""
    return torch.cuda.current_device()


def gpu_uuid() -> str:
    """UUID of the current GPU."""
    return str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)


class CudaTransport:
    """One buffer over the GPUs of a domain; see :class:`~ray_deepep.transport.Transport`."""

    casts_rows = True
    takes_expert_rows = False
    takes_parts = False
    can_capture = True

    def __init__(
        self,
        domain: ShmDomain,
        geometry: BufferGeometry,
        *,
        num_sms: int,
        heap_provider: str,
        nvshmem: NvshmemRuntime | None,
        on_fault: Callable[[FaultRecord], FaultRecord],
    ) -> None:
        self._heap = CudaHeap(domain, heap_provider=heap_provider, nvshmem=nvshmem, on_fault=on_fault)
        self._geometry, self._num_sms = geometry, num_sms
        self.device, self._core, self._errors = self._heap.device, self._heap.core, self._heap.errors
        self._lock = threading.Lock()
        self._streams = Streams(self.device)
        self._arguments = CudaArguments(domain, geometry, self._core, self.device)
        sizes = self._arguments.sizes
        self._buffer = self._heap.make(
            lambda: self._core.segment_bytes(sizes),
            lambda provider, segments: self._core.DeviceBuffer(
                domain.core_domain,
                sizes,
                provider=provider,
                segments=segments,
                bootstrap_deadline_s=domain.config.bootstrap_deadline_s,
                deadline_s=domain.config.deadline_s,
            ),
        )
        self._first_rank = domain.peers[0].rank
        self._guessed_rows = GuessedRows()
        self.symm_pool = SymmPool(self._buffer.symm_address, self._buffer.symm_bytes)
        self._segment_bytes = self._buffer.segment_bytes

    def dispatch(self, request: DispatchRequest) -> DispatchOutput:
        """See :meth:`Transport.dispatch`."""
        check_rows("x", request.x)
        if request.x_scales is not None:
            check_address("x_scales", request.x_scales)
        dispatch = self._new_dispatch if request.handle is None else self._cached_dispatch
        with self._lock, self._errors:
            stream = self._streams.enter()
            output = dispatch(request, request.num_sms or self._num_sms, stream)
            self._streams.leave()
        return output

    def _new_dispatch(self, request: DispatchRequest, num_sms: int, stream: int) -> DispatchOutput:
        topk_idx, fixed = request.topk_idx, request.max_recv_tokens is not None
        if not fixed and torch.cuda.is_current_stream_capturing():
            # The host would wait for counts that come only when the graph runs.
            raise InvalidArgumentError("max_recv_tokens", None, "must be given while a CUDA graph is captured")
        if topk_idx.dtype is not torch.int64:
            topk_idx = topk_idx.to(torch.int64)
        num_tokens, num_topk = topk_idx.shape
        plan = self._arguments.new_plan(self._buffer, request, num_tokens, num_topk, stream)
        token_major, recv_topk_idx = isinstance(request.layout, TokenMajor), None
        if token_major:
            recv_topk_idx = torch.empty(plan.num_rows, num_topk, dtype=torch.int64, device=self.device)
            recv_weights = torch.empty(plan.num_rows, num_topk, device=self.device)
        else:
            recv_weights = torch.empty(plan.num_rows, device=self.device)
        args = self._arguments.dispatch(request, topk_idx, recv_topk_idx, recv_weights)
        self._buffer.begin_dispatch(args, plan.core, not fixed, stream)
        if fixed:
            x, x_scales = self._pull(request, args, plan, plan.num_rows, num_sms, stream)
            return DispatchOutput(
                x=x,
                x_scales=x_scales,
                topk_idx=recv_topk_idx,
                topk_weights=recv_weights,
                num_recv_tokens=plan.num_rows if token_major else None,
                num_recv_tokens_per_expert=None,
                expert_offsets=None,
                counts=plan.memory,
                first_rank=self._first_rank,
                plan=plan,
            )
        found, x, x_scales = self._pull_counted(request, args, plan, num_sms, stream)
        # Only now: peers do not know of it, and wait for the rows that this rank stages while it pulls.
        self._buffer.check_routing()
        return DispatchOutput(
            x=x,
            x_scales=x_scales,
            topk_idx=recv_topk_idx[: found.num_rows] if token_major else None,
            topk_weights=recv_weights[: found.num_rows],
            num_recv_tokens=found.num_recv_tokens,
            num_recv_tokens_per_expert=tuple(found.expert_count),
            expert_offsets=tuple(found.expert_offset) if isinstance(request.layout, ExpertMajor) else (),
            counts=plan.memory,
            first_rank=self._first_rank,
            plan=plan,
        )

    def _pull_counted(self, request: DispatchRequest, args, plan: CudaPlan, num_sms: int, stream: int):
        """The counts, and as many rows and scales; into guessed room at first: rows move before the host knows."""
        guess = self._guessed_rows.of(request.layout, plan.num_rows)
        if guess:
            x, x_scales = self._pull(request, args, plan, guess, num_sms, stream, guessed=True)
        found = self._buffer.wait_counts()
        if found.overflow_rank >= 0:
            self._raise_overflow(request, found, plan.num_rows)
        self._guessed_rows.learn(request.layout, found.num_rows)
        if not guess or found.num_rows > guess:
            x, x_scales = self._pull(request, args, plan, found.num_rows, num_sms, stream)
        elif found.num_rows < guess:
            x, x_scales = x[: found.num_rows], None if x_scales is None else x_scales[: found.num_rows]
        return found, x, x_scales

    def _raise_overflow(self, request: DispatchRequest, found, room: int) -> None:
        rank = self._first_rank + found.overflow_rank
        if self._geometry.max_rows is not None:
            raise ReceiveOverflowError(rank, found.overflow_rows, room, "max_rows")
        # Only an alignment that buffers have no room for brings more than the worst case.
        rule = f"needs {found.overflow_rows} rows on rank {rank}, more than the buffer's {room}"
        raise InvalidArgumentError("layout", request.layout, rule)

    def _cached_dispatch(self, request: DispatchRequest, num_sms: int, stream: int) -> DispatchOutput:
        handle, plan = request.handle, request.handle.plan
        self._use_plan(plan, stream)
        args = self._arguments.dispatch(request, None, None, None)
        x, x_scales = self._pull(request, args, plan, handle.num_rows, num_sms, stream, cached=True)
        return DispatchOutput(
            x=x,
            x_scales=x_scales,
            topk_idx=None,
            topk_weights=None,
            num_recv_tokens=handle.num_recv_tokens,
            num_recv_tokens_per_expert=handle.num_recv_tokens_per_expert,
            expert_offsets=handle.expert_offsets,
            counts=plan.memory,
            first_rank=self._first_rank,
            plan=plan,
        )

    def combine(
        self, request: CombineRequest, *, out: torch.Tensor | None = None, out_routes: torch.Tensor | None = None
    ) -> CombineOutput:
        """See :meth:`Transport.combine`. ``out`` ``[T, H]`` and ``out_routes`` ``[K, T, H]`` take the results."""
        rows, handle = request.rows, request.handle
        check_rows("rows", rows)
        num_tokens, num_topk, hidden = handle.num_tokens, handle.num_topk, rows.shape[1]
        args, routes = self._core.CombineArgs(), None
        args.rows, args.num_rows, args.dtype = rows.data_ptr(), rows.shape[0], self._arguments.dtypes[rows.dtype]
        args.weighted, args.reduce = request.weighted, getattr(self._arguments.reduces, request.reduce)
        if request.bias is not None:
            check_rows("bias", request.bias)
            args.bias = request.bias.data_ptr()
        if request.keep_routes:
            routes = out_routes
            if routes is None:
                routes = torch.empty(num_topk, num_tokens, hidden, dtype=rows.dtype, device=self.device)
            args.out_routes = routes.data_ptr()
        x = torch.empty(num_tokens, hidden, dtype=rows.dtype, device=self.device) if out is None else out
        args.out_x = x.data_ptr()
        home = self._combine(args, request.topk_weights, handle, request.num_sms)
        return CombineOutput(x=x, topk_weights=home, routes=routes)

    def combine_weights(self, topk_weights: torch.Tensor, handle: DispatchHandle, num_sms: int | None) -> torch.Tensor:
        """See :meth:`Transport.combine_weights`."""
        args = self._core.CombineArgs()
        args.has_rows, args.dtype = False, self._arguments.dtypes[torch.float32]
        return self._combine(args, topk_weights, handle, num_sms)

    def start(
        self, run: Callable[[], R], inputs: tuple[torch.Tensor | None, ...], after: torch.cuda.Event | None
    ) -> Work[R]:
        """See :meth:`Transport.start`."""
        return self._streams.start(run, inputs, after, lambda tensor: self.symm_pool.holds(tensor.data_ptr()))

    def wait_for(self, after: torch.cuda.Event) -> None:
        """See :meth:`Transport.wait_for`."""
        self._streams.wait_for(after)

    def symm_empty(self, num_rows: int, dtype: torch.dtype) -> torch.Tensor:
        """See :meth:`Transport.symm_empty`."""
        shape = (num_rows, self._geometry.hidden)
        if num_rows == 0:
            return torch.empty(shape, dtype=dtype, device=self.device)
        self._streams.release_inputs()
        block = self.symm_pool.take(num_rows * self._geometry.hidden * dtype.itemsize)
        return torch.as_tensor(block, device=self.device).view(dtype).view(shape)

    # What a hop in front of this buffer needs of it.

    def symm_bytes(self, num_bytes: int) -> torch.Tensor:
        """``[num_bytes]`` uint8 in this rank's heap. Local.

        Raises:
            HeapFullError: there is no room.
        """
        return torch.as_tensor(self.symm_pool.take(num_bytes), device=self.device)

    def offset_in_segment(self, tensor: torch.Tensor) -> int:
        """Where a tensor of this rank's heap begins, from that heap's begin for tensors."""
        return tensor.data_ptr() - self._buffer.symm_address

    @property
    def symm_addresses(self) -> list[int]:
        """GPU addresses of all ranks' room for tensors of ``symm_empty``, by rank."""
        return self._buffer.symm_addresses

    @property
    def control_address(self) -> int:
        """GPU address of the words by which kernels know that they have failed."""
        return self._buffer.control_address

    @property
    def status_address(self) -> int:
        """Address of the words into which kernels report faults."""
        return self._buffer.status_address

    @contextlib.contextmanager
    def launching(self) -> Iterator[int]:
        """Around launches that belong to this buffer's operations, a graph of them too: the stream, as a number."""
        with self._lock, self._errors:
            yield self._streams.enter()
            self._streams.leave()

    def abort_waits(self) -> None:
        """Let kernels in flight stop waiting: a rank elsewhere has failed. Any thread."""
        self._buffer.abort_waits()

    def check(self) -> None:
        """See :meth:`Transport.check`."""
        with self._lock, self._errors:
            self._buffer.check()

    def fault_record(self) -> FaultRecord | None:
        """See :meth:`Transport.fault_record`. Not under ``_lock``: whoever waits for the GPU may hold it."""
        return self._errors.record(self._buffer.fault_record())

    def give_up_on_gone_peers(self) -> None:
        """See :meth:`Transport.give_up_on_gone_peers`."""
        self._buffer.give_up_on_gone_peers()

    def counters(self) -> TransportCounters:
        """See :meth:`Transport.counters`. Of operations that have ended; they may take all of their areas."""
        wait_ns, recv_bytes = self._buffer.traffic()
        heap_bytes = self._segment_bytes - self.symm_pool.free_bytes()
        return TransportCounters(wait_ns=tuple(wait_ns), recv_bytes=tuple(recv_bytes), heap_bytes=heap_bytes)

    def close(self) -> None:
        """Free this rank's memory; waits for its kernels, which stop waiting for peers."""
        with self._lock:
            self._buffer.close()
            self._heap.release()

    def _combine(
        self, args, weights: torch.Tensor | None, handle: DispatchHandle, num_sms: int | None
    ) -> torch.Tensor | None:
        """Row weights at home, if there are any."""
        home = None
        if weights is not None:
            home = torch.empty(handle.num_tokens, handle.num_topk, device=self.device)
            args.has_row_weights, args.row_weights, args.num_row_weights = True, weights.data_ptr(), weights.numel()
            args.out_topk_weights = home.data_ptr()
        with self._lock, self._errors:
            stream = self._streams.enter()
            self._use_plan(handle.plan, stream)
            self._buffer.combine(args, handle.plan.core, num_sms or self._num_sms, stream)
            self._streams.leave()
        return home

    def _use_plan(self, plan: CudaPlan, stream: int) -> None:
        if plan.stream != stream:
            plan.memory.record_stream(torch.cuda.current_stream(self.device))

    def _pull(
        self,
        request: DispatchRequest,
        args,
        plan: CudaPlan,
        num_rows: int,
        num_sms: int,
        stream: int,
        *,
        cached: bool = False,
        guessed: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rows and their scales. ``guessed``: if more than ``num_rows`` arrive, nothing happens."""
        hidden, dtype, x_scales = self._geometry.hidden, request.x.dtype, None
        if request.cast is not None:
            dtype = FLOAT8
        x = torch.empty(num_rows, hidden, dtype=dtype, device=self.device)
        args.out_x = x.data_ptr()
        if dtype is FLOAT8:
            x_scales = torch.empty(num_rows, hidden // SCALE_BLOCK, device=self.device)
            args.out_scales = x_scales.data_ptr()
        self._buffer.pull_dispatch(args, plan.core, cached, num_rows if guessed else -1, num_sms, stream)
        return x, x_scales
