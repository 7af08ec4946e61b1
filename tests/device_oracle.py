"""What dispatch and combine must give, in whole-tensor operations on any device: the oracle for large or many cases.

Shares no code with the package. tests/test_device_oracle.py holds it against ``oracle.py``, bit by bit.
"""

from __future__ import annotations

import dataclasses
import functools

import oracle
import torch

from ray_deepep import ExpertMajor, TokenMajor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arrival:
    """What one rank receives. Tokens are numbered through all ranks."""

    tokens: torch.Tensor
    """``[R]`` token of each token-major row."""
    slots: torch.Tensor
    """``[sum T, K]`` row of each route in the layout, -1: not for this rank."""
    num_rows: int
    num_per_expert: torch.Tensor
    """``[L]``"""
    expert_offsets: torch.Tensor | None
    """``[L + 1]``, expert-major only."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class World(oracle.World):
    """The inputs of one dispatch on all ranks, all on one device."""

    @functools.cached_property
    def arrivals(self) -> list[Arrival]:
        """What each rank receives."""
        return [_arrival(self, rank) for rank in range(self.num_ranks)]

    def own(self, rank: int) -> slice:
        """The tokens of ``rank`` among those of all ranks."""
        begin = sum(len(x) for x in self.x[:rank])
        return slice(begin, begin + len(self.x[rank]))


def _arrival(world: World, rank: int) -> Arrival:
    topk_idx, num_local = torch.cat(world.topk_idx), world.num_local_experts
    local = topk_idx - rank * num_local
    here = (topk_idx >= 0) & (local >= 0) & (local < num_local)
    token_here = here.any(1)
    counts = torch.bincount(local[here], minlength=num_local)
    slots, offsets = torch.full_like(topk_idx, -1), None
    if isinstance(world.layout, TokenMajor):
        slots = torch.where(here, (token_here.cumsum(0) - 1).unsqueeze(1), -1)
        num_rows = int(token_here.sum())
    elif isinstance(world.layout, ExpertMajor):
        alignment = world.layout.alignment
        ends = ((counts + alignment - 1) // alignment * alignment).cumsum(0)
        offsets = torch.cat([torch.zeros_like(ends[:1]), ends])
        # Routes in the order (source, token, k); the sort is stable.
        expert, order = local[here].sort(stable=True)
        position = torch.arange(len(expert), device=expert.device) - (counts.cumsum(0) - counts)[expert]
        slot = torch.empty_like(expert)
        slot[order] = offsets[expert] + position
        slots[here] = slot
        num_rows = int(ends[-1])
    else:
        lengths = torch.tensor([len(x) for x in world.x], device=topk_idx.device)
        source = torch.arange(world.num_ranks, device=topk_idx.device).repeat_interleave(lengths).unsqueeze(1)
        capacity = world.layout.capacity
        slots = torch.where(here, (source * num_local + local) * capacity + torch.cat(world.locations), -1)
        num_rows = world.num_experts * capacity
    return Arrival(
        tokens=token_here.nonzero().squeeze(1),
        slots=slots,
        num_rows=num_rows,
        num_per_expert=counts,
        expert_offsets=offsets,
    )


def as_bytes(rows: torch.Tensor) -> torch.Tensor:
    """float8 rows as bytes, for operations that float8 has not; others as they are."""
    return rows.view(torch.uint8) if rows.element_size() == 1 else rows


def dispatch(
    world: World, rank: int, *, scale_by_weights: bool = False, num_rows: int | None = None
) -> oracle.Dispatched:
    """Expected result of a dispatch on ``rank``; with ``num_rows``, of that many rows (``max_recv_tokens``)."""
    here = world.arrivals[rank]
    num_rows = here.num_rows if num_rows is None else num_rows
    x, weights = torch.cat([as_bytes(x) for x in world.x]), torch.cat(world.topk_weights)
    topk_idx, out_idx = torch.cat(world.topk_idx), None
    token, k = (here.slots >= 0).nonzero(as_tuple=True)
    slot = here.slots[token, k]
    rows = x[token]
    if scale_by_weights:
        rows = (rows.float() * weights[token, k].unsqueeze(1)).to(rows.dtype)
    out_x = x.new_zeros(num_rows, x.shape[1])
    out_x[slot] = rows
    out_scales = None
    if world.x_scales is not None:
        scales = torch.cat(world.x_scales)
        out_scales = scales.new_zeros(num_rows, scales.shape[1])
        out_scales[slot] = scales[token]
    if isinstance(world.layout, TokenMajor):
        out_idx = topk_idx.new_full((num_rows, topk_idx.shape[1]), -1)
        out_idx[slot, k] = topk_idx[token, k] - rank * world.num_local_experts
        out_weights = weights.new_zeros(num_rows, topk_idx.shape[1])
        out_weights[slot, k] = weights[token, k]
    else:
        out_weights = weights.new_zeros(num_rows)
        out_weights[slot] = weights[token, k]
    return oracle.Dispatched(
        x=out_x.view(world.x[0].dtype), x_scales=out_scales, topk_idx=out_idx, topk_weights=out_weights
    )


class _Routes:
    """The routes of one source's tokens, with the rows and weights that they come home with."""

    def __init__(self, world: World, rank: int, rows: list[torch.Tensor], weighted: bool) -> None:
        self.topk_idx, self.weights, self.weighted = world.topk_idx[rank], world.topk_weights[rank], weighted
        self.owner = torch.div(self.topk_idx, world.num_local_experts, rounding_mode="floor")
        # The last row stands for routes that do not exist.
        self.rows = torch.cat([*rows, rows[0].new_zeros(1, world.hidden)])
        own, first_row = world.own(rank), 0
        self.flat = torch.full_like(self.topk_idx, len(self.rows) - 1)
        for arrival, here in zip(world.arrivals, rows):
            slots = arrival.slots[own]
            self.flat = torch.where(slots >= 0, slots + first_row, self.flat)
            first_row += len(here)

    def value(self, columns: torch.Tensor) -> torch.Tensor:
        """``[T, H]`` float32: the row of one k per token, times its weight if asked; 0 where there is no route."""
        columns = columns.unsqueeze(1)
        value = self.rows[self.flat.gather(1, columns).squeeze(1)].float()
        if self.weighted:
            value = value * self.weights.gather(1, columns)
        return torch.where(self.topk_idx.gather(1, columns) >= 0, value, 0.0)

    def column(self, k: int) -> torch.Tensor:
        """``[T]`` of ``k``."""
        return torch.full_like(self.topk_idx[:, 0], k)


