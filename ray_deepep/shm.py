"""Transport ``shm``: the compiled CPU core over shared memory, for ranks of one host.

It unpacks torch tensors into addresses for ``ray_deepep._core`` and allocates outputs.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import threading
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from .config import CommConfig
from .core_errors import PublicErrors
from .errors import FaultRecord
from .fixed_shapes import fit_output, fit_rows, host_counts
from .float8 import SCALE_BLOCK
from .handle import DispatchHandle, ExpertMajor, Layout, Padded, TokenMajor
from .symm_pool import SymmPool
from .telemetry import TransportCounters
from .transport import (
    BlockingTransport,
    BufferGeometry,
    CombineOutput,
    CombineRequest,
    DispatchOutput,
    DispatchRequest,
)
from .version import __version__

if TYPE_CHECKING:
    from .rank_info import Exchange, RankInfo


def _load() -> ModuleType:
    core = importlib.import_module("ray_deepep._core")
    if core.version != __version__:
        raise ImportError(f"the compiled core is version {core.version}, the package {__version__}; build it again")
    return core


def core_version() -> tuple[str, str]:
    """Version of the compiled core, or an empty string and what kept it from loading."""
    try:
        return _load().version, ""
    except ImportError as error:
        return "", str(error)


def machine_id() -> str:
    """Equal in two processes exactly if they can share memory: same boot, network namespace and user."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip()
        namespace = os.readlink("/proc/self/ns/net")
    except OSError as error:
        return f"pid {os.getpid()}: {error}"
    return f"{boot} {namespace} uid {os.geteuid()}"


POOLED_BYTES = 256 * 1024
"""Outputs from this size on take their memory from a pool, which saves the page faults of fresh memory."""
MAX_IDLE_BYTES = 1 << 30
"""Memory that a pool keeps while nobody uses it."""


