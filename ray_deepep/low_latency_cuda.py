"""Low-latency calls of transport ``cuda``: tensors unpacked into addresses for the compiled CUDA core.

Without a hook, sending and receiving is one launch: the send keeps its arguments, and the receive launches both.
Nothing here waits for the GPU but what is about masks, so all calls can be captured in a CUDA graph.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from .cuda_arguments import check_address, check_rows, core_dtypes
from .cuda_heap import CudaHeap
from .errors import FaultRecord
from .float8 import FLOAT8
from .handle import ExpertMajor
from .low_latency_transport import (
    CoreLowLatency,
    LowLatencyCombineOutputs,
    LowLatencyCombineRequest,
    LowLatencyDispatchOutputs,
    LowLatencyDispatchRequest,
    LowLatencyWait,
)
from .shm import ShmDomain, address
from .streams import Streams
from .transport import BufferGeometry

if TYPE_CHECKING:
    from .cuda import CudaTransport
    from .nvshmem import NvshmemRuntime


@dataclasses.dataclass(kw_only=True, slots=True)
class LowLatencyPlan:
    """A dispatch's plan in GPU memory."""

    memory: torch.Tensor
    stream: int
    """Where the memory was allocated."""
    num_tokens: int
    num_topk: int


@dataclasses.dataclass(kw_only=True, slots=True)
class Sent:
    """What a send gives its receive."""

    args: Any
    tensors: tuple[torch.Tensor | None, ...]
    """What the arguments are addresses of."""
    launched: bool
    """False: the receive's launch sends too."""


