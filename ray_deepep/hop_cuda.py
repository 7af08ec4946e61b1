"""Several nodes of GPUs: NVSHMEM's hop in front of transport ``cuda``.

As ``hop.py`` on CPUs, but no host takes part: kernels (``csrc/nvshmem``) put each row once per (token, node) into the
zone of the rank with the same local rank, and wait there for what other nodes put. A token has a fixed place in the
zone, with no expert where it has none on this node, so nobody tells counts; the zone is then the tokens of an ordinary
dispatch inside the node, in one part for each node.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from .cuda import CudaTransport
from .cuda_arguments import check_address, check_rows, core_dtypes
from .errors import FaultRecord, InvalidArgumentError
from .handle import DispatchHandle, Padded
from .hop_zone import HopRoutes, HopZone, cuda_domain_geometry, hop_sizes, part_tokens
from .plan_reference import is_token_major
from .reference import reduce_exact, reduce_expert_order, spelled_out
from .shm import address
from .transport import (
    BufferGeometry,
    CombineOutput,
    CombineRequest,
    DispatchOutput,
    DispatchRequest,
    make_handle,
)
from .work import Work

if TYPE_CHECKING:
    from .communicator import Communicator
    from .nvshmem import NvshmemRuntime
    from .shm import ShmDomain

R = TypeVar("R")

_GRACE_S = 0.3
"""When a wait inside the node comes to its deadline, the cause may be on another node, and just about to be found."""
_LOOK_EVERY_S = 1.0
"""How often the board of faults is asked while kernels may wait."""


@dataclasses.dataclass(kw_only=True)
class CudaHopPlan:
    """The hop of a dispatch; not frozen, as requests are not. M nodes, room for P tokens of each."""

    sequence: int
    """Number of the dispatch that made the plan."""
    topk_idx: torch.Tensor
    """``[T, K]`` int64: this rank's own routing, global ids."""
    topk_weights: torch.Tensor
    """``[T, K]`` float32: its own weights."""
    landed_idx: torch.Tensor
    """``[M, P, K]`` int64: experts of this node that landed tokens want, counted from the node's first; -1: none."""
    domain_handle: DispatchHandle
    """Of the dispatch of the landed tokens inside the node."""


