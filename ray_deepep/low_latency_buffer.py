"""The low-latency calls of ``Buffer``: decode steps of few tokens, in fixed shapes, sent and received apart.

The calls check their arguments and build frozen results; ``low_latency_flight.py`` keeps the order of receives, and a
``LowLatencyTransport`` moves rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from . import low_latency_checks as checks
from .argument_checks import devices
from .errors import InvalidArgumentError
from .float8 import FLOAT8, SCALE_BLOCK, Float8Cast
from .low_latency import (
    ExpertBlocks,
    LayoutRanges,
    LowLatencyCombineResult,
    LowLatencyDispatchResult,
    LowLatencyHandle,
    LowLatencyLayout,
    LowLatencyStats,
)
from .low_latency_flight import Flight, LowLatency
from .low_latency_masks import MaskCalls
from .low_latency_transport import (
    LowLatencyCombineOutputs,
    LowLatencyCombineRequest,
    LowLatencyDispatchOutputs,
    LowLatencyDispatchRequest,
    LowLatencyWait,
)
from .work import Work

if TYPE_CHECKING:
    from .communicator import Communicator
    from .transport import BufferGeometry, Transport


class LowLatencyCalls(MaskCalls):
    """Mixed into :class:`~ray_deepep.Buffer`."""

    comm: Communicator
    geometry: BufferGeometry
    _identity: int
    _transport: Transport
    _low_latency: LowLatency | None

    def low_latency_dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        *,
        topk_weights: torch.Tensor | None = None,
        x_scales: torch.Tensor | None = None,
        layout: LowLatencyLayout | None = None,
        max_recv_tokens: int | None = None,
        cast: Float8Cast | None = None,
        on_timeout: str = "raise",
        timeout_s: float | None = None,
        stats: LowLatencyStats | None = None,
        num_sms: int | None = None,
        return_recv_hook: bool = False,
        async_op: bool = False,
        after: torch.cuda.Event | None = None,
    ) -> LowLatencyDispatchResult | Work[LowLatencyDispatchResult]:
        """Send each token's row to its experts; collective. For few tokens: shapes do not depend on the routing.

        M is the buffer's ``low_latency_max_tokens``. A row crosses once per (token, rank).

        Args:
            x: ``[T, H]`` float32, bfloat16, float16 or float8_e4m3fn, contiguous, T at most M, also 0.
            topk_idx: ``[T, K]`` int64 or int32, expert ids in ``[0, E)``, no expert twice in a token; -1 = none.
            topk_weights: ``[T, K]`` float32, for the combine; ones where left out.
            x_scales: ``[T, H / 128]`` float32, with float8 rows and only then.
            layout: :class:`ExpertBlocks` by default: ``[L, N * M, H]``. Or :class:`ExpertMajor`:
                ``[max_recv_tokens, H]``, aligned groups one after the other.
            max_recv_tokens: rows of an :class:`ExpertMajor` output; enough for any routing if None, which is
                ``N * M * min(K, L) + L * (alignment - 1)``. If more come they are left out: ask ``handle.check()``.
            cast: send float32, bfloat16 or float16 rows as float8.
            on_timeout: ``raise``, or ``mask``: a rank that did not come in time, or is gone, is masked from now on
                (see :meth:`mask_rank`), and stands in ``absent``. All ranks pass the same.
            timeout_s: seconds that this rank waits while it receives; ``comm.config.deadline_s`` if None.
            stats: tensors to add to; the buffer's :attr:`low_latency_stats` if None.
            num_sms: multiprocessors; CPUs ignore it.
            return_recv_hook: only send. ``result.hook()`` receives; until then tensors of the result are undefined,
                and all arguments but ``stats`` may be overwritten. Two operations may be in flight.
            async_op: return a :class:`~ray_deepep.Work`; not with ``return_recv_hook``. On CPUs the operation has
                ended when the call returns.
            after: an event to wait for, with ``async_op``; GPUs only.

        Raises:
            InvalidArgumentError, InvalidTypeError: naming the argument, before anything is sent.
            HookError: an operation in flight has to be received first; nothing was sent.
            MismatchError: ranks passed arguments that do not fit each other. Raised on all ranks, by the hook if
                there is one; the operation is over, and the next may come.
            RankMaskedError: peers had masked this rank.
            CommFaultError: a peer died or was late.
            ClosedError: after ``close()``.
        """
        engine = self._engine("low_latency_dispatch")
        options = self._options(return_recv_hook, async_op, after, num_sms, on_timeout, timeout_s, stats)
        devices(engine.device, x=x, topk_idx=topk_idx, topk_weights=topk_weights, x_scales=x_scales)
        request = checks.dispatch_request(
            self.geometry,
            num_ranks=engine.num_ranks,
            x=x,
            topk_idx=topk_idx,
            topk_weights=topk_weights,
            x_scales=x_scales,
            layout=layout,
            max_recv_tokens=max_recv_tokens,
            cast=cast,
            options=options,
        )
        inputs = (x, topk_idx, topk_weights, x_scales)
        return self._run(lambda: self._low_latency_dispatch(engine, request, options), inputs, options)

    def low_latency_combine(
        self,
        rows: torch.Tensor,
        handle: LowLatencyHandle,
        topk_weights: torch.Tensor | None = None,
        *,
        reduce: str = "fast",
        zero_copy: bool = False,
        out: torch.Tensor | None = None,
        on_timeout: str = "raise",
        timeout_s: float | None = None,
        stats: LowLatencyStats | None = None,
        num_sms: int | None = None,
        return_recv_hook: bool = False,
        async_op: bool = False,
        after: torch.cuda.Event | None = None,
    ) -> LowLatencyCombineResult | Work[LowLatencyCombineResult]:
        """Bring expert outputs back to their tokens, weighted and added up in float32; collective.

        Args:
            rows: expert outputs, float32, bfloat16 or float16, contiguous, shape of the dispatched rows.
            handle: of the low-latency dispatch, which has been received.
            topk_weights: ``[T, K]`` float32, this rank's own, instead of those of the dispatch; only with ``exact``.
            reduce: ``fast``: rows are weighted and added up where the experts are, in k order, and rounded; one row
                per (token, rank) crosses, and these are added by rank. ``exact``: one row per (token, expert)
                crosses, and the source adds them in k order and rounds once: the same bits for any number of ranks.
            zero_copy: peers read ``rows`` where they are, instead of a copy; with ``exact`` (``fast`` sends sums, and
                copies nothing). ``rows`` are of this buffer's :meth:`symm_empty`; keep them, as they are, until peers
                have read them: until the second call after this one was received, or the first, if no rank sends it
                before it has received this one. In a decode loop that is the next dispatch. The same on all ranks.
            out: ``[T, H]``, dtype of ``rows``: written and returned as the result's ``x``.
            stats: only ``wait_ns`` is added to.
            on_timeout, timeout_s, num_sms, return_recv_hook, async_op, after: as for :meth:`low_latency_dispatch`.
                After a send ``rows`` (without ``zero_copy``) and ``topk_weights`` may be overwritten; ``out`` may not.

        Raises:
            As :meth:`low_latency_dispatch`.
        """
        engine = self._engine("low_latency_combine")
        options = self._options(return_recv_hook, async_op, after, num_sms, on_timeout, timeout_s, stats)
        devices(engine.device, rows=rows, topk_weights=topk_weights, out=out)
        handle = checks.handle(handle, self._identity)
        request = checks.combine_request(
            self.geometry,
            rows=rows,
            handle=handle,
            topk_weights=topk_weights,
            reduce=reduce,
            zero_copy=zero_copy,
            out=out,
            options=options,
        )
        if zero_copy and not engine.transport.in_heap(request.rows):
            rule = "must lie in the buffer's heap with zero_copy (Buffer.symm_empty, symm_bytes)"
            raise InvalidArgumentError("rows", tuple(request.rows.shape), rule)
        request.plan = engine.plan_of(handle)
        if out is None:
            shape = (handle.num_tokens, self.geometry.hidden)
            out = engine.transport.empty(*shape, dtype=rows.dtype, device=rows.device)
        return self._run(lambda: self._low_latency_combine(engine, request, out, options), (rows, out), options)

    @property
    def low_latency_stats(self) -> LowLatencyStats:
        """Running totals of the low-latency calls that were not given others."""
        return self._engine("low_latency_stats").stats

    @property
    def low_latency_heap_bytes(self) -> int:
        """Bytes of this rank that its peers read, for low-latency calls; 0 for transport ``reference``."""
        return self._engine("low_latency_heap_bytes").transport.heap_bytes

    def _engine(self, operation: str) -> LowLatency:
        self._check_open(operation)
        if self._low_latency is None:
            rule = f"must be given when the buffer is made, 1 or more, for {operation}"
            raise InvalidArgumentError("low_latency_max_tokens", 0, rule)
        return self._low_latency

    def _make_low_latency(self) -> LowLatency | None:
        if not self.geometry.low_latency_max_tokens:
            return None
        return LowLatency(self.comm, self.geometry, self._transport)

    def _options(
        self,
        return_recv_hook: bool,
        async_op: bool,
        after: torch.cuda.Event | None,
        num_sms: int | None,
        on_timeout: str,
        timeout_s: float | None,
        stats: LowLatencyStats | None,
    ) -> checks.CallOptions:
        engine = self._low_latency
        options = checks.CallOptions(
            return_recv_hook=return_recv_hook,
            async_op=async_op,
            after=after,
            num_sms=num_sms,
            on_timeout=on_timeout,
            timeout_s=self.comm.config.deadline_s if timeout_s is None else timeout_s,
            stats=engine.stats if stats is None else stats,
        )
        checks.call_options(options, engine.num_local_experts, engine.num_ranks)
        given = options.stats
        devices(engine.device, num_tokens_per_expert=given.num_tokens_per_expert, wait_ns=given.wait_ns)
        return options

    def _run(self, run: Callable[[], Any], inputs: tuple[torch.Tensor | None, ...], options: checks.CallOptions) -> Any:
        if options.async_op:
            return self._transport.start(run, inputs, options.after)
        if options.after is not None:
            self._transport.wait_for(options.after)
        return run()

    def _low_latency_dispatch(
        self, engine: LowLatency, request: LowLatencyDispatchRequest, options: checks.CallOptions
    ) -> LowLatencyDispatchResult:
        out = self._dispatch_outputs(engine, request)
        wait = LowLatencyWait(timeout_s=options.timeout_s, on_timeout=options.on_timeout, stats=options.stats)
        flight = engine.send(
            "low_latency_dispatch",
            lambda: engine.transport.send_dispatch(request),
            lambda call: engine.transport.receive_dispatch(call, request, out, wait),
            hook=options.return_recv_hook,
        )
        handle = LowLatencyHandle(
            layout=request.layout,
            num_tokens=request.topk_idx.shape[0],
            num_topk=request.topk_idx.shape[1],
            rows_shape=tuple(out.x.shape),
            absent=out.absent,
            needed=out.needed,
            flight=flight,
            owner=self._identity,
        )
        return LowLatencyDispatchResult(
            x=out.x,
            x_scales=out.x_scales,
            counts=out.counts,
            ranges=LayoutRanges(begin=out.range_begin, count=out.range_count),
            expert_offsets=out.expert_offsets,
            absent=out.absent,
            handle=handle,
            hook=(lambda: self._receive(flight)) if options.return_recv_hook else None,
        )

    def _low_latency_combine(
        self, engine: LowLatency, request: LowLatencyCombineRequest, x: torch.Tensor, options: checks.CallOptions
    ) -> LowLatencyCombineResult:
        out = LowLatencyCombineOutputs(x=x, absent=torch.empty(engine.num_ranks, dtype=torch.bool, device=x.device))
        wait = LowLatencyWait(timeout_s=options.timeout_s, on_timeout=options.on_timeout, stats=options.stats)
        flight = engine.send(
            "low_latency_combine",
            lambda: engine.transport.send_combine(request),
            lambda call: engine.transport.receive_combine(call, request, out, wait),
            hook=options.return_recv_hook,
        )
        hook = (lambda: self._receive(flight)) if options.return_recv_hook else None
        return LowLatencyCombineResult(x=out.x, absent=out.absent, hook=hook)

    def _receive(self, flight: Flight) -> None:
        self._engine(f"the hook of {flight}").receive(flight)

    def _dispatch_outputs(self, engine: LowLatency, request: LowLatencyDispatchRequest) -> LowLatencyDispatchOutputs:
        num_local, num_ranks, device = engine.num_local_experts, engine.num_ranks, request.x.device
        if isinstance(request.layout, ExpertBlocks):
            shape = (num_local, num_ranks * self.geometry.low_latency_max_tokens)
        else:
            shape = (request.max_recv_tokens,)
        hidden, dtype = self.geometry.hidden, request.x.dtype if request.cast is None else FLOAT8
        empty, scales = engine.transport.empty, None
        if dtype == FLOAT8:
            scales = empty(*shape, hidden // SCALE_BLOCK, dtype=torch.float32, device=device)

        def integers(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.int32, device=device)

        return LowLatencyDispatchOutputs(
            x=empty(*shape, hidden, dtype=dtype, device=device),
            x_scales=scales,
            counts=integers(num_local),
            range_begin=integers(num_local, num_ranks),
            range_count=integers(num_local, num_ranks),
            expert_offsets=integers(num_local + 1),
            needed=integers(1),
            absent=torch.empty(num_ranks, dtype=torch.bool, device=device),
        )
