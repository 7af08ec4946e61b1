"""Transport ``cuda``: the compiled CUDA core, for ranks whose GPUs reach each other's memory (one NVLink domain).

As ``shm.py``, this file unpacks torch tensors for a compiled core (``ray_deepep._cuda``) and allocates outputs. Work
runs on the current CUDA stream. The host waits once per new dispatch, for the counts that give the outputs their sizes.
"""

from __future__ import annotations

import dataclasses
import importlib
import threading
from collections.abc import Callable
from types import ModuleType

import torch

from .checks import SCALE_BLOCK
from .core_errors import public_errors
from .errors import FaultRecord, InvalidArgumentError
from .handle import DispatchHandle, ExpertMajor, Padded, TokenMajor
from .shm import ShmDomain, address
from .transport import BufferGeometry, CombineOutput, CombineRequest, DispatchOutput, DispatchRequest
from .version import __version__

ALIGNMENT_ROOM = 256
"""Largest alignment of expert-major groups that buffers have room for."""


def _load() -> ModuleType:
    core = importlib.import_module("ray_deepep._cuda")
    if core.version != __version__:
        raise ImportError(f"the CUDA core is version {core.version}, the package {__version__}; build it again")
    return core


def cuda_problem() -> str:
    """Why this process cannot use the CUDA core; empty if it can."""
    try:
        _load()
    except ImportError as error:
        return f"no CUDA core ({error})"
    return "" if torch.cuda.is_available() else "torch sees no GPU"


def gpu_uuid() -> str:
    """UUID of the current GPU."""
    return str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CudaPlan:
    """A plan in GPU memory, with the tensor that holds its arrays."""

    core: object
    memory: torch.Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Coming:
    """What a dispatch will bring, known before its rows are pulled; fields as in ``DispatchOutput``."""

    num_rows: int
    num_recv_tokens: int
    num_recv_tokens_per_expert: tuple[int, ...]
    expert_offsets: tuple[int, ...]
    topk_idx: torch.Tensor | None
    topk_weights: torch.Tensor | None
    plan: CudaPlan


