"""Transport ``cuda``: the compiled CUDA core, for ranks whose GPUs reach each other's memory (one NVLink domain).

As ``shm.py``, this file unpacks torch tensors for a compiled core (``ray_deepep._cuda``) and allocates outputs. Work
runs on the current CUDA stream. The host waits once per new dispatch, for the counts that give the outputs their sizes;
with ``max_recv_tokens`` it does not wait at all.

A kernel takes tens of microseconds, so the host must not take as long: launch first, and make results while it runs.
"""

from __future__ import annotations

import dataclasses
import importlib
import threading
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, TypeVar

import torch

from . import env
from .core_errors import PublicErrors
from .errors import FaultRecord, InvalidArgumentError, ReceiveOverflowError
from .float8 import FLOAT8, SCALE_BLOCK
from .handle import DispatchHandle, ExpertMajor, Padded, TokenMajor
from .shm import ShmDomain, address
from .streams import Streams
from .symm_pool import SymmPool
from .transport import BufferGeometry, CombineOutput, CombineRequest, DispatchOutput, DispatchRequest
from .version import __version__
from .work import Work

if TYPE_CHECKING:
    from .nvshmem import NvshmemRuntime, SymmBlock

R = TypeVar("R")

ALIGNMENT_ROOM = 256
"""Largest alignment of expert-major groups that buffers have room for."""
ROW_ALIGNMENT = 16
"""Bytes of which rows and their addresses are multiples."""


def _load() -> ModuleType:
    core = importlib.import_module("ray_deepep._cuda")
    if core.version != __version__:
        raise ImportError(f"the CUDA core is version {core.version}, the package {__version__}; build it again")
    return core


def core_version() -> tuple[str, str]:
    """Version of the CUDA core, or an empty string and what kept it from loading."""
    try:
        return _load().version, ""
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


@dataclasses.dataclass(kw_only=True)
class CudaPlan:
    """A plan in GPU memory, with the tensor that holds its arrays; ``memory`` begins with the counts. Not frozen, as
    requests are not; nobody writes to it."""

    core: object
    memory: torch.Tensor
    stream: int
    """Where the memory was allocated."""
    num_rows: int
    """Rows that there is room for."""


