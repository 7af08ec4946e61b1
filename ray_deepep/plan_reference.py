"""The plan of a dispatch in readable torch: who sends which row, and in which slot it lands.

Every rank computes it alone from the routing of all ranks, so both ends of an exchange agree on counts and orders
without talking. Orders: rows by (source rank, token), routes by (source rank, token, k); expert-major slots by
(local expert, source rank, token, k).
"""

from __future__ import annotations

import dataclasses

import torch

from .errors import InvalidArgumentError
from .handle import ExpertMajor, Layout, Padded, TokenMajor


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankRouting:
    """What one rank publishes about its tokens."""

    topk_idx: torch.Tensor
    """``[T, K]`` int64, global expert ids, -1 = none."""
    topk_weights: torch.Tensor
    """``[T, K]`` float32."""
    locations: torch.Tensor | None
    """``[T, K]`` int32, padded layout only."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slots:
    """Where received routes land (M of them, in route order); empty indices for token-major rows."""

    route_slot: torch.Tensor
    """``[M]`` int64 row of each route in the output."""
    num_slots: int
    """S."""
    expert_offsets: tuple[int, ...]
    """Length L + 1 for expert-major, else empty."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReferencePlan:
    """Index lists of one dispatch on one rank; combine and cached dispatches follow them."""

    sequence: int
    """Number of the dispatch that made the plan, to tell when ranks pass different handles."""
    topk_idx: torch.Tensor
    """``[T, K]`` int64: this rank's own routing, global ids."""
    topk_weights: torch.Tensor
    """``[T, K]`` float32: this rank's own weights."""
    send_tokens: tuple[torch.Tensor, ...]
    """Per destination rank: this rank's tokens with an expert there, ascending."""
    send_routes: tuple[torch.Tensor, ...]
    """Per destination rank: this rank's routes to it as ``token * K + k``, ascending."""
    num_recv_rows: tuple[int, ...]
    """Rows received per source rank; the sum is R."""
    num_recv_routes: tuple[int, ...]
    """Routes received per source rank; the sum is M."""
    recv_topk_idx: torch.Tensor
    """``[R, K]`` int64: local expert ids, -1 where the expert lives elsewhere."""
    recv_topk_weights: torch.Tensor
    """``[R, K]`` float32, 0 where ``recv_topk_idx`` is -1."""
    route_row: torch.Tensor
    """``[M]`` int64: received row of each route."""
    route_k: torch.Tensor
    """``[M]`` int64: k of each route."""
    slots: Slots
    num_recv_tokens_per_expert: tuple[int, ...]

    @property
    def route_weights(self) -> torch.Tensor:
        """``[M]`` float32 weights of the received routes."""
        return self.recv_topk_weights[self.route_row, self.route_k]


def make_plan(
    routing: list[RankRouting], *, rank: int, num_experts: int, layout: Layout, sequence: int
) -> ReferencePlan:
    """Plan of ``rank`` from the routing of all ranks."""
    num_local = num_experts // len(routing)
    mine = routing[rank].topk_idx
    # Floor division keeps -1 at -1: no rank.
    owner = mine.div(num_local, rounding_mode="floor")
    here = [r.topk_idx.div(num_local, rounding_mode="floor") == rank for r in routing]
    tokens = [mask.any(1).nonzero().flatten() for mask in here]

    def received(values: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([value[index] for value, index in zip(values, tokens)])

    is_here = received(here)
    recv_topk_idx = torch.where(is_here, received([r.topk_idx for r in routing]) - rank * num_local, -1)
    route_row, route_k = is_here.nonzero(as_tuple=True)
    route_expert = recv_topk_idx[route_row, route_k]
    num_per_expert = torch.bincount(route_expert, minlength=num_local)
    if isinstance(layout, ExpertMajor):
        slots = expert_major_slots(route_expert, num_per_expert, layout.alignment)
    elif isinstance(layout, Padded):
        source = torch.cat([torch.full_like(index, s) for s, index in enumerate(tokens)])[route_row]
        location = received([r.locations for r in routing]).to(torch.int64)[route_row, route_k]
        slot = (source * num_local + route_expert) * layout.capacity + location
        slots = Slots(route_slot=slot, num_slots=num_experts * layout.capacity, expert_offsets=())
    else:
        slots = Slots(route_slot=route_row[:0], num_slots=len(recv_topk_idx), expert_offsets=())
    return ReferencePlan(
        sequence=sequence,
        topk_idx=mine,
        topk_weights=routing[rank].topk_weights,
        send_tokens=tuple((owner == r).any(1).nonzero().flatten() for r in range(len(routing))),
        send_routes=tuple((owner == r).flatten().nonzero().flatten() for r in range(len(routing))),
        num_recv_rows=tuple(len(index) for index in tokens),
        num_recv_routes=tuple(int(mask.sum()) for mask in here),
        recv_topk_idx=recv_topk_idx,
        recv_topk_weights=torch.where(is_here, received([r.topk_weights for r in routing]), 0.0),
        route_row=route_row,
        route_k=route_k,
        slots=slots,
        num_recv_tokens_per_expert=tuple(num_per_expert.tolist()),
    )


def expert_major_slots(route_expert: torch.Tensor, num_per_expert: torch.Tensor, alignment: int) -> Slots:
    """Group routes by expert; each group starts at a multiple of ``alignment``."""
    aligned = (num_per_expert + alignment - 1) // alignment * alignment
    offsets = torch.nn.functional.pad(aligned.cumsum(0), (1, 0))
    first = torch.nn.functional.pad(num_per_expert.cumsum(0), (1, 0))
    order = torch.argsort(route_expert, stable=True)
    expert = route_expert[order]
    route_slot = torch.empty_like(order)
    route_slot[order] = offsets[expert] + torch.arange(len(order), device=order.device) - first[expert]
    return Slots(route_slot=route_slot, num_slots=int(offsets[-1]), expert_offsets=tuple(offsets.tolist()))


def check_locations(topk_idx: torch.Tensor, locations: torch.Tensor | None) -> None:
    """Raise ``InvalidArgumentError`` if two routes of a rank take one slot: one of them would be lost."""
    if locations is None:
        return
    routes = topk_idx >= 0
    taken, counts = torch.stack([topk_idx[routes], locations[routes].to(torch.int64)]).unique(dim=1, return_counts=True)
    for expert, location in taken[:, counts > 1].T.tolist():
        rule = "must differ between the routes of one expert"
        raise InvalidArgumentError("locations", f"{location} twice for expert {expert}", rule)


def is_token_major(layout: Layout) -> bool:
    """Whether rows are one per (token, rank)."""
    return isinstance(layout, TokenMajor)