class ShmDomain:
    """The ranks of one host, connected: what buffers of transport ``shm`` are made from.

    Args:
        exchange: among these ranks.
        peers: what they told; their ``rank`` is that in the communicator, which may have more ranks than the domain.
        rank: of this process in the domain.
        config: of the communicator.

    Raises:
        BootstrapError: naming the ranks that did not connect within ``config.bootstrap_deadline_s``.
    """

    def __init__(self, exchange: Exchange, *, peers: tuple[RankInfo, ...], rank: int, config: CommConfig) -> None:
        self.config, self.peers, self.rank = config, peers, rank
        self.hop_peers: tuple[RankInfo, ...] = ()
        """Ranks of the same local rank, by node, where there are several."""
        self.core = _load()
        self.num_threads = config.num_threads or max(1, len(os.sched_getaffinity(0)) // len(peers))
        types = self.core.DType
        self.dtypes = {
            torch.float32: types.FLOAT32,
            torch.bfloat16: types.BFLOAT16,
            torch.float16: types.FLOAT16,
            torch.float8_e4m3fn: types.FLOAT8_E4M3,
        }
        self._pool = self.core.BlockPool(MAX_IDLE_BYTES)
        self._domain = self.core.Domain(rank, len(peers))
        payload = json.dumps([self._domain.address, self._domain.secret]).encode()
        offers = [json.loads(offer) for offer in exchange("connect", payload)]
        with PublicErrors(self, lambda record: record):
            addresses, secrets = zip(*offers)
            self._domain.connect(list(addresses), list(secrets), config.bootstrap_deadline_s)

    @property
    def core_domain(self):
        """The core's own object, from which the CUDA core makes buffers too."""
        return self._domain

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """As ``torch.empty``; the memory of a large tensor comes from this domain's pool and goes back when it dies."""
        return pooled_empty(self._pool, *shape, dtype=dtype)

    def make_buffer(self, geometry: BufferGeometry):
        """A core buffer; collective."""
        sizes = self.core.BufferSizes()
        sizes.num_experts, sizes.hidden, sizes.num_topk = geometry.num_experts, geometry.hidden, geometry.num_topk
        sizes.max_tokens, sizes.max_capacity = geometry.max_tokens, geometry.max_capacity
        sizes.symm_bytes, sizes.num_parts = geometry.symm_bytes, geometry.num_parts
        sizes.low_latency_max_tokens = geometry.low_latency_max_tokens
        sizes.max_segment_bytes = int(self.config.heap_gib * 2**30)
        return self.core.HostBuffer(
            self._domain,
            sizes,
            bootstrap_deadline_s=self.config.bootstrap_deadline_s,
            deadline_s=self.config.deadline_s,
            num_threads=self.num_threads,
        )

    def close(self) -> None:
        """Hang up; peers that wait for this rank learn it at once."""
        self._domain.close()


class ShmTransport(BlockingTransport):
    """One buffer over shared memory; see :class:`~ray_deepep.transport.Transport`."""

    device = torch.device("cpu")
    takes_expert_rows = True
    takes_parts = True

    def __init__(
        self, domain: ShmDomain, geometry: BufferGeometry, *, on_fault: Callable[[FaultRecord], FaultRecord]
    ) -> None:
        self._geometry, self._core, self._empty = geometry, domain.core, domain.empty
        self._rank = domain.peers[domain.rank].rank
        self._errors = PublicErrors(domain, on_fault)
        # The autograd engine calls backward from threads of its own.
        self._lock = threading.Lock()
        self._dtypes = domain.dtypes
        with self._errors:
            self._buffer = domain.make_buffer(geometry)
            self._region = self._buffer.symm_region()
        self.symm_pool = SymmPool(self._region.address, self._region.num_bytes)

    def dispatch(self, request: DispatchRequest) -> DispatchOutput:
        """See :meth:`Transport.dispatch`."""
        args = self._core.DispatchArgs()
        args.x, args.dtype, args.num_tokens = request.x.data_ptr(), self._dtypes[request.x.dtype], len(request.x)
        args.x_scales = address(request.x_scales)
        args.scale_by_weights, args.max_recv_tokens = request.scale_by_weights, request.max_recv_tokens or 0
        args.layout = self._layout(request.layout)
        with self._lock, self._errors:
            if request.handle is not None:
                plan = request.handle.plan
                self._buffer.begin_cached_dispatch(args, plan)
            else:
                topk_idx, topk_weights = request.topk_idx.to(torch.int64), request.topk_weights
                if topk_weights is None:
                    topk_weights = torch.ones(topk_idx.shape)
                args.topk_idx, args.topk_weights = address(topk_idx), address(topk_weights)
                args.locations = address(request.locations)
                args.num_topk, args.part_tokens = topk_idx.shape[1], list(request.part_tokens)
                plan = self._buffer.begin_dispatch(args)
            output = self._allocate(request, plan)
            out = self._core.DispatchOutputs()
            out.x, out.x_scales = address(output.x), address(output.x_scales)
            out.topk_idx, out.topk_weights = address(output.topk_idx), address(output.topk_weights)
            self._buffer.pull_dispatch(args, plan, out)
        return fit_output(output, request.max_recv_tokens, token_major=isinstance(request.layout, TokenMajor))

    def combine(self, request: CombineRequest) -> CombineOutput:
        """See :meth:`Transport.combine`."""
        handle, plan = request.handle, request.handle.plan
        weights = self._row_weights(request.topk_weights, handle)
        args = self._core.CombineArgs()
        if request.expert_rows:
            rows = request.expert_rows[0]
            args.expert_rows = [block.data_ptr() for block in request.expert_rows]
        else:
            rows = fit_rows(request.rows, plan.num_rows)
            args.rows = rows.data_ptr()
        args.dtype, args.bias = self._dtypes[rows.dtype], address(request.bias)
        args.weighted, args.reduce = request.weighted, getattr(self._core.Reduce, request.reduce)
        args.row_weights, args.has_row_weights = address(weights), weights is not None
        args.routes_only = request.num_routes is not None
        num_tokens, num_topk, hidden = handle.num_tokens, handle.num_topk, rows.shape[1]
        shape = (request.num_routes,) if args.routes_only else (num_topk, num_tokens)
        output = CombineOutput(
            x=None if args.routes_only else self._empty(num_tokens, hidden, dtype=rows.dtype),
            topk_weights=self._empty(num_tokens, num_topk) if args.has_row_weights else None,
            routes=self._empty(*shape, hidden, dtype=rows.dtype) if args.routes_only or request.keep_routes else None,
        )
        out = self._core.CombineOutputs()
        out.x, out.topk_weights, out.routes = map(address, (output.x, output.topk_weights, output.routes))
        with self._lock, self._errors:
            self._buffer.combine(args, plan, out)
        return output

    def combine_weights(self, topk_weights: torch.Tensor, handle: DispatchHandle, num_sms: int | None) -> torch.Tensor:
        """See :meth:`Transport.combine_weights`."""
        topk_weights = self._row_weights(topk_weights, handle)
        args, out = self._core.CombineArgs(), self._core.CombineOutputs()
        args.has_rows, args.has_row_weights, args.row_weights = False, True, topk_weights.data_ptr()
        home = self._empty(handle.num_tokens, handle.num_topk)
        out.topk_weights = home.data_ptr()
        with self._lock, self._errors:
            self._buffer.combine(args, handle.plan, out)
        return home

    def symm_empty(self, num_rows: int, dtype: torch.dtype) -> torch.Tensor:
        """See :meth:`Transport.symm_empty`."""
        shape = (num_rows, self._geometry.hidden)
        num_bytes = math.prod(shape) * dtype.itemsize
        if num_bytes == 0 or self.symm_pool.num_bytes == 0:
            return torch.empty(shape, dtype=dtype)
        block = self.symm_pool.take(num_bytes)
        held = self._region.bytes(block.address, num_bytes, owner=block)
        return torch.frombuffer(held, dtype=torch.uint8).view(dtype).view(shape)

    @property
    def symm_region(self):
        """The room for tensors of ``symm_empty``, as the core knows it."""
        return self._region

    def fault_record(self) -> FaultRecord | None:
        """See :meth:`Transport.fault_record`."""
        return self._errors.record(self._buffer.fault_record())

    def counters(self) -> TransportCounters | None:
        """See :meth:`Transport.counters`. Operations use two areas by turns."""
        wait_ns, recv_bytes, used_bytes = self._buffer.traffic()
        heap_bytes = 2 * used_bytes + self.symm_pool.num_bytes - self.symm_pool.free_bytes()
        return TransportCounters(wait_ns=tuple(wait_ns), recv_bytes=tuple(recv_bytes), heap_bytes=heap_bytes)

    def close(self) -> None:
        """Free this rank's mappings; that of the heap stays while tensors of ``symm_empty`` live."""
        with self._lock:
            self._buffer.close()
            self._region = None

    @staticmethod
    def _row_weights(topk_weights: torch.Tensor | None, handle: DispatchHandle) -> torch.Tensor | None:
        """With as many rows as the plan has."""
        return None if topk_weights is None else fit_rows(topk_weights, handle.plan.num_rows)

    def _layout(self, layout: Layout):
        kinds = self._core.LayoutKind
        if isinstance(layout, ExpertMajor):
            return self._core.Layout(kinds.EXPERT_MAJOR, alignment=layout.alignment)
        if isinstance(layout, Padded):
            return self._core.Layout(kinds.PADDED, capacity=layout.capacity)
        return self._core.Layout(kinds.TOKEN_MAJOR)

    def _allocate(self, request: DispatchRequest, plan) -> DispatchOutput:
        rows, received = plan.num_rows, plan.num_recv_tokens
        hidden, cached = request.x.shape[1], request.handle is not None
        per_expert = tuple(plan.expert_count)
        offsets = tuple(plan.expert_offset) if isinstance(request.layout, ExpertMajor) else ()
        scales = None
        if request.x_scales is not None:
            scales = self._empty(rows, hidden // SCALE_BLOCK, dtype=torch.float32)
        topk_idx = topk_weights = None
        if isinstance(request.layout, TokenMajor):
            num_topk = request.handle.num_topk if cached else request.topk_idx.shape[1]
            topk_idx = None if cached else self._empty(received, num_topk, dtype=torch.int64)
            topk_weights = None if cached else self._empty(received, num_topk, dtype=torch.float32)
        elif not cached:
            topk_weights = self._empty(rows, dtype=torch.float32)
        return DispatchOutput(
            x=self._empty(rows, hidden, dtype=request.x.dtype),
            x_scales=scales,
            topk_idx=topk_idx,
            topk_weights=topk_weights,
            num_recv_tokens=received,
            num_recv_tokens_per_expert=per_expert,
            expert_offsets=offsets,
            counts=host_counts(
                rank=self._rank,
                num_recv_tokens=received,
                num_rows=rows,
                num_recv_tokens_per_expert=per_expert,
                expert_offsets=offsets,
                max_recv_tokens=request.max_recv_tokens,
                device=self.device,
            ),
            plan=plan,
        )


def pooled_empty(pool, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    """As ``torch.empty``, on memory of a core's ``BlockPool`` where the tensor is large."""
    count = math.prod(shape)
    if count * dtype.itemsize < POOLED_BYTES:
        return torch.empty(shape, dtype=dtype)
    block = pool.take(count * dtype.itemsize)
    return torch.frombuffer(block, dtype=dtype, count=count).view(shape)


def address(tensor: torch.Tensor | None) -> int:
    """Address of a tensor's data, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()