class CudaTransport:
    """One buffer over the GPUs of a domain; see :class:`~ray_deepep.transport.Transport`."""

    casts_rows = True
    takes_expert_rows = False

    def __init__(
        self,
        domain: ShmDomain,
        geometry: BufferGeometry,
        *,
        num_sms: int,
        heap_provider: str,
        nvshmem: NvshmemRuntime | None,
        on_fault: Callable[[FaultRecord], None],
    ) -> None:
        self._geometry, self._core, self._num_sms = geometry, _load(), num_sms
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._num_ranks, self._num_local = len(domain.peers), geometry.num_experts // len(domain.peers)
        self._errors = PublicErrors(domain, on_fault)
        self._lock = threading.Lock()
        self._streams = Streams(self.device)
        types = domain.core.DType
        self._dtypes = {
            torch.float32: types.FLOAT32,
            torch.bfloat16: types.BFLOAT16,
            torch.float16: types.FLOAT16,
            FLOAT8: types.FLOAT8_E4M3,
        }
        self._reduces = domain.core.Reduce
        self._kinds = domain.core.LayoutKind
        sizes = self._sizes(domain.rank)
        with self._errors:
            self._nvshmem, self._block = nvshmem, self._allocate(nvshmem, sizes)
        try:
            with self._errors:
                self._buffer = self._core.DeviceBuffer(
                    domain.core_domain,
                    sizes,
                    provider=self._provider(heap_provider),
                    segments=list(self._block.segments) if self._block else [],
                    bootstrap_deadline_s=domain.config.bootstrap_deadline_s,
                    deadline_s=domain.config.deadline_s,
                )
        except BaseException:
            self._release_block()
            raise
        self._pool = SymmPool(self._buffer.symm_address, self._buffer.symm_bytes)

    def _provider(self, heap_provider: str):
        kinds = self._core.HeapProvider
        if self._block is not None:
            return kinds.GIVEN
        vmm = heap_provider == "vmm" or (heap_provider == "auto" and self._core.vmm_supported(self.device.index))
        return kinds.VMM if vmm else kinds.IPC

    def _allocate(self, nvshmem: NvshmemRuntime | None, sizes) -> SymmBlock | None:
        """The heap's memory, where NVSHMEM gives it; collective."""
        if nvshmem is None:
            return None
        if nvshmem.device != self.device.index:
            rule = f"must be GPU {nvshmem.device}, on which NVSHMEM was brought up"
            raise InvalidArgumentError("device", self.device.index, rule)
        return nvshmem.allocate(self._core.segment_bytes(sizes))

    def _release_block(self) -> None:
        if self._block is not None:
            self._nvshmem.release(self._block)
            self._block = None

    def _sizes(self, rank: int):
        """Room for the worst case: every rank sends all its tokens here.

        With ``max_capacity`` the buffer serves padded dispatches, and a rank receives no more than its slots hold.
        """
        geometry = self._geometry
        received = self._num_ranks * geometry.max_tokens
        # A token may name one expert twice: no smaller bound than K routes.
        rows = received * geometry.num_topk + ALIGNMENT_ROOM * self._num_local
        if geometry.max_capacity:
            rows = geometry.num_experts * geometry.max_capacity
            received = min(received, rows)
        if geometry.max_rows is not None:
            rows = min(rows, geometry.max_rows)
            received = min(received, rows)
        sizes = self._core.DeviceSizes()
        sizes.rank, sizes.num_ranks, sizes.num_experts = rank, self._num_ranks, geometry.num_experts
        sizes.hidden, sizes.num_topk, sizes.max_tokens = geometry.hidden, geometry.num_topk, geometry.max_tokens
        sizes.max_recv_tokens, sizes.max_rows, sizes.symm_bytes = received, rows, geometry.symm_bytes
        sizes.max_element_size, sizes.bulk_copy = geometry.max_element_size, env.bulk_copy()
        self._max_recv_tokens, self._max_rows = received, rows
        return sizes

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
        plan = self._new_plan(request, num_tokens, num_topk, stream)
        token_major, recv_topk_idx = isinstance(request.layout, TokenMajor), None
        if token_major:
            recv_topk_idx = torch.empty(plan.num_rows, num_topk, dtype=torch.int64, device=self.device)
            recv_weights = torch.empty(plan.num_rows, num_topk, device=self.device)
        else:
            recv_weights = torch.empty(plan.num_rows, device=self.device)
        args = self._args(request, topk_idx, recv_topk_idx, recv_weights)
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
                plan=plan,
            )
        found = self._buffer.wait_counts()
        if found.overflow_rank >= 0:
            self._raise_overflow(request, found, plan.num_rows)
        x, x_scales = self._pull(request, args, plan, found.num_rows, num_sms, stream)
        return DispatchOutput(
            x=x,
            x_scales=x_scales,
            topk_idx=recv_topk_idx[: found.num_rows] if token_major else None,
            topk_weights=recv_weights[: found.num_rows],
            num_recv_tokens=found.num_recv_tokens,
            num_recv_tokens_per_expert=tuple(found.expert_count),
            expert_offsets=tuple(found.expert_offset) if isinstance(request.layout, ExpertMajor) else (),
            counts=plan.memory,
            plan=plan,
        )

    def _raise_overflow(self, request: DispatchRequest, found, room: int) -> None:
        if self._geometry.max_rows is not None:
            raise ReceiveOverflowError(found.overflow_rank, found.overflow_rows, room, "max_rows")
        # Only an alignment that buffers have no room for brings more than the worst case.
        rule = f"needs {found.overflow_rows} rows on rank {found.overflow_rank}, more than the buffer's {room}"
        raise InvalidArgumentError("layout", request.layout, rule)

    def _cached_dispatch(self, request: DispatchRequest, num_sms: int, stream: int) -> DispatchOutput:
        handle, plan = request.handle, request.handle.plan
        self._use_plan(plan, stream)
        args = self._args(request, None, None, None)
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
            plan=plan,
        )

    def combine(self, request: CombineRequest) -> CombineOutput:
        """See :meth:`Transport.combine`."""
        rows, handle = request.rows, request.handle
        check_rows("rows", rows)
        num_tokens, num_topk, hidden = handle.num_tokens, handle.num_topk, rows.shape[1]
        args, routes = self._core.CombineArgs(), None
        args.rows, args.num_rows, args.dtype = rows.data_ptr(), rows.shape[0], self._dtypes[rows.dtype]
        args.weighted, args.reduce = request.weighted, getattr(self._reduces, request.reduce)
        if request.bias is not None:
            check_rows("bias", request.bias)
            args.bias = request.bias.data_ptr()
        if request.keep_routes:
            routes = torch.empty(num_topk, num_tokens, hidden, dtype=rows.dtype, device=self.device)
            args.out_routes = routes.data_ptr()
        x = torch.empty(num_tokens, hidden, dtype=rows.dtype, device=self.device)
        args.out_x = x.data_ptr()
        home = self._combine(args, request.topk_weights, handle, request.num_sms)
        return CombineOutput(x=x, topk_weights=home, routes=routes)

    def combine_weights(self, topk_weights: torch.Tensor, handle: DispatchHandle, num_sms: int | None) -> torch.Tensor:
        """See :meth:`Transport.combine_weights`."""
        args = self._core.CombineArgs()
        args.has_rows, args.dtype = False, self._dtypes[torch.float32]
        return self._combine(args, topk_weights, handle, num_sms)

    def start(
        self, run: Callable[[], R], inputs: tuple[torch.Tensor | None, ...], after: torch.cuda.Event | None
    ) -> Work[R]:
        """See :meth:`Transport.start`."""
        return self._streams.start(run, inputs, after, lambda tensor: self._pool.holds(tensor.data_ptr()))

    def wait_for(self, after: torch.cuda.Event) -> None:
        """See :meth:`Transport.wait_for`."""
        self._streams.wait_for(after)

    def symm_empty(self, num_rows: int, dtype: torch.dtype) -> torch.Tensor:
        """See :meth:`Transport.symm_empty`."""
        shape = (num_rows, self._geometry.hidden)
        if num_rows == 0:
            return torch.empty(shape, dtype=dtype, device=self.device)
        self._streams.release_inputs()
        block = self._pool.take(num_rows * self._geometry.hidden * dtype.itemsize)
        return torch.as_tensor(block, device=self.device).view(dtype).view(shape)

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

    def counters(self) -> None:
        """See :meth:`Transport.counters`. Kernels count nothing."""

    def close(self) -> None:
        """Free this rank's memory; waits for its kernels, which stop waiting for peers."""
        with self._lock:
            self._buffer.close()
            self._release_block()

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

    def _new_plan(self, request: DispatchRequest, num_tokens: int, num_topk: int, stream: int) -> CudaPlan:
        """Room for a plan. One allocation for all arrays: each would cost the host some microseconds per dispatch."""
        layout, room = request.layout, request.max_recv_tokens
        kind, alignment, capacity = self._kinds.TOKEN_MAJOR, 1, 0
        received = num_rows = self._max_recv_tokens
        if isinstance(layout, ExpertMajor):
            kind, alignment, num_rows = self._kinds.EXPERT_MAJOR, layout.alignment, self._max_rows
        elif isinstance(layout, Padded):
            kind, capacity = self._kinds.PADDED, layout.capacity
            num_rows = self._geometry.num_experts * capacity
        if room is not None:
            received, num_rows = min(received, room), room
        num_ints = self._buffer.plan_ints(num_tokens, num_topk, received, num_rows)
        memory = torch.empty(num_ints, dtype=torch.int32, device=self.device)
        core = self._buffer.make_plan(
            memory.data_ptr(),
            num_tokens,
            num_topk,
            received,
            num_rows,
            kind,
            alignment,
            capacity,
            room is not None,
        )
        return CudaPlan(core=core, memory=memory, stream=stream, num_rows=num_rows)

    def _use_plan(self, plan: CudaPlan, stream: int) -> None:
        if plan.stream != stream:
            plan.memory.record_stream(torch.cuda.current_stream(self.device))

    def _args(
        self,
        request: DispatchRequest,
        topk_idx: torch.Tensor | None,
        recv_topk_idx: torch.Tensor | None,
        recv_weights: torch.Tensor | None,
    ):
        """What both halves of a dispatch need; ``_pull`` adds the outputs for rows."""
        x, cast = request.x, request.cast
        return self._core.DispatchArgs(
            x=x.data_ptr(),
            x_scales=address(request.x_scales),
            topk_idx=address(topk_idx),
            topk_weights=address(request.topk_weights),
            locations=address(request.locations),
            dtype=self._dtypes[x.dtype if cast is None else FLOAT8],
            x_dtype=self._dtypes[x.dtype],
            power_of_two=cast is not None and cast.scale_format == "power_of_two",
            scale_by_weights=request.scale_by_weights,
            out_topk_idx=address(recv_topk_idx),
            out_topk_weights=address(recv_weights),
        )

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
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rows and their scales."""
        hidden, dtype, x_scales = self._geometry.hidden, request.x.dtype, None
        if request.cast is not None:
            dtype = FLOAT8
        x = torch.empty(num_rows, hidden, dtype=dtype, device=self.device)
        args.out_x = x.data_ptr()
        if dtype is FLOAT8:
            x_scales = torch.empty(num_rows, hidden // SCALE_BLOCK, device=self.device)
            args.out_scales = x_scales.data_ptr()
        self._buffer.pull_dispatch(args, plan.core, cached, num_sms, stream)
        return x, x_scales


def check_rows(name: str, rows: torch.Tensor) -> None:
    """Kernels move rows in pieces of 16 bytes; an address in between would end the process's CUDA context.

    Raises:
        InvalidArgumentError: rows have another size, or the first one begins elsewhere.
    """
    row_bytes = rows.shape[1] * rows.element_size()
    if row_bytes % ROW_ALIGNMENT:
        rule = f"rows must be a multiple of {ROW_ALIGNMENT} bytes, not {row_bytes}"
        raise InvalidArgumentError(name, tuple(rows.shape), rule)
    check_address(name, rows)


def check_address(name: str, tensor: torch.Tensor) -> None:
    """A view into another tensor may begin anywhere.

    Raises:
        InvalidArgumentError: ``tensor`` begins between multiples of 16 bytes.
    """
    begin = tensor.data_ptr()
    if begin % ROW_ALIGNMENT:
        rule = f"must begin at a multiple of {ROW_ALIGNMENT} bytes in memory (call .clone())"
        raise InvalidArgumentError(name, f"address {begin:#x}", rule)
