"""Dispatch and combine in readable torch over torch.distributed.

The oracle that the compiled core is tested against bit for bit, and the fallback where no core fits (several CPU
hosts). Works with gloo (CPU tensors) and NCCL (everything stays on the device of the rows).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch

from .errors import ClosedError
from .fixed_shapes import fit_output, fit_rows, host_counts
from .handle import DispatchHandle, Layout, Padded
from .plan_reference import RankRouting, ReferencePlan, check_locations, is_token_major, make_plan
from .reference_group import ReferenceGroup, as_bytes, from_bytes
from .transport import (
    BlockingTransport,
    BufferGeometry,
    CombineOutput,
    CombineRequest,
    DispatchOutput,
    DispatchRequest,
)

if TYPE_CHECKING:
    from .communicator import Communicator


class ReferenceTransport(BlockingTransport):
    """A :class:`~ray_deepep.transport.Transport` over ``comm.group``."""

    device = None

    def __init__(self, comm: Communicator, geometry: BufferGeometry) -> None:
        self._rank, self._geometry = comm.rank, geometry
        self._group = ReferenceGroup(comm, dataclasses.asdict(geometry))
        self._closed = False

    def dispatch(self, request: DispatchRequest) -> DispatchOutput:
        """Rows to the ranks of their experts; see :class:`DispatchRequest`."""
        handle = request.handle
        if handle is None:
            request = spelled_out(request)
            check_locations(request.topk_idx, request.locations)
        num_tokens = self._begin(
            "dispatch",
            len(request.x),
            dtype=request.x.dtype,
            plan=None if handle is None else handle.plan,
            num_topk=request.topk_idx.shape[1] if handle is None else handle.num_topk,
            layout=request.layout,
            scale_by_weights=request.scale_by_weights,
            max_recv_tokens=request.max_recv_tokens,
        )
        plan = self._plan(request, num_tokens) if handle is None else handle.plan
        x = self._rows_out(request.x, plan)
        x_scales = None if request.x_scales is None else self._rows_out(request.x_scales, plan)
        token_major = is_token_major(request.layout)
        if token_major:
            # The caller may write to what it gets; the plan must not see it.
            weights = plan.recv_topk_weights.clone()
        else:
            route_weights = plan.route_weights
            x_routes = from_bytes(as_bytes(x)[plan.route_row], x.dtype)
            if request.scale_by_weights:
                x_routes = (x_routes.float() * route_weights.unsqueeze(1)).to(x.dtype)
            x = _scatter(x_routes, plan)
            x_scales = None if x_scales is None else _scatter(x_scales[plan.route_row], plan)
            weights = _scatter(route_weights.unsqueeze(1), plan).squeeze(1)
        num_recv_tokens = sum(plan.num_recv_rows)
        output = DispatchOutput(
            x=x,
            x_scales=x_scales,
            topk_idx=plan.recv_topk_idx.clone() if token_major and handle is None else None,
            topk_weights=weights,
            num_recv_tokens=num_recv_tokens,
            num_recv_tokens_per_expert=plan.num_recv_tokens_per_expert,
            expert_offsets=plan.slots.expert_offsets,
            counts=host_counts(
                rank=self._rank,
                num_recv_tokens=num_recv_tokens,
                num_rows=len(x),
                num_recv_tokens_per_expert=plan.num_recv_tokens_per_expert,
                expert_offsets=plan.slots.expert_offsets,
                max_recv_tokens=request.max_recv_tokens,
                device=x.device,
            ),
            plan=plan,
        )
        return fit_output(output, request.max_recv_tokens, token_major=token_major)

    def combine(self, request: CombineRequest) -> CombineOutput:
        """Expert rows back to their tokens; see :class:`CombineRequest`."""
        handle, plan = request.handle, request.handle.plan
        self._begin(
            "combine",
            handle.num_tokens,
            dtype=request.rows.dtype,
            plan=plan,
            num_topk=handle.num_topk,
            layout=handle.layout,
            reduce=request.reduce,
            weighted=request.weighted,
            topk_weights=request.topk_weights is not None,
        )
        rows = fit_rows(request.rows, plan.slots.num_slots)
        routes = None
        if is_token_major(handle.layout):
            total = self._sum_over_ranks(rows, plan)
        elif request.reduce == "fast":
            total = self._sum_over_ranks(_reduce_at_experts(rows, plan, weighted=request.weighted), plan)
        else:
            routes = self._routes_home(rows[plan.slots.route_slot], plan)
            reduce = reduce_exact if request.reduce == "exact" else reduce_expert_order
            total = reduce(routes, plan.topk_idx, plan.topk_weights if request.weighted else None)
        if request.bias is not None:
            total = total.float() + request.bias.float()
        weights = None if request.topk_weights is None else self._weights_home(request.topk_weights, plan)
        return CombineOutput(
            x=total.to(rows.dtype),
            topk_weights=weights,
            routes=routes.transpose(0, 1).contiguous() if request.keep_routes else None,
        )

    def combine_weights(self, topk_weights: torch.Tensor, handle: DispatchHandle, num_sms: int | None) -> torch.Tensor:
        """One number per route home, ``[T, K]`` float32."""
        self._begin(
            "combine_weights",
            handle.num_tokens,
            dtype=topk_weights.dtype,
            plan=handle.plan,
            num_topk=handle.num_topk,
            layout=handle.layout,
        )
        return self._weights_home(topk_weights, handle.plan)

    def close(self) -> None:
        """Tell peers that still wait for this rank; not collective."""
        if not self._closed:
            self._closed = True
            self._group.close()

    def _begin(
        self,
        operation: str,
        num_tokens: int,
        *,
        dtype: torch.dtype,
        plan: ReferencePlan | None,
        num_topk: int,
        layout: Layout,
        **more: object,
    ) -> list[int]:
        """Meet the other ranks, which must ask for the same. Returns the number of tokens of each."""
        if self._closed:
            raise ClosedError(f"{operation}: the buffer is closed")
        signature = {
            "dtype": str(dtype).removeprefix("torch."),
            # 0 for a new plan.
            "handle (dispatch number)": 0 if plan is None else plan.sequence,
            "num_topk": num_topk,
            "layout": type(layout).__name__,
            **{f"layout.{name}": value for name, value in dataclasses.asdict(layout).items()},
            **more,
        }
        return self._group.begin(operation, signature, num_tokens)

    def _plan(self, request: DispatchRequest, num_tokens: list[int]) -> ReferencePlan:
        gather = self._group.all_gather
        topk_idx = gather(request.topk_idx, num_tokens)
        topk_weights = gather(request.topk_weights, num_tokens)
        padded = isinstance(request.layout, Padded)
        locations = gather(request.locations, num_tokens) if padded else [None] * len(num_tokens)
        routing = [
            RankRouting(topk_idx=idx, topk_weights=weights, locations=location)
            for idx, weights, location in zip(topk_idx, topk_weights, locations)
        ]
        return make_plan(
            routing,
            rank=self._rank,
            num_experts=self._geometry.num_experts,
            layout=request.layout,
            sequence=self._group.sequence,
        )

    def _rows_out(self, x: torch.Tensor, plan: ReferencePlan) -> torch.Tensor:
        """One row per (token, rank), ``[R, H]``."""
        send = from_bytes(as_bytes(x)[torch.cat(plan.send_tokens)], x.dtype)
        return self._group.all_to_all(send, [len(tokens) for tokens in plan.send_tokens], plan.num_recv_rows)

    def _routes_home(self, values: torch.Tensor, plan: ReferencePlan) -> torch.Tensor:
        """Rows of the received routes, ``[M, H]``, back at their source: ``[T, K, H]``, 0 where there is no route."""
        num_send = [len(routes) for routes in plan.send_routes]
        home = self._group.all_to_all(values, plan.num_recv_routes, num_send)
        num_tokens, num_topk = plan.topk_idx.shape
        routes = values.new_zeros(num_tokens * num_topk, values.shape[1])
        routes[torch.cat(plan.send_routes)] = home
        return routes.view(num_tokens, num_topk, values.shape[1])

    def _weights_home(self, weights: torch.Tensor, plan: ReferencePlan) -> torch.Tensor:
        weights = fit_rows(weights, plan.slots.num_slots)
        by_slot = weights.dim() == 1
        route_weights = weights[plan.slots.route_slot] if by_slot else weights[plan.route_row, plan.route_k]
        return self._routes_home(route_weights.unsqueeze(1), plan).squeeze(2)

    def _sum_over_ranks(self, rows: torch.Tensor, plan: ReferencePlan) -> torch.Tensor:
        """Rows ``[R, H]`` home, added up in float32 by ascending rank: ``[T, H]`` float32."""
        num_send = [len(tokens) for tokens in plan.send_tokens]
        home = self._group.all_to_all(rows, plan.num_recv_rows, num_send)
        total = torch.zeros(len(plan.topk_idx), rows.shape[1], device=rows.device)
        for tokens, part in zip(plan.send_tokens, home.split(num_send)):
            total[tokens] += part.float()
        return total


def _scatter(values: torch.Tensor, plan: ReferencePlan) -> torch.Tensor:
    """Rows of routes, ``[M, H]``, to their slots; ``[S, H]``, zero elsewhere."""
    source = as_bytes(values)
    slots = source.new_zeros(plan.slots.num_slots, source.shape[1])
    slots[plan.slots.route_slot] = source
    return from_bytes(slots, values.dtype)


def spelled_out(request: DispatchRequest) -> DispatchRequest:
    """With int64 ids and with weights, both copies: plans keep them, and callers may overwrite theirs."""
    topk_idx, given = request.topk_idx.to(torch.int64, copy=True), request.topk_weights
    topk_weights = torch.ones(topk_idx.shape, device=topk_idx.device) if given is None else given.clone()
    return dataclasses.replace(request, topk_idx=topk_idx, topk_weights=topk_weights)


def _reduce_at_experts(rows: torch.Tensor, plan: ReferencePlan, *, weighted: bool) -> torch.Tensor:
    """Sum the routes of a token on this rank in float32, k order, and round once: ``[R, H]``."""
    total = torch.zeros(len(plan.recv_topk_idx), rows.shape[1], device=rows.device)
    for k in range(plan.topk_idx.shape[1]):
        of_k = plan.route_k == k
        term = rows[plan.slots.route_slot[of_k]].float()
        if weighted:
            term = term * plan.route_weights[of_k].unsqueeze(1)
        total[plan.route_row[of_k]] += term
    return total.to(rows.dtype)


def reduce_exact(routes: torch.Tensor, topk_idx: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """Sum ``[T, K, H]`` over K in float32, k order: ``[T, H]`` float32."""
    total = torch.zeros(routes.shape[0], routes.shape[2], device=routes.device)
    for k in range(routes.shape[1]):
        term = routes[:, k].float()
        if weights is not None:
            term = term * weights[:, k, None]
        # A weight beside -1 may be anything, NaN included, so leave the route out rather than add 0.
        total = torch.where(topk_idx[:, k, None] >= 0, total + term, total)
    return total


def reduce_expert_order(routes: torch.Tensor, topk_idx: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """Sum ``[T, K, H]`` over K in float32, by ascending (expert, k): ``[T, H]`` float32."""
    order = torch.argsort(topk_idx, dim=1, stable=True)
    token = torch.arange(len(routes), device=routes.device).unsqueeze(1)
    weights = None if weights is None else weights[token, order]
    return reduce_exact(routes[token, order], topk_idx[token, order], weights)