def combine(
    world: World,
    rank: int,
    rows: list[torch.Tensor],
    *,
    weighted: bool = False,
    reduce: str = "exact",
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Expected rows of a combine on source ``rank``; ``rows`` of all ranks, which may have tails without routes."""
    dtype, routes = rows[0].dtype, _Routes(world, rank, rows, weighted)
    num_topk = routes.topk_idx.shape[1]
    total = torch.zeros(len(world.x[rank]), world.hidden, device=rows[0].device)
    if isinstance(world.layout, TokenMajor):
        for owner in range(world.num_ranks):
            hit = routes.owner == owner
            # Of a token's equal rows there, the first.
            value = routes.value(hit.int().argmax(1))
            total = total + torch.where(hit.any(1, keepdim=True), value, 0.0)
    elif reduce == "fast":
        for owner in range(world.num_ranks):
            partial = torch.zeros_like(total)
            for k in range(num_topk):
                hit = routes.owner[:, k : k + 1] == owner
                partial = partial + torch.where(hit, routes.value(routes.column(k)), 0.0)
            total = total + partial.to(dtype).float()
    elif reduce == "exact":
        for k in range(num_topk):
            total = total + routes.value(routes.column(k))
    else:
        order = torch.where(routes.topk_idx < 0, world.num_experts, routes.topk_idx).argsort(dim=1, stable=True)
        for position in range(num_topk):
            total = total + routes.value(order[:, position])
    return (total if bias is None else total + bias.float()).to(dtype)


def routes_home(world: World, rank: int, rows: list[torch.Tensor]) -> torch.Tensor:
    """Expected ``[K, T, H]`` of ``keep_routes`` on source ``rank``."""
    routes = _Routes(world, rank, rows, weighted=False)
    return torch.stack([routes.rows[routes.flat[:, k]] for k in range(routes.topk_idx.shape[1])])


def weights_home(world: World, rank: int, weights: list[torch.Tensor]) -> torch.Tensor:
    """Expected ``[T, K]`` of row weights given to combine on all ranks."""
    own = world.own(rank)
    home = torch.zeros(world.topk_idx[rank].shape, device=weights[0].device)
    for arrival, here in zip(world.arrivals, weights):
        slots = arrival.slots[own]
        token, k = (slots >= 0).nonzero(as_tuple=True)
        slot = slots[token, k]
        home[token, k] = here[slot, k] if here.dim() == 2 else here[slot]
    return home
