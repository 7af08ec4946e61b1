"""``Buffer``: dispatch and combine for one geometry, shared by all layers of a model that has it.

The buffer checks every argument on this rank before anything is sent, hands valid requests to the transport that its
communicator picked, and wraps what comes back in frozen results.
"""

from __future__ import annotations

import dataclasses
import secrets

import torch

from . import argument_checks, checks, low_latency_checks
from .captured_graph import GraphCalls
from .communicator import Communicator
from .errors import ClosedError, FaultRecord
from .expert_rows import ExpertRowCalls
from .float8 import Float8Cast, quantize
from .gpu_times import GpuTimes
from .handle import CombineResult, DispatchHandle, DispatchResult, Layout
from .heap_tensors import HeapTensorCalls
from .low_latency_buffer import LowLatencyCalls
from .telemetry import CommRecorder, CommStats
from .transport import BufferGeometry, CombineRequest, DispatchOutput, DispatchRequest, make_handle
from .work import Work


class Buffer(ExpertRowCalls, GraphCalls, HeapTensorCalls, LowLatencyCalls):
    """Room for dispatch and combine on all ranks of ``comm``. Making one is collective, and so are its calls.

    Args:
        comm: communicator of the EP group.
        num_experts: E, a multiple of ``comm.num_ranks``.
        hidden: H, elements per row.
        num_topk: largest K, 1 to 32.
        max_tokens: largest T that any rank will dispatch.
        max_capacity: largest capacity of a ``Padded`` layout; 0 if there is none.
        low_latency_max_tokens: M, largest T that any rank will give to a low-latency call, at most 1,024; 0 if there
            are none. H is then a multiple of 128.
        symm_bytes: bytes of this rank's heap for tensors of :meth:`symm_empty`, the same on every rank; not used by
            transport ``reference``.
        max_rows: most rows S that a dispatch may bring to any rank; None: the worst case, all tokens of all ranks on
            one. GPUs set memory aside for them, twice ``S * H * max_element_size`` bytes; a dispatch that brings more
            raises ``ReceiveOverflowError`` on every rank. CPUs take memory as it is needed, and any number of rows.
            Not with ``max_capacity``, which says how many rows there are.
        max_element_size: bytes of the largest element that sent rows may have: 4, 2 (bfloat16, float16, float8), or 1.

    Raises:
        InvalidArgumentError: a size breaks its rule.
        TransportUnavailableError: the transport has no low-latency calls.
        BootstrapError: a rank did not take part within ``comm.config.bootstrap_deadline_s``; ``comm`` is closed then,
            but for transport ``reference``.
    """

    def __init__(
        self,
        comm: Communicator,
        *,
        num_experts: int,
        hidden: int,
        num_topk: int,
        max_tokens: int,
        max_capacity: int = 0,
        low_latency_max_tokens: int = 0,
        symm_bytes: int = 0,
        max_rows: int | None = None,
        max_element_size: int = 4,
    ) -> None:
        self.comm = comm
        self.geometry = BufferGeometry(
            num_experts=num_experts,
            hidden=hidden,
            num_topk=num_topk,
            max_tokens=max_tokens,
            max_capacity=max_capacity,
            low_latency_max_tokens=low_latency_max_tokens,
            symm_bytes=symm_bytes,
            max_rows=max_rows,
            max_element_size=max_element_size,
        )
        checks.geometry(self.geometry, comm.num_ranks)
        low_latency_checks.geometry(self.geometry)
        self.num_local_experts = num_experts // comm.num_ranks
        # Not id(self): handles outlive buffers, and a new buffer may take a freed one's place in memory.
        self._identity = secrets.randbits(63)
        self._progress = comm.progress
        with self._progress.during("allocate"):
            self._transport = comm.make_transport(self.geometry)
        timed_on_gpu = comm.config.time_gpu_calls and self._transport.device.type == "cuda"
        self._recorder = CommRecorder(GpuTimes() if timed_on_gpu else None)
        self._low_latency = self._make_low_latency()
        self._closed = False
        comm.adopt(self)

    def dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        *,
        x_scales: torch.Tensor | None = None,
        layout: Layout | None = None,
        locations: torch.Tensor | None = None,
        handle: DispatchHandle | None = None,
        scale_by_weights: bool = False,
        max_recv_tokens: int | None = None,
        cast: Float8Cast | None = None,
        num_sms: int | None = None,
        async_op: bool = False,
        after: torch.cuda.Event | None = None,
    ) -> DispatchResult | Work[DispatchResult]:
        """Send each token's row to the ranks of its experts; collective.

        Args:
            x: ``[T, H]`` float32, bfloat16, float16 or float8_e4m3fn, contiguous; GPUs: H of a multiple of 16 bytes.
            topk_idx: ``[T, K]`` int64 or int32, expert ids in ``[0, E)``, -1 = none.
            topk_weights: ``[T, K]`` float32; ones where left out.
            x_scales: ``[T, H / 128]`` float32, with float8 rows and only then.
            layout: how rows land; :class:`TokenMajor` by default.
            locations: ``[T, K]`` int32 in ``[0, capacity)``, for :class:`Padded` and only then.
            handle: reuse the plan of an earlier dispatch; then none of the four arguments above but scales is given.
            scale_by_weights: multiply each route's row by its weight on arrival (not token-major, not float8).
            max_recv_tokens: rows M of the output, whatever arrives; the same on every rank, not with padded rows.
                Rows after the last that came are zero, with ``topk_idx`` -1 and weights 0. On GPUs the host does not
                wait, so that the call can be captured in a CUDA graph. If more came, rows are missing and nothing is
                raised here: ask ``handle.check()``.
            cast: send float32, bfloat16 or float16 rows as float8; the result has float8 rows and ``x_scales``. H is
                a multiple of 128. Also with ``handle``; not with ``x_scales`` or ``scale_by_weights``.
            num_sms: multiprocessors for this call, at least 1; ``comm.config.num_sms`` if None. CPUs ignore it.
            async_op: return at once with a :class:`~ray_deepep.Work` whose ``wait()`` gives the result. On GPUs the
                operation then runs on a stream of the buffer's, behind all that the current stream has been given so
                far; without ``max_recv_tokens`` the host still waits for the counts of a new plan. On CPUs the
                operation has ended when the call returns.
            after: an event to wait for; with ``async_op`` instead of the current stream's work, otherwise on the
                current stream. GPUs only.

        Returns:
            The rows this rank received, and the handle.

        Raises:
            InvalidArgumentError, InvalidTypeError: naming the argument, before anything is sent.
            MismatchError: ranks passed arguments that do not fit each other.
            CommFaultError: a peer died or was late.
            ClosedError: after ``close()``.
        """
        self._check_open("dispatch")
        checks.call_options(num_sms, after)
        argument_checks.devices(
            self._transport.device,
            x=x,
            topk_idx=topk_idx,
            topk_weights=topk_weights,
            x_scales=x_scales,
            locations=locations,
        )
        request = checks.dispatch_request(
            self.geometry,
            x=x,
            topk_idx=topk_idx,
            topk_weights=topk_weights,
            x_scales=x_scales,
            layout=layout,
            locations=locations,
            handle=handle,
            owner=self._identity,
            scale_by_weights=scale_by_weights,
            max_recv_tokens=max_recv_tokens,
            cast=cast,
            num_sms=num_sms,
        )
        if async_op:
            inputs = (request.x, request.x_scales, request.topk_idx, request.topk_weights, request.locations)
            return self._transport.start(lambda: self._dispatch(request), inputs, after)
        if after is not None:
            self._transport.wait_for(after)
        return self._dispatch(request)

    def combine(
        self,
        rows: torch.Tensor,
        handle: DispatchHandle,
        *,
        topk_weights: torch.Tensor | None = None,
        weighted: bool = False,
        reduce: str = "exact",
        keep_routes: bool = False,
        bias: torch.Tensor | None = None,
        num_sms: int | None = None,
        async_op: bool = False,
        after: torch.cuda.Event | None = None,
    ) -> CombineResult | Work[CombineResult]:
        """Bring expert outputs back to their tokens and add them up; collective.

        Args:
            rows: ``[S, H]`` float32, bfloat16 or float16 in the layout of ``handle``. Token-major rows are already
                reduced over the local experts of a token.
            handle: from the dispatch.
            topk_weights: row weights to carry back (their gradient's way home): ``[R, K]`` token-major, ``[S]``
                otherwise, float32.
            weighted: multiply each route's row by its dispatch weight before the sum; not for token-major rows.
            reduce: ``exact``, ``fast`` or ``expert_order``; see :class:`~ray_deepep.transport.CombineRequest`.
            keep_routes: also return the routes' rows, ``[K, T, H]``.
            bias: ``[T, H]``, added before the result is rounded.
            num_sms, async_op, after: as for :meth:`dispatch`.

        Raises:
            As :meth:`dispatch`.
        """
        self._check_open("combine")
        checks.call_options(num_sms, after)
        argument_checks.devices(self._transport.device, rows=rows, topk_weights=topk_weights, bias=bias)
        request = checks.combine_request(
            self.geometry,
            rows=rows,
            expert_rows=(),
            handle=handle,
            owner=self._identity,
            topk_weights=topk_weights,
            weighted=weighted,
            reduce=reduce,
            keep_routes=keep_routes,
            bias=bias,
            num_sms=num_sms,
        )
        if async_op:
            inputs = (request.rows, request.topk_weights, request.bias)
            return self._transport.start(lambda: self._combine(request), inputs, after)
        if after is not None:
            self._transport.wait_for(after)
        return self._combine(request)

    def combine_weights(
        self, topk_weights: torch.Tensor, handle: DispatchHandle, *, num_sms: int | None = None
    ) -> torch.Tensor:
        """Bring one number per route home without rows; collective.

        Args:
            topk_weights: ``[R, K]`` token-major, ``[S]`` otherwise, float32.
            handle: from the dispatch.
            num_sms: as for :meth:`dispatch`.

        Returns:
            ``[T, K]`` float32, 0 where there was no route.
        """
        self._check_open("combine_weights")
        checks.call_options(num_sms, None)
        argument_checks.devices(self._transport.device, topk_weights=topk_weights)
        handle = checks.handle(handle, self._identity)
        topk_weights = checks.row_weights(topk_weights, handle)
        begin = self._recorder.begin()
        with self._progress.during("combine"):
            home = self._transport.combine_weights(topk_weights, handle, num_sms)
        self._recorder.add("combine", begin, 0, on_gpu=home.is_cuda)
        return home

    def stats(self, *, reset: bool = False) -> CommStats:
        """What this buffer has counted since the last reset; low-latency calls are not in it. Waits for nobody."""
        return self._recorder.stats(self._transport.counters(), reset=reset)

    def check(self) -> None:
        """Raise if an operation that was still running when its call returned has failed since (GPU transports).

        Call it after a synchronisation of yours, before results are trusted; every further operation does it too.
        """
        self._check_open("check")
        self._transport.check()
        if self._low_latency is not None:
            self._low_latency.check()

    def fault_record(self) -> FaultRecord | None:
        """The fault of an operation, also one that the thread which called it has not met yet; None if there is none.

        For another thread, while that one waits, for a peer or for the GPU. Never raises, and waits for nobody.
        """
        found = self._transport.fault_record()
        if found is None and self._low_latency is not None:
            found = self._low_latency.transport.fault_record()
        return found

    def give_up_on_gone_peers(self) -> None:
        """See :meth:`Communicator.give_up_on_gone_peers`."""
        self._transport.give_up_on_gone_peers()
        if self._low_latency is not None:
            self._low_latency.transport.give_up_on_gone_peers()

    @property
    def closed(self) -> bool:
        """Whether ``close()`` was called (here or through the communicator)."""
        return self._closed

    def close(self) -> None:
        """Free the heap of this rank. Not collective: peers that already hold the rows keep them."""
        if not self._closed:
            self._closed = True
            try:
                # First: it reads what lies in the transport's heap.
                if self._low_latency is not None:
                    self._low_latency.close()
            finally:
                self._transport.close()
                self.comm.release(self)

    def __enter__(self) -> Buffer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _check_open(self, operation: str) -> None:
        if self._closed:
            raise ClosedError(f"{operation}: the buffer is closed")
        self.comm.check_usable(operation)

    def _dispatch(self, request: DispatchRequest) -> DispatchResult:
        begin = self._recorder.begin()
        with self._progress.during("dispatch"):
            if request.cast is not None and not self._transport.casts_rows:
                rows = quantize(request.x, request.cast)
                request = dataclasses.replace(request, x=rows.data, x_scales=rows.scales, cast=None)
            output = self._transport.dispatch(request)
        self._recorder.add("dispatch", begin, output.x.numel() * output.x.element_size(), on_gpu=output.x.is_cuda)
        if request.handle is None and output.num_recv_tokens_per_expert is not None and not request.x.is_cuda:
            num_dropped = int((request.topk_idx < 0).sum())
            self._recorder.add_routes(output.num_recv_tokens_per_expert, num_dropped)
        return self._dispatch_result(request, output)

    def _combine(self, request: CombineRequest) -> CombineResult:
        begin = self._recorder.begin()
        with self._progress.during("combine"):
            output = self._transport.combine(request)
        given = request.expert_rows or (request.rows,)
        num_bytes = sum(rows.numel() for rows in given) * given[0].element_size()
        self._recorder.add("combine", begin, num_bytes, on_gpu=output.x.is_cuda)
        return CombineResult(x=output.x, topk_weights=output.topk_weights, routes=output.routes)

    def _dispatch_result(self, request: DispatchRequest, output: DispatchOutput) -> DispatchResult:
        handle = request.handle
        if handle is None:
            handle = make_handle(
                request,
                output,
                num_ranks=self.comm.num_ranks,
                num_local_experts=self.num_local_experts,
                check_faults=self._transport.check,
                owner=self._identity,
            )
        return DispatchResult(
            x=output.x,
            x_scales=output.x_scales,
            topk_idx=output.topk_idx,
            topk_weights=output.topk_weights if request.handle is None else handle.recv_topk_weights,
            handle=handle,
        )