class CudaLowLatency(CoreLowLatency):
    """See :class:`~ray_deepep.low_latency_transport.LowLatencyTransport`. Making one is collective."""

    def __init__(
        self,
        domain: ShmDomain,
        geometry: BufferGeometry,
        normal: CudaTransport,
        *,
        heap_provider: str,
        nvshmem: NvshmemRuntime | None,
        on_fault: Callable[[FaultRecord], None],
    ) -> None:
        self._heap = CudaHeap(domain, heap_provider=heap_provider, nvshmem=nvshmem, on_fault=on_fault)
        self._core, self._errors, self.device = self._heap.core, self._heap.errors, self._heap.device
        self._num_sms = domain.config.low_latency_num_sms or _share_of_gpu(domain, self.device)
        self._dtypes = core_dtypes(domain.core)
        self._streams = Streams(self.device)
        # A send and a receive may come from different threads.
        self._lock = threading.Lock()
        sizes = self._core.LowLatencySizes()
        sizes.rank, sizes.num_ranks, sizes.num_experts = domain.rank, len(domain.peers), geometry.num_experts
        sizes.hidden, sizes.num_topk = geometry.hidden, geometry.num_topk
        sizes.max_tokens, sizes.max_element_size = geometry.low_latency_max_tokens, geometry.max_element_size
        sizes.max_segment_bytes = torch.cuda.get_device_properties(self.device).total_memory
        self._buffer = self._heap.make(
            sizes.segment_bytes,
            lambda provider, segments: self._core.DeviceLowLatency(
                domain.core_domain,
                sizes,
                provider=provider,
                segments=segments,
                symm_addresses=normal.symm_addresses,
                symm_bytes=normal.symm_pool.num_bytes,
                bootstrap_deadline_s=domain.config.bootstrap_deadline_s,
            ),
        )

        self.heap_bytes = self._buffer.segment_bytes
        self._symm_pool = normal.symm_pool

    def empty(self, *shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """See the protocol."""
        return torch.empty(shape, dtype=dtype, device=device)

    def send_dispatch(self, request: LowLatencyDispatchRequest) -> Sent:
        """See the protocol."""
        check_rows("x", request.x)
        if request.x_scales is not None:
            check_address("x_scales", request.x_scales)
        x, topk_idx, cast = request.x, request.topk_idx, request.cast
        args = self._core.LowLatencyDispatchArgs()
        args.x, args.x_scales = x.data_ptr(), address(request.x_scales)
        args.topk_idx, args.topk_weights = topk_idx.data_ptr(), address(request.topk_weights)
        args.num_tokens, args.num_topk = topk_idx.shape
        args.wide_idx, args.stage_own = topk_idx.dtype is torch.int64, request.reuses_input
        args.x_dtype, args.dtype = self._dtypes[x.dtype], self._dtypes[x.dtype if cast is None else FLOAT8]
        args.power_of_two = cast is not None and cast.scale_format == "power_of_two"
        sent = Sent(
            args=args,
            tensors=(x, request.x_scales, topk_idx, request.topk_weights),
            launched=request.reuses_input,
        )
        if sent.launched:
            self._launch(self._buffer.dispatch, sent, self._send_only(request.num_sms))
        return sent

    def receive_dispatch(
        self, call: Sent, request: LowLatencyDispatchRequest, out: LowLatencyDispatchOutputs, wait: LowLatencyWait
    ) -> LowLatencyPlan:
        """See the protocol."""
        args = call.args
        ints = self._buffer.plan_ints(args.num_tokens, args.num_topk)
        memory = torch.empty(ints, dtype=torch.int32, device=self.device)
        args.plan, args.out_x, args.out_scales = memory.data_ptr(), out.x.data_ptr(), address(out.x_scales)
        args.counts, args.needed = out.counts.data_ptr(), out.needed.data_ptr()
        args.range_begin, args.range_count = out.range_begin.data_ptr(), out.range_count.data_ptr()
        args.expert_offsets = out.expert_offsets.data_ptr()
        args.num_tokens_per_expert = wait.stats.num_tokens_per_expert.data_ptr()
        args.alignment = request.layout.alignment if isinstance(request.layout, ExpertMajor) else 0
        args.num_rows = out.x.shape[:-1].numel()
        stream = self._launch(self._buffer.dispatch, call, self._receive(call, wait, out.absent, request.num_sms))
        return LowLatencyPlan(memory=memory, stream=stream, num_tokens=args.num_tokens, num_topk=args.num_topk)

    def send_combine(self, request: LowLatencyCombineRequest) -> Sent:
        """See the protocol."""
        rows, plan = request.rows, request.plan
        check_rows("rows", rows)
        args = self._core.LowLatencyCombineArgs()
        args.rows, args.dtype, args.exact = rows.data_ptr(), self._dtypes[rows.dtype], request.reduce == "exact"
        args.zero_copy = request.zero_copy
        args.plan, args.num_tokens, args.num_topk = plan.memory.data_ptr(), plan.num_tokens, plan.num_topk
        weights = request.topk_weights
        if weights is not None and request.reuses_input:
            # They are read when rows are received.
            weights = weights.clone()
        args.topk_weights = address(weights)
        sent = Sent(args=args, tensors=(rows, weights), launched=request.reuses_input)
        if sent.launched:
            self._use_plan(plan)
            self._launch(self._buffer.combine, sent, self._send_only(request.num_sms))
        return sent

    def receive_combine(
        self, call: Sent, request: LowLatencyCombineRequest, out: LowLatencyCombineOutputs, wait: LowLatencyWait
    ) -> None:
        """See the protocol."""
        check_rows("out", out.x)
        self._use_plan(request.plan)
        call.args.out_x = out.x.data_ptr()
        self._launch(self._buffer.combine, call, self._receive(call, wait, out.absent, request.num_sms))

    def check(self) -> None:
        """As ``Transport.check``."""
        with self._lock, self._errors:
            self._buffer.check()

    def fault_record(self) -> FaultRecord | None:
        """As ``Transport.fault_record``."""
        return self._errors.record(self._buffer.fault_record())

    def give_up_on_gone_peers(self) -> None:
        """As ``Transport.give_up_on_gone_peers``."""
        self._buffer.give_up_on_gone_peers()

    def close(self) -> None:
        """Free this rank's memory; waits for its kernels, which stop waiting for peers."""
        with self._lock:
            self._buffer.close()
            self._heap.release()

    def _launch(self, operation: Callable[..., None], call: Sent, launch) -> int:
        with self._lock, self._errors:
            stream = self._streams.enter()
            operation(call.args, launch, stream)
            self._streams.leave()
        return stream

    def _send_only(self, num_sms: int | None):
        launch = self._core.LowLatencyLaunch()
        launch.sends, launch.num_sms = True, num_sms or self._num_sms
        return launch

    def _receive(self, call: Sent, wait: LowLatencyWait, absent: torch.Tensor, num_sms: int | None):
        launch = self._core.LowLatencyLaunch()
        launch.sends, launch.receives, launch.num_sms = not call.launched, True, num_sms or self._num_sms
        launch.timeout_s, launch.mask_late = wait.timeout_s, wait.on_timeout == "mask"
        launch.wait_ns, launch.absent = wait.stats.wait_ns.data_ptr(), absent.data_ptr()
        return launch

    def _use_plan(self, plan: LowLatencyPlan) -> None:
        if plan.stream != self._streams.current_number():
            plan.memory.record_stream(torch.cuda.current_stream(self.device))


def _share_of_gpu(domain: ShmDomain, device: torch.device) -> int:
    """Multiprocessors for each of the ranks on this one's GPU: blocks of all of them must run at once."""
    ranks = sum(peer.gpu == domain.peers[domain.rank].gpu for peer in domain.peers)
    return max(1, torch.cuda.get_device_properties(device).multi_processor_count // ranks)