class CudaHopTransport:
    """One buffer over the GPUs of several nodes; see :class:`~ray_deepep.transport.Transport`.

    Operations are not captured in CUDA graphs: the places of their rows alternate with each call.
    """

    casts_rows = False
    takes_expert_rows = False
    takes_parts = False
    can_capture = False

    def __init__(
        self,
        comm: Communicator,
        domain: ShmDomain,
        geometry: BufferGeometry,
        *,
        num_sms: int,
        nvshmem: NvshmemRuntime,
    ) -> None:
        self._comm, self._geometry, self._num_sms, self._nvshmem = comm, geometry, num_sms, nvshmem
        self._core, self._lock = nvshmem.core, threading.Lock()
        zone_bytes = self._core.hop_zone_bytes(hop_sizes(self._core, geometry, comm.domains))
        nvshmem.init_device()
        self._domain = CudaTransport(
            domain,
            cuda_domain_geometry(geometry, comm.domains.num_nodes, zone_bytes),
            num_sms=num_sms,
            heap_provider="nvshmem",
            nvshmem=nvshmem,
            on_fault=self._domain_fault,
        )
        self.device, self._dtypes = self._domain.device, core_dtypes(domain.core)
        self._zone = HopZone(
            self._core,
            geometry,
            comm.domains,
            inside=self._domain,
            nvshmem=nvshmem,
            deadline_s=comm.config.deadline_s,
        )
        self._routes: HopRoutes | None = None
        self._sequence = 0
        self._looked = 0.0

    def dispatch(self, request: DispatchRequest) -> DispatchOutput:
        """See :meth:`Transport.dispatch`."""
        self._refuse_capture()
        check_rows("x", request.x)
        if request.x_scales is not None:
            check_address("x_scales", request.x_scales)
        with self._lock:
            return self._new_dispatch(request) if request.handle is None else self._cached_dispatch(request)

    def _new_dispatch(self, request: DispatchRequest) -> DispatchOutput:
        request = spelled_out(request)
        num_topk = request.topk_idx.shape[1]
        self._send(request, request.topk_idx, cached=False)
        landed_idx = self._zone.landed_idx(self._sequence, num_topk)
        inner = dataclasses.replace(
            self._landed(request),
            # int64 [M * P, K]; a copy, for the zone is written again.
            topk_idx=landed_idx.clone().flatten(0, 1),
            topk_weights=self._zone.landed_weights(self._sequence, num_topk).flatten(0, 1),
            locations=self._zone.landed_places(self._sequence, num_topk).flatten(0, 1)
            if isinstance(request.layout, Padded)
            else None,
            part_tokens=(part_tokens(self._geometry),) * self._comm.domains.num_nodes,
        )
        with self._experts_of_all_nodes():
            output = self._domain.dispatch(inner)
        handle = make_handle(
            inner,
            output,
            num_ranks=self._comm.domains.domain_size,
            num_local_experts=self._geometry.num_experts // self._comm.num_ranks,
            check_faults=self.check,
            owner=0,
        )
        plan = CudaHopPlan(
            sequence=self._sequence,
            topk_idx=request.topk_idx,
            topk_weights=request.topk_weights,
            landed_idx=inner.topk_idx.view_as(landed_idx),
            domain_handle=handle,
        )
        return dataclasses.replace(output, plan=plan)

    def _cached_dispatch(self, request: DispatchRequest) -> DispatchOutput:
        plan: CudaHopPlan = request.handle.plan
        self._use_plan(plan)
        self._send(request, plan.topk_idx, cached=True, plan=plan.sequence)
        inner = dataclasses.replace(self._landed(request), handle=plan.domain_handle)
        return dataclasses.replace(self._domain.dispatch(inner), plan=plan)

    def combine(self, request: CombineRequest) -> CombineOutput:
        """See :meth:`Transport.combine`."""
        self._refuse_capture()
        check_rows("rows", request.rows)
        if request.bias is not None:
            check_rows("bias", request.bias)
        by_rank = is_token_major(request.handle.layout) or request.reduce == "fast"
        with self._lock:
            return self._combine_sums(request) if by_rank else self._combine_routes(request)

    def _combine_sums(self, request: CombineRequest) -> CombineOutput:
        """Add up inside each node first, then over nodes."""
        handle, plan, dtype = request.handle, request.handle.plan, request.rows.dtype
        call = self._call_along(handle, "combine", request.num_sms, **_asked(request))
        staged = self._zone.staged_rows(self._sequence, dtype)
        inner = dataclasses.replace(request, handle=plan.domain_handle, bias=None, keep_routes=False)
        output = self._domain.combine(inner, out=staged)
        weights = output.topk_weights is not None
        if weights:
            self._stage_weights(output.topk_weights, handle)
        x = torch.empty(handle.num_tokens, staged.shape[1], dtype=dtype, device=self.device)
        home = torch.empty(handle.num_tokens, handle.num_topk, device=self.device) if weights else None
        with self._domain.launching() as stream:
            self._zone.hop.give_back(call, plan.landed_idx.data_ptr(), dtype.itemsize, weights, stream)
            self._zone.hop.sum(
                call,
                plan.topk_idx.data_ptr(),
                address(request.bias),
                x.data_ptr(),
                address(home),
                self._dtypes[dtype],
                stream,
            )
        return CombineOutput(x=x, topk_weights=home, routes=None)

    def _combine_routes(self, request: CombineRequest) -> CombineOutput:
        """Bring every route's row home and add up there."""
        handle, plan, dtype = request.handle, request.handle.plan, request.rows.dtype
        call = self._call_along(handle, "combine", request.num_sms, **_asked(request))
        if self._routes is None:
            domains = self._comm.domains
            self._routes = HopRoutes(self._geometry, domains, nvshmem=self._nvshmem, device=self.device)
        routes = self._routes.routes(self._sequence, handle.num_topk, dtype)
        home = self._routes.home(self._sequence, handle.num_topk, dtype)
        inner = dataclasses.replace(request, handle=plan.domain_handle, bias=None, keep_routes=True, weighted=False)
        weights = self._domain.combine(inner, out_routes=routes).topk_weights
        with self._domain.launching() as stream:
            self._zone.hop.give_routes_back(
                call, plan.landed_idx.data_ptr(), routes.data_ptr(), home.data_ptr(), dtype.itemsize, stream
            )
            # Within the launches of the operation: the next but one writes to the same rows.
            total, kept = self._reduce_routes(request, home[: handle.num_tokens])
        back = None if weights is None else self._weights_home(weights, handle, request.num_sms)
        return CombineOutput(x=total.to(dtype), topk_weights=back, routes=kept)

    def _reduce_routes(self, request: CombineRequest, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Sums ``[T, H]`` float32, and ``[K, T, H]`` if asked to keep the routes' rows; ``rows``: ``[T, K, H]``."""
        plan: CudaHopPlan = request.handle.plan
        # An expert out of range, which the handle reports, has no row.
        topk_idx = torch.where(plan.topk_idx < self._geometry.num_experts, plan.topk_idx, -1)
        reduce = reduce_exact if request.reduce == "exact" else reduce_expert_order
        total = reduce(rows, topk_idx, plan.topk_weights if request.weighted else None)
        if request.bias is not None:
            total += request.bias.float()
        if not request.keep_routes:
            return total, None
        return total, torch.where(topk_idx.unsqueeze(-1) >= 0, rows, 0).transpose(0, 1).contiguous()

    def combine_weights(self, topk_weights: torch.Tensor, handle: DispatchHandle, num_sms: int | None) -> torch.Tensor:
        """See :meth:`Transport.combine_weights`."""
        self._refuse_capture()
        with self._lock:
            landed = self._domain.combine_weights(topk_weights, handle.plan.domain_handle, num_sms)
            return self._weights_home(landed, handle, num_sms)

    def _weights_home(self, landed: torch.Tensor, handle: DispatchHandle, num_sms: int | None) -> torch.Tensor:
        plan: CudaHopPlan = handle.plan
        call = self._call_along(handle, "combine_weights", num_sms)
        self._stage_weights(landed, handle)
        home = torch.empty(handle.num_tokens, handle.num_topk, device=self.device)
        with self._domain.launching() as stream:
            self._zone.hop.give_back(call, plan.landed_idx.data_ptr(), 0, True, stream)
            float32 = self._dtypes[torch.float32]
            self._zone.hop.sum(call, plan.topk_idx.data_ptr(), 0, 0, home.data_ptr(), float32, stream)
        return home

    def _stage_weights(self, landed: torch.Tensor, handle: DispatchHandle) -> None:
        staged = self._zone.staged_weights(self._sequence, handle.num_topk)
        staged.copy_(landed.view_as(staged))

    def start(
        self, run: Callable[[], R], inputs: tuple[torch.Tensor | None, ...], after: torch.cuda.Event | None
    ) -> Work[R]:
        """See :meth:`Transport.start`."""
        return self._domain.start(run, inputs, after)

    def wait_for(self, after: torch.cuda.Event) -> None:
        """See :meth:`Transport.wait_for`."""
        self._domain.wait_for(after)

    def symm_empty(self, num_rows: int, dtype: torch.dtype) -> torch.Tensor:
        """See :meth:`Transport.symm_empty`. Expert outputs here are read in place; rows of a dispatch are staged."""
        return self._domain.symm_empty(num_rows, dtype)

    def check(self) -> None:
        """See :meth:`Transport.check`."""
        with self._experts_of_all_nodes():
            self._domain.check()

    @contextlib.contextmanager
    def _experts_of_all_nodes(self) -> Iterator[None]:
        """A node counts its own experts; users count all."""
        try:
            yield
        except InvalidArgumentError as error:
            if error.argument != "topk_idx":
                raise
            rule = f"must be in [-1, {self._geometry.num_experts})"
            raise InvalidArgumentError("topk_idx", error.value, rule) from None

    def fault_record(self) -> FaultRecord | None:
        """See :meth:`Transport.fault_record`."""
        return self._comm.fault or self._domain.fault_record()

    def give_up_on_gone_peers(self) -> None:
        """See :meth:`Transport.give_up_on_gone_peers`. Of other nodes it is known what their ranks told."""
        self._domain.give_up_on_gone_peers()
        now = time.monotonic()
        if now - self._looked < _LOOK_EVERY_S:
            return
        self._looked = now
        if self._comm.fault_board.found() is not None:
            self._domain.abort_waits()

    def counters(self) -> None:
        """See :meth:`Transport.counters`. A node's own buffer cannot tell ranks of other nodes apart."""

    def close(self) -> None:
        """Free this rank's memory; not collective."""
        with self._lock:
            self._domain.close()
            if self._routes is not None:
                self._routes.close()

    def _send(self, request: DispatchRequest, topk_idx: torch.Tensor, *, cached: bool, plan: int = 0) -> None:
        num_tokens, num_topk = topk_idx.shape
        layout = {"layout": type(request.layout).__name__, **dataclasses.asdict(request.layout)}
        asked = {"dtype": str(request.x.dtype), "plan": plan, "scale": request.scale_by_weights, **layout}
        call = self._call("dispatch", request.num_sms, sizes=(num_tokens, num_topk), **asked)
        args = self._core.HopDispatchArgs(
            x=request.x.data_ptr(),
            x_scales=address(request.x_scales),
            topk_idx=topk_idx.data_ptr(),
            topk_weights=address(request.topk_weights),
            locations=address(request.locations),
            capacity=request.layout.capacity if isinstance(request.layout, Padded) else 0,
            dtype=self._dtypes[request.x.dtype],
            cached=cached,
        )
        with self._domain.launching() as stream:
            self._zone.hop.dispatch(call, args, stream)

    def _landed(self, request: DispatchRequest) -> DispatchRequest:
        """What landed, as a dispatch inside the node: ``[M * P, H]``."""
        scales = None if request.x_scales is None else self._zone.landed_scales(self._sequence)
        x = self._zone.landed_rows(self._sequence, request.x.dtype)
        return dataclasses.replace(request, x=x, x_scales=scales)

    def _call_along(self, handle: DispatchHandle, operation: str, num_sms: int | None, **asked: object) -> Any:
        """The next operation, along a plan."""
        plan: CudaHopPlan = handle.plan
        self._use_plan(plan)
        sizes = (handle.num_tokens, handle.num_topk)
        return self._call(operation, num_sms, sizes=sizes, plan=plan.sequence, **asked)

    def _use_plan(self, plan: CudaHopPlan) -> None:
        """Its tensors may have been made on another stream."""
        stream = torch.cuda.current_stream(self.device)
        for tensor in (plan.topk_idx, plan.topk_weights, plan.landed_idx):
            tensor.record_stream(stream)

    def _call(self, operation: str, num_sms: int | None, *, sizes: tuple[int, int], **asked: object) -> Any:
        """The next operation, of T tokens and K; what is ``asked`` must be the same on all ranks."""
        self._sequence += 1
        num_tokens, num_topk = sizes
        words = f"{operation} {num_topk} {sorted(asked.items())}"
        return self._core.HopCall(
            operation=operation,
            sequence=self._sequence,
            signature=zlib.crc32(words.encode()),
            num_tokens=num_tokens,
            num_topk=num_topk,
            num_sms=num_sms or self._num_sms,
        )

    def _refuse_capture(self) -> None:
        if torch.cuda.is_current_stream_capturing():
            raise InvalidArgumentError("stream", "captured in a CUDA graph", "must not be, over several nodes")

    def _domain_fault(self, record: FaultRecord) -> FaultRecord:
        board = self._comm.fault_board
        if record.cause == "timeout" and record.peer >= 0:
            # Several ranks come to their deadlines at once: the first to speak finds by this whom others wait for.
            board.show_wait(record.peer)
        if record.cause in ("timeout", "aborted"):
            board.wait_found(_GRACE_S)
        return self._comm.mark_fault(record)


def _asked(request: CombineRequest) -> dict[str, object]:
    """What all ranks of a combine must ask for."""
    return {
        "dtype": str(request.rows.dtype),
        "reduce": request.reduce,
        "weighted": request.weighted,
        "weights": request.topk_weights is not None,
    }
