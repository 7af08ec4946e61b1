"""Low-latency calls of transport ``shm``: tensors unpacked into addresses for the compiled CPU core."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from .core_errors import PublicErrors
from .errors import FaultRecord
from .handle import ExpertMajor
from .low_latency_transport import (
    CoreLowLatency,
    HostLowLatency,
    LowLatencyCombineOutputs,
    LowLatencyCombineRequest,
    LowLatencyDispatchOutputs,
    LowLatencyDispatchRequest,
    LowLatencyWait,
)
from .shm import ShmDomain, ShmTransport, address, pooled_empty
from .transport import BufferGeometry

NUM_KEPT_OUTPUTS = 4
"""Dispatch outputs in bfloat16 whose memory is kept while nobody uses it. Only rows that were written take memory."""


class ShmLowLatency(CoreLowLatency, HostLowLatency):
    """See :class:`~ray_deepep.low_latency_transport.LowLatencyTransport`. Making one is collective."""

    device = torch.device("cpu")

    def __init__(
        self,
        domain: ShmDomain,
        geometry: BufferGeometry,
        normal: ShmTransport,
        *,
        on_fault: Callable[[FaultRecord], FaultRecord],
    ) -> None:
        self._core, self._symm_pool = domain.core, normal.symm_pool
        # Blocks per expert are large and mostly empty: in the domain's pool they would leave no room for others, and
        # fresh ones at every call would cost a page fault for every row.
        rows = geometry.num_experts * geometry.low_latency_max_tokens
        self._pool = self._core.BlockPool(NUM_KEPT_OUTPUTS * rows * geometry.hidden * 2)
        self._errors = PublicErrors(domain, on_fault)
        # A send and a receive may come from different threads.
        self._lock = threading.Lock()
        self._dtypes = domain.dtypes
        sizes = self._core.LowLatencySizes()
        sizes.num_experts, sizes.hidden, sizes.num_topk = geometry.num_experts, geometry.hidden, geometry.num_topk
        sizes.max_tokens = geometry.low_latency_max_tokens
        config = domain.config
        sizes.max_segment_bytes = int(config.heap_gib * 2**30)
        self.heap_bytes = sizes.segment_bytes(len(domain.peers))
        with self._errors:
            self._buffer = self._core.LowLatencyBuffer(
                domain.core_domain,
                sizes,
                normal.symm_region,
                bootstrap_deadline_s=config.bootstrap_deadline_s,
                num_threads=domain.num_threads,
            )

    def empty(self, *shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """See the protocol."""
        return pooled_empty(self._pool, *shape, dtype=dtype)

    def send_dispatch(self, request: LowLatencyDispatchRequest):
        """Publish rows and routing. Returns the core's call and its arguments, for the receive."""
        topk_idx = request.topk_idx.to(torch.int64)
        args = self._core.LowLatencyDispatchArgs()
        args.x, args.x_scales = request.x.data_ptr(), address(request.x_scales)
        args.topk_idx, args.topk_weights = topk_idx.data_ptr(), address(request.topk_weights)
        args.num_tokens, args.num_topk = topk_idx.shape
        args.dtype, args.stage_own = self._dtypes[request.x.dtype], request.reuses_input
        scale_format = "none" if request.cast is None else request.cast.scale_format
        args.cast = getattr(self._core.Float8Scale, scale_format)
        with self._lock, self._errors:
            return self._buffer.send_dispatch(args), args

    def receive_dispatch(
        self, call, request: LowLatencyDispatchRequest, out: LowLatencyDispatchOutputs, wait: LowLatencyWait
    ):
        """Pull rows. Returns the plan."""
        sent, args = call
        core = self._core.LowLatencyDispatchOutputs()
        core.x, core.x_scales, core.counts = out.x.data_ptr(), address(out.x_scales), out.counts.data_ptr()
        core.range_begin, core.range_count = out.range_begin.data_ptr(), out.range_count.data_ptr()
        core.expert_offsets, core.needed = out.expert_offsets.data_ptr(), out.needed.data_ptr()
        core.absent = out.absent.data_ptr()
        core.num_tokens_per_expert = wait.stats.num_tokens_per_expert.data_ptr()
        core.alignment = request.layout.alignment if isinstance(request.layout, ExpertMajor) else 0
        core.num_rows = out.x.shape[:-1].numel()
        with self._lock, self._errors:
            return self._buffer.receive_dispatch(sent, args, core, self._wait(wait))

    def send_combine(self, request: LowLatencyCombineRequest):
        """Publish sums or rows. Returns the core's call and its arguments, for the receive."""
        args = self._core.LowLatencyCombineArgs()
        args.rows, args.dtype = request.rows.data_ptr(), self._dtypes[request.rows.dtype]
        args.zero_copy = request.zero_copy
        args.topk_weights, args.reduce = address(request.topk_weights), getattr(self._core.Reduce, request.reduce)
        with self._lock, self._errors:
            return self._buffer.send_combine(args, request.plan), args

    def receive_combine(
        self, call, request: LowLatencyCombineRequest, out: LowLatencyCombineOutputs, wait: LowLatencyWait
    ) -> None:
        """Pull and add up."""
        sent, args = call
        core = self._core.LowLatencyCombineOutputs()
        core.x, core.absent = out.x.data_ptr(), out.absent.data_ptr()
        with self._lock, self._errors:
            self._buffer.receive_combine(sent, args, request.plan, core, self._wait(wait))

    def close(self) -> None:
        """Free this rank's mappings."""
        with self._lock:
            self._buffer.close()

    def _wait(self, wait: LowLatencyWait):
        core = self._core.LowLatencyWait()
        core.timeout_s, core.mask_late = wait.timeout_s, wait.on_timeout == "mask"
        core.wait_ns = wait.stats.wait_ns.data_ptr()
        return core