class CudaTransport:
    """One buffer over the GPUs of a domain; see :class:`~ray_deepep.transport.Transport`."""

    device_type = "cuda"

    def __init__(
        self,
        domain: ShmDomain,
        geometry: BufferGeometry,
        *,
        num_sms: int,
        heap_provider: str,
        on_fault: Callable[[FaultRecord], None],
    ) -> None:
        self._geometry, self._core, self._num_sms = geometry, _load(), num_sms
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._num_ranks, self._num_local = len(domain.peers), geometry.num_experts // len(domain.peers)
        self._errors = lambda: public_errors(domain, on_fault)
        self._lock = threading.Lock()
        types = domain.core.DType
        self._dtypes = {
            torch.float32: types.FLOAT32,
            torch.bfloat16: types.BFLOAT16,
            torch.float16: types.FLOAT16,
            torch.float8_e4m3fn: types.FLOAT8_E4M3,
        }
        self._reduces = domain.core.Reduce
        self._kinds = domain.core.LayoutKind
        sizes = self._sizes(domain.rank)
        vmm = heap_provider == "vmm" or (heap_provider == "auto" and self._core.vmm_supported(self.device.index))
        with self._errors():
            self._buffer = self._core.DeviceBuffer(
                domain.core_domain,
                sizes,
                provider=self._core.HeapProvider.VMM if vmm else self._core.HeapProvider.IPC,
                bootstrap_deadline_s=domain.config.bootstrap_deadline_s,
                deadline_s=domain.config.deadline_s,
            )

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
        sizes = self._core.DeviceSizes()
        sizes.rank, sizes.num_ranks, sizes.num_experts = rank, self._num_ranks, geometry.num_experts
        sizes.hidden, sizes.num_topk, sizes.max_tokens = geometry.hidden, geometry.num_topk, geometry.max_tokens
        sizes.max_recv_tokens = received
        sizes.max_rows = rows
        self._max_recv_tokens, self._max_rows = received, rows
        return sizes

    def dispatch(self, request: DispatchRequest) -> DispatchOutput:
        """See :meth:`Transport.dispatch`."""
        self._check_row_bytes("x", request.x)
        args = self._core.DispatchArgs()
        args.x, args.x_scales, args.dtype = address(request.x), address(request.x_scales), self._dtypes[request.x.dtype]
        args.scale_by_weights = request.scale_by_weights
        stream = torch.cuda.current_stream().cuda_stream
        with self._lock, self._errors():
            begin = self._begin_new if request.handle is None else self._begin_cached
            coming = begin(request, args, stream)
            x = torch.empty(coming.num_rows, self._geometry.hidden, dtype=request.x.dtype, device=self.device)
            x_scales = None
            if request.x_scales is not None:
                x_scales = torch.empty(coming.num_rows, self._geometry.hidden // SCALE_BLOCK, device=self.device)
            args.out_x, args.out_scales = address(x), address(x_scales)
            cached = request.handle is not None
            self._buffer.pull_dispatch(args, coming.plan.core, cached, self._num_sms, stream)
        return DispatchOutput(
            x=x,
            x_scales=x_scales,
            topk_idx=coming.topk_idx,
            topk_weights=coming.topk_weights,
            num_recv_tokens=coming.num_recv_tokens,
            num_recv_tokens_per_expert=coming.num_recv_tokens_per_expert,
            expert_offsets=coming.expert_offsets,
            plan=coming.plan,
        )

    def _begin_cached(self, request: DispatchRequest, args, stream: int) -> _Coming:
        handle = request.handle
        self._buffer.begin_cached_dispatch(args, handle.plan.core, self._num_sms, stream)
        return _Coming(
            num_rows=handle.num_rows,
            num_recv_tokens=handle.num_recv_tokens,
            num_recv_tokens_per_expert=handle.num_recv_tokens_per_expert,
            expert_offsets=handle.expert_offsets,
            topk_idx=None,
            topk_weights=None,
            plan=handle.plan,
        )

    def _begin_new(self, request: DispatchRequest, args, stream: int) -> _Coming:
        plan = self._new_plan(request)
        args.topk_idx, args.topk_weights = address(request.topk_idx), address(request.topk_weights)
        args.locations = address(request.locations)
        topk_idx, topk_weights = self._routing_outputs(request)
        args.out_topk_idx, args.out_topk_weights = address(topk_idx), address(topk_weights)
        self._buffer.begin_dispatch(args, plan.core, True, self._num_sms, stream)
        found = self._buffer.wait_counts()
        if found.overflow:
            rule = f"needs {found.num_rows} rows, more than the buffer's {self._max_rows}"
            raise InvalidArgumentError("layout", request.layout, rule)
        token_major = isinstance(request.layout, TokenMajor)
        return _Coming(
            num_rows=found.num_rows,
            num_recv_tokens=found.num_recv_tokens,
            num_recv_tokens_per_expert=tuple(found.expert_count),
            expert_offsets=tuple(found.expert_offset) if isinstance(request.layout, ExpertMajor) else (),
            topk_idx=topk_idx[: found.num_recv_tokens] if token_major else None,
            topk_weights=topk_weights[: found.num_rows],
            plan=plan,
        )

    def combine(self, request: CombineRequest) -> CombineOutput:
        """See :meth:`Transport.combine`."""
        rows, handle = request.rows, request.handle
        self._check_row_bytes("rows", rows)
        args = self._core.CombineArgs()
        args.rows, args.num_rows, args.dtype = address(rows), rows.shape[0], self._dtypes[rows.dtype]
        args.bias, args.weighted = address(request.bias), request.weighted
        args.reduce = getattr(self._reduces, request.reduce)
        num_tokens, num_topk, hidden = handle.num_tokens, handle.num_topk, rows.shape[1]
        weights = request.topk_weights
        output = CombineOutput(
            x=torch.empty(num_tokens, hidden, dtype=rows.dtype, device=self.device),
            topk_weights=None if weights is None else torch.empty(num_tokens, num_topk, device=self.device),
            routes=torch.empty(num_topk, num_tokens, hidden, dtype=rows.dtype, device=self.device)
            if request.keep_routes
            else None,
        )
        args.out_x, args.out_topk_weights, args.out_routes = map(
            address, (output.x, output.topk_weights, output.routes)
        )
        self._combine(args, weights, handle)
        return output

    def combine_weights(self, topk_weights: torch.Tensor, handle: DispatchHandle) -> torch.Tensor:
        """See :meth:`Transport.combine_weights`."""
        home = torch.empty(handle.num_tokens, handle.num_topk, device=self.device)
        args = self._core.CombineArgs()
        args.has_rows, args.dtype, args.out_topk_weights = False, self._dtypes[torch.float32], address(home)
        self._combine(args, topk_weights, handle)
        return home

    def check(self) -> None:
        """See :meth:`Transport.check`."""
        with self._lock, self._errors():
            self._buffer.check()

    def close(self) -> None:
        """Free this rank's memory; waits for its kernels, which stop waiting for peers."""
        with self._lock:
            self._buffer.close()

    def _combine(self, args, weights: torch.Tensor | None, handle: DispatchHandle) -> None:
        if weights is not None:
            args.has_row_weights, args.row_weights, args.num_row_weights = True, address(weights), weights.numel()
        with self._lock, self._errors():
            self._buffer.combine(args, handle.plan.core, self._num_sms, torch.cuda.current_stream().cuda_stream)

    def _new_plan(self, request: DispatchRequest) -> CudaPlan:
        """Room for a plan. One allocation for all arrays: each would cost the host some microseconds per dispatch."""
        num_tokens, num_topk = request.topk_idx.shape
        received, rows = self._max_recv_tokens, self._max_rows
        sizes = {
            "recv_source": received,
            "recv_token": received,
            "recv_slot": received * num_topk,
            "recv_weight": received * num_topk,
            "slot_row": rows,
            "send_expert": num_tokens * num_topk,
            "send_row": num_tokens * num_topk,
            "send_slot": num_tokens * num_topk,
            "send_weight": num_tokens * num_topk,
            "counts": 3 + 2 * self._num_local,
        }
        memory = torch.empty(sum(sizes.values()), dtype=torch.int32, device=self.device)
        plan, address_of_next = self._core.DevicePlan(), memory.data_ptr()
        for name, size in sizes.items():
            setattr(plan, name, address_of_next)
            address_of_next += 4 * size
        plan.num_tokens, plan.num_topk = num_tokens, num_topk
        plan.max_recv_tokens, plan.max_rows = received, rows
        layout = request.layout
        if isinstance(layout, ExpertMajor):
            plan.layout, plan.alignment = self._kinds.EXPERT_MAJOR, layout.alignment
        elif isinstance(layout, Padded):
            plan.layout, plan.capacity = self._kinds.PADDED, layout.capacity
        else:
            plan.layout = self._kinds.TOKEN_MAJOR
        return CudaPlan(core=plan, memory=memory)

    def _routing_outputs(self, request: DispatchRequest) -> tuple[torch.Tensor | None, torch.Tensor]:
        if isinstance(request.layout, TokenMajor):
            shape = (self._max_recv_tokens, request.topk_idx.shape[1])
            topk_idx = torch.empty(shape, dtype=torch.int64, device=self.device)
            return topk_idx, torch.empty(shape, device=self.device)
        return None, torch.zeros(self._max_rows, device=self.device)

    def _check_row_bytes(self, name: str, rows: torch.Tensor) -> None:
        row_bytes = rows.shape[1] * rows.element_size()
        if row_bytes % 16:
            raise InvalidArgumentError(name, tuple(rows.shape), f"rows must be a multiple of 16 bytes, not {row_bytes}")
