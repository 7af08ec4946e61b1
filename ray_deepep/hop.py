"""Several nodes: one hop in front of a domain's own transport.

Dispatch: a rank gives each row once to every node that has an expert for it, to the rank of its own local rank there;
the rows that landed are then the tokens of an ordinary dispatch inside the node, in one part for each node that they
came from. Rows come out in order of (source rank, token), as if there were one domain. Combine goes the other way: an
ordinary combine inside the node, then one row per (token, node) home, added over nodes in float32 in node order; or, to
add up at the source (``exact``), one row per route.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
import torch.distributed as dist

from .errors import FaultRecord, HeapFullError, RayDeepEPError
from .handle import DispatchHandle, Layout
from .hop_group import HopGroup
from .hop_plan import HopPlan, Routing, node_of, routes_by_node, tokens_by_node
from .plan_reference import check_locations, is_token_major
from .reference import reduce_exact, reduce_expert_order, spelled_out
from .reference_group import as_bytes
from .transport import (
    BlockingTransport,
    BufferGeometry,
    CombineOutput,
    CombineRequest,
    DispatchOutput,
    DispatchRequest,
    DomainGeometry,
    Transport,
    make_handle,
)

if TYPE_CHECKING:
    from .communicator import Communicator

_GRACE_S = 0.3
"""When a wait inside the node comes to its deadline, the cause may be on another node, and just about to be found."""


class MakeDomain(Protocol):
    """Makes the transport inside the node; collective over its ranks."""

    def __call__(self, geometry: BufferGeometry, *, on_fault: Callable[[FaultRecord], FaultRecord]) -> Transport: ...


class HopTransport(BlockingTransport):
    """A :class:`~ray_deepep.transport.Transport` for the nodes of ``comm``. Its rows are on the CPU."""

    def __init__(
        self, comm: Communicator, geometry: BufferGeometry, *, group: dist.ProcessGroupGloo, make_domain: MakeDomain
    ) -> None:
        self._comm, self._geometry, self._nodes = comm, geometry, comm.domains
        self._num_node_experts = geometry.num_experts // self._nodes.num_nodes
        self._lock = threading.Lock()
        self._hop = HopGroup(comm, dataclasses.asdict(geometry), group)
        self._domain = make_domain(
            domain_geometry(geometry, self._nodes.num_nodes, comm.config.heap_gib), on_fault=self._domain_fault
        )
        self.device = self._domain.device
        self.takes_expert_rows = self._domain.takes_expert_rows

    def dispatch(self, request: DispatchRequest) -> DispatchOutput:
        """See :meth:`Transport.dispatch`."""
        with self._operation():
            return self._new_dispatch(request) if request.handle is None else self._cached_dispatch(request)

    def _new_dispatch(self, request: DispatchRequest) -> DispatchOutput:
        request = spelled_out(request)
        check_locations(request.topk_idx, request.locations)
        num_nodes, node = self._nodes.num_nodes, self._nodes.node_rank
        nodes = node_of(request.topk_idx, self._num_node_experts)
        send = tokens_by_node(nodes, num_nodes)
        landed = self._begin(
            "dispatch",
            [len(tokens) for tokens in send],
            dtype=request.x.dtype,
            plan=None,
            num_topk=request.topk_idx.shape[1],
            layout=request.layout,
            scale_by_weights=request.scale_by_weights,
            max_recv_tokens=request.max_recv_tokens,
        )
        given = Routing(
            topk_idx=request.topk_idx, topk_weights=request.topk_weights, locations=request.locations
        ).packed()
        routing = Routing.unpacked(self._give(given, send, landed), request.topk_idx.shape[1])
        routing = routing.localised(node, self._num_node_experts)
        inner = dataclasses.replace(
            request,
            x=self._give_rows(request.x, send, landed),
            x_scales=None if request.x_scales is None else self._give(request.x_scales, send, landed),
            topk_idx=routing.topk_idx,
            topk_weights=routing.topk_weights,
            locations=routing.locations,
            part_tokens=tuple(landed),
        )
        output = self._domain.dispatch(inner)
        handle = make_handle(
            inner,
            output,
            num_ranks=self._nodes.domain_size,
            num_local_experts=self._geometry.num_experts // self._nodes.num_ranks,
            check_faults=self._domain.check,
            owner=0,
        )
        plan = HopPlan(
            sequence=self._hop.sequence,
            topk_idx=request.topk_idx,
            topk_weights=request.topk_weights,
            send_tokens=send,
            send_routes=routes_by_node(nodes, num_nodes),
            num_landed=tuple(landed),
            landed_routes=tuple(int((part >= 0).sum()) for part in routing.topk_idx.split(landed)),
            domain_handle=handle,
        )
        return dataclasses.replace(output, plan=plan)

    def _cached_dispatch(self, request: DispatchRequest) -> DispatchOutput:
        plan: HopPlan = request.handle.plan
        self._begin(
            "dispatch",
            plan.num_sent,
            dtype=request.x.dtype,
            plan=plan,
            num_topk=request.handle.num_topk,
            layout=request.layout,
            scale_by_weights=request.scale_by_weights,
            max_recv_tokens=request.max_recv_tokens,
        )
        scales = request.x_scales
        inner = dataclasses.replace(
            request,
            x=self._give_rows(request.x, plan.send_tokens, plan.num_landed),
            x_scales=None if scales is None else self._give(scales, plan.send_tokens, plan.num_landed),
            handle=plan.domain_handle,
        )
        return dataclasses.replace(self._domain.dispatch(inner), plan=plan)

    def combine(self, request: CombineRequest) -> CombineOutput:
        """See :meth:`Transport.combine`."""
        plan: HopPlan = request.handle.plan
        given = request.expert_rows[0] if request.expert_rows else request.rows
        with self._operation():
            self._begin(
                "combine",
                plan.num_landed,
                dtype=given.dtype,
                plan=plan,
                num_topk=request.handle.num_topk,
                layout=request.handle.layout,
                reduce=request.reduce,
                weighted=request.weighted,
                topk_weights=request.topk_weights is not None,
            )
            by_rank = is_token_major(request.handle.layout) or request.reduce == "fast"
            inner = dataclasses.replace(
                request,
                handle=plan.domain_handle,
                keep_routes=False,
                bias=None,
                num_routes=None if by_rank else sum(plan.landed_routes),
            )
            output = self._domain.combine(inner)
            routes = None if by_rank else self._routes_home(output.routes, plan)
            total = self._sum_over_nodes(output.x, plan) if by_rank else self._sum_routes(routes, request)
            home = None if output.topk_weights is None else self._weights_home(output.topk_weights, plan)
        if request.bias is not None:
            total += request.bias.float()
        return CombineOutput(
            x=total.to(given.dtype),
            topk_weights=home,
            routes=routes.transpose(0, 1).contiguous() if request.keep_routes else None,
        )

    def combine_weights(self, topk_weights: torch.Tensor, handle: DispatchHandle, num_sms: int | None) -> torch.Tensor:
        """See :meth:`Transport.combine_weights`."""
        plan: HopPlan = handle.plan
        with self._operation():
            self._begin(
                "combine_weights",
                plan.num_landed,
                dtype=topk_weights.dtype,
                plan=plan,
                num_topk=handle.num_topk,
                layout=handle.layout,
            )
            landed = self._domain.combine_weights(topk_weights, plan.domain_handle, num_sms)
            return self._weights_home(landed, plan)

    def symm_empty(self, num_rows: int, dtype: torch.dtype) -> torch.Tensor:
        """See :meth:`Transport.symm_empty`."""
        return self._domain.symm_empty(num_rows, dtype)

    def check(self) -> None:
        """See :meth:`Transport.check`."""
        self._domain.check()

    def fault_record(self) -> FaultRecord | None:
        """See :meth:`Transport.fault_record`."""
        return self._comm.fault or self._domain.fault_record()

    def give_up_on_gone_peers(self) -> None:
        """See :meth:`Transport.give_up_on_gone_peers`."""
        self._domain.give_up_on_gone_peers()

    def close(self) -> None:
        """Tell peers that still wait for this rank; not collective."""
        self._hop.close()
        self._domain.close()

    @contextlib.contextmanager
    def _operation(self) -> Iterator[None]:
        """One at a time: the autograd engine calls backward from threads of its own."""
        with self._lock:
            try:
                yield
            except RayDeepEPError:
                raise
            except BaseException:
                # Interrupted between the hop and the domain, or in either: this rank is out of step now.
                self._hop.abort()
                raise

    def _begin(
        self,
        operation: str,
        counts: Sequence[int],
        *,
        dtype: torch.dtype,
        plan: HopPlan | None,
        num_topk: int,
        layout: Layout,
        **more: object,
    ) -> list[int]:
        """Meet all other ranks, which must ask for the same. Returns the rows that come from each node."""
        signature = {
            "dtype": str(dtype).removeprefix("torch."),
            # 0 for a new plan.
            "handle (dispatch number)": 0 if plan is None else plan.sequence,
            "num_topk": num_topk,
            "layout": type(layout).__name__,
            **{f"layout.{name}": value for name, value in dataclasses.asdict(layout).items()},
            **more,
        }
        return self._hop.begin_counts(operation, signature, counts)

    def _domain_fault(self, record: FaultRecord) -> FaultRecord:
        if record.cause == "timeout":
            self._comm.fault_board.wait_found(_GRACE_S)
        return self._comm.mark_fault(record)

    def _give_rows(self, x: torch.Tensor, send: Sequence[torch.Tensor], landed: Sequence[int]) -> torch.Tensor:
        """As :meth:`_give`, to where the node's ranks read them in place."""
        try:
            zone = self._domain.symm_empty(sum(landed), x.dtype)
        except HeapFullError:
            # The user's own tensors take the room; then the domain stages the rows once more.
            zone = x.new_empty(sum(landed), x.shape[1])
        return self._give(x, send, landed, zone)

    def _give(
        self,
        values: torch.Tensor,
        send: Sequence[torch.Tensor],
        landed: Sequence[int],
        zone: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``values[send[n]]`` to each node n; what landed from the nodes, ``landed[n]`` rows each, in node order."""
        zone = values.new_empty(sum(landed), values.shape[1]) if zone is None else zone
        source, parts, own = as_bytes(values), as_bytes(zone).split(list(landed)), self._nodes.node_rank
        torch.index_select(source, 0, send[own], out=parts[own])
        away = [
            source[:0] if node == own else torch.index_select(source, 0, tokens) for node, tokens in enumerate(send)
        ]
        self._hop.exchange(away, parts)
        return zone

    def _return(self, values: torch.Tensor, num_back: Sequence[int], num_home: Sequence[int]) -> list[torch.Tensor]:
        """The other way: ``num_back[n]`` rows of ``values`` to each node n, one after the other. Returns those that
        come home from each, ``num_home[n]``."""
        parts, own = values.split(list(num_back)), self._nodes.node_rank
        home = [
            parts[own] if node == own else values.new_empty(count, values.shape[1])
            for node, count in enumerate(num_home)
        ]
        self._hop.exchange([as_bytes(part) for part in parts], [as_bytes(part) for part in home])
        return home

    def _sum_over_nodes(self, rows: torch.Tensor, plan: HopPlan) -> torch.Tensor:
        """Rows of landed tokens home, added up in float32 by ascending node: ``[T, H]`` float32."""
        home = self._return(rows, plan.num_landed, plan.num_sent)
        total = torch.zeros(len(plan.topk_idx), rows.shape[1])
        for tokens, part in zip(plan.send_tokens, home):
            total.index_add_(0, tokens, part.float())
        return total

    def _routes_home(self, routes: torch.Tensor, plan: HopPlan) -> torch.Tensor:
        """Rows of landed routes home: ``[T, K, H]``, 0 where there is no route."""
        home = self._return(routes, plan.landed_routes, plan.num_sent_routes)
        num_tokens, num_topk = plan.topk_idx.shape
        result = routes.new_zeros(num_tokens * num_topk, routes.shape[1])
        for index, part in zip(plan.send_routes, home):
            result.index_copy_(0, index, part)
        return result.view(num_tokens, num_topk, routes.shape[1])

    def _sum_routes(self, routes: torch.Tensor, request: CombineRequest) -> torch.Tensor:
        plan: HopPlan = request.handle.plan
        reduce = reduce_exact if request.reduce == "exact" else reduce_expert_order
        return reduce(routes, plan.topk_idx, plan.topk_weights if request.weighted else None)

    def _weights_home(self, landed: torch.Tensor, plan: HopPlan) -> torch.Tensor:
        """Numbers of landed routes, ``[tokens, K]``, home: ``[T, K]``, 0 where there is no route."""
        home = self._return(landed, plan.num_landed, plan.num_sent)
        num_topk = plan.topk_idx.shape[1]
        result = landed.new_zeros(plan.topk_idx.numel())
        for tokens, routes, part in zip(plan.send_tokens, plan.send_routes, home):
            of_tokens = landed.new_zeros(len(plan.topk_idx), num_topk)
            of_tokens[tokens] = part
            result[routes] = of_tokens.flatten()[routes]
        return result.view(plan.topk_idx.shape)


def domain_geometry(geometry: BufferGeometry, num_nodes: int, heap_gib: float) -> DomainGeometry:
    """Sizes of the buffer inside a node: the tokens that land are those of all nodes, and its experts the node's.

    The landing zone lies beside the user's own tensors. It is never larger than a rank's heap may be (``heap_gib``).
    """
    landed = num_nodes * geometry.max_tokens
    zone = landed * geometry.hidden * geometry.max_element_size
    inside = {
        "num_experts": geometry.num_experts // num_nodes,
        "max_tokens": landed,
        "symm_bytes": geometry.symm_bytes + min(zone, int(heap_gib * 2**30)),
        "low_latency_max_tokens": 0,
    }
    return DomainGeometry(**{**dataclasses.asdict(geometry), **inside}, num_parts=num_nodes)
