"""What dispatch and combine must give, worked out route by route from the inputs of all ranks.

Shares no code with the package's own reference: plain loops over (expert, source, token, k), one row at a time. Sums
follow the documented orders, so results are compared bit by bit.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import torch

from ray_deepep import ExpertMajor, Float8Cast, TokenMajor
from ray_deepep.handle import Layout


@dataclasses.dataclass(frozen=True, kw_only=True)
class World:
    """The inputs of one dispatch on all ranks; lists are by rank."""

    num_experts: int
    hidden: int
    layout: Layout
    x: list[torch.Tensor]
    topk_idx: list[torch.Tensor]
    topk_weights: list[torch.Tensor]
    x_scales: list[torch.Tensor] | None
    locations: list[torch.Tensor] | None
    max_recv_tokens: int | None = None
    cast: Float8Cast | None = None
    domain_size: int = 0
    """Ranks of a node, if sums are rounded once per node before they go home; 0: there is one node."""
    x_given: list[torch.Tensor] | None = None
    """With ``cast``: the rows before they are cast; ``x`` and ``x_scales`` are those that leave."""

    @functools.cached_property
    def num_ranks(self) -> int:
        return len(self.x)

    @functools.cached_property
    def num_local_experts(self) -> int:
        return self.num_experts // self.num_ranks

    @functools.cached_property
    def arrivals(self) -> list[Arrival]:
        """What each rank receives."""
        return [_arrival(self, rank) for rank in range(self.num_ranks)]

    def rows_of(self, rank: int) -> int:
        """Rows of a rank's output."""
        return self.arrivals[rank].num_rows if self.max_recv_tokens is None else self.max_recv_tokens

    def rank_of(self, expert: int) -> int:
        """Rank that holds an expert."""
        return expert // self.num_local_experts

    def with_rows(self, **rows: list[torch.Tensor]) -> World:
        """The same with other ``x``, ``x_scales`` or ``x_given``; where rows go is not worked out again."""
        other = dataclasses.replace(self, **rows)
        if "arrivals" in self.__dict__:
            other.__dict__["arrivals"] = self.arrivals
        return other

    @functools.cached_property
    def routes(self) -> list[tuple[int, int, int, int]]:
        """All routes as (source, token, k, expert)."""
        return [
            (source, token, k, expert)
            for source, idx in enumerate(self.topk_idx)
            for token, experts in enumerate(idx.tolist())
            for k, expert in enumerate(experts)
            if expert >= 0
        ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arrival:
    """What one rank receives."""

    tokens: list[tuple[int, int]]
    """(source, token) of each token-major row."""
    slot_of: dict[tuple[int, int, int], int]
    """Row of each route (source, token, k) in the layout."""
    num_rows: int
    """Of the layout; an output may have more, with ``max_recv_tokens``."""
    num_per_expert: tuple[int, ...]
    expert_offsets: tuple[int, ...]


def _arrival(world: World, rank: int) -> Arrival:
    """Rows that land on ``rank``, and where."""
    routes = [route for route in world.routes if world.rank_of(route[3]) == rank]
    tokens = sorted({(source, token) for source, token, _, _ in routes})
    first_expert = rank * world.num_local_experts
    by_expert = [[r for r in routes if r[3] == first_expert + e] for e in range(world.num_local_experts)]
    slot_of, offsets, num_rows = {}, (), len(tokens)
    if isinstance(world.layout, TokenMajor):
        position_of = {token: position for position, token in enumerate(tokens)}
        slot_of = {(s, t, k): position_of[s, t] for s, t, k, _ in routes}
    elif isinstance(world.layout, ExpertMajor):
        end, starts = 0, []
        for group in by_expert:
            starts.append(end)
            for position, (s, t, k, _) in enumerate(group):
                slot_of[s, t, k] = end + position
            end += len(group)
            while end % world.layout.alignment:
                end += 1
        offsets, num_rows = (*starts, end), end
    else:
        capacity = world.layout.capacity
        blocks = torch.arange(world.num_experts * capacity).view(world.num_ranks, world.num_local_experts, capacity)
        for s, t, k, expert in routes:
            slot_of[s, t, k] = int(blocks[s, expert - first_expert, int(world.locations[s][t, k])])
        num_rows = world.num_experts * capacity
    return Arrival(
        tokens=tokens,
        slot_of=slot_of,
        num_rows=num_rows,
        num_per_expert=tuple(len(group) for group in by_expert),
        expert_offsets=offsets,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dispatched:
    """Expected fields of a ``DispatchResult`` and its handle."""

    x: torch.Tensor
    x_scales: torch.Tensor | None
    topk_idx: torch.Tensor | None
    topk_weights: torch.Tensor


def dispatch(world: World, rank: int, *, scale_by_weights: bool = False) -> Dispatched:
    """Expected result of a dispatch on ``rank``."""
    here, num_rows = world.arrivals[rank], world.rows_of(rank)
    x = torch.zeros(num_rows, world.hidden).to(world.x[0].dtype)
    scales = None if world.x_scales is None else torch.zeros(num_rows, world.x_scales[0].shape[1])
    num_topk = world.topk_idx[0].shape[1]
    token_major = isinstance(world.layout, TokenMajor)
    topk_idx = torch.full((num_rows, num_topk), -1) if token_major else None
    weights = torch.zeros(num_rows, num_topk) if token_major else torch.zeros(num_rows)
    for (source, token, k), slot in here.slot_of.items():
        row, weight = world.x[source][token], world.topk_weights[source][token, k]
        x[slot] = (row.float() * weight).to(row.dtype) if scale_by_weights else row
        if scales is not None:
            scales[slot] = world.x_scales[source][token]
        if token_major:
            topk_idx[slot, k] = world.topk_idx[source][token, k] - rank * world.num_local_experts
            weights[slot, k] = weight
        else:
            weights[slot] = weight
    return Dispatched(x=x, x_scales=scales, topk_idx=topk_idx, topk_weights=weights)


def combine(
    world: World,
    rank: int,
    rows: list[torch.Tensor],
    *,
    weighted: bool,
    reduce: str,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Expected rows of a combine on source ``rank``; ``rows`` of all ranks."""
    dtype = rows[0].dtype
    out = torch.zeros(len(world.x[rank]), world.hidden, dtype=dtype)
    for token, experts in enumerate(world.topk_idx[rank].tolist()):
        routes = [(k, expert) for k, expert in enumerate(experts) if expert >= 0]
        total = torch.zeros(world.hidden)

        def row(k: int, expert: int, token: int = token) -> torch.Tensor:
            owner = world.rank_of(expert)
            value = rows[owner][world.arrivals[owner].slot_of[rank, token, k]].float()
            return value * world.topk_weights[rank][token, k] if weighted else value

        owners = sorted({world.rank_of(expert) for _, expert in routes})
        sums = {}
        if isinstance(world.layout, TokenMajor):
            for owner in owners:
                k, expert = next(route for route in routes if world.rank_of(route[1]) == owner)
                sums[owner] = row(k, expert)
            total = _sum_of_ranks(world, sums, dtype)
        elif reduce == "fast":
            for owner in owners:
                partial = torch.zeros(world.hidden)
                for k, expert in routes:
                    if world.rank_of(expert) == owner:
                        partial = partial + row(k, expert)
                sums[owner] = partial.to(dtype).float()
            total = _sum_of_ranks(world, sums, dtype)
        elif reduce == "exact":
            for k, expert in routes:
                total = total + row(k, expert)
        else:
            for k, expert in sorted(routes, key=lambda route: route[1]):
                total = total + row(k, expert)
        out[token] = (total if bias is None else total + bias[token].float()).to(dtype)
    return out


def _sum_of_ranks(world: World, sums: dict[int, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """By ascending rank; with several nodes rounded for each of them, then by ascending node."""
    total, nodes = torch.zeros(world.hidden), {}
    for rank in sorted(sums):
        node = rank // world.domain_size if world.domain_size else 0
        nodes[node] = nodes.get(node, torch.zeros(world.hidden)) + sums[rank]
    if not world.domain_size:
        return nodes.get(0, total)
    for node in sorted(nodes):
        total = total + nodes[node].to(dtype).float()
    return total


def routes_home(world: World, rank: int, rows: list[torch.Tensor]) -> torch.Tensor:
    """Expected ``[K, T, H]`` of ``keep_routes`` on source ``rank``."""
    num_tokens, num_topk = world.topk_idx[rank].shape
    out = torch.zeros(num_topk, num_tokens, world.hidden, dtype=rows[0].dtype)
    for source, token, k, expert in world.routes:
        if source == rank:
            owner = world.rank_of(expert)
            out[k, token] = rows[owner][world.arrivals[owner].slot_of[rank, token, k]]
    return out


def weights_home(world: World, rank: int, weights: list[torch.Tensor]) -> torch.Tensor:
    """Expected ``[T, K]`` of row weights given to combine on all ranks."""
    out = torch.zeros(world.topk_idx[rank].shape)
    for source, token, k, expert in world.routes:
        if source == rank:
            owner = world.rank_of(expert)
            slot = world.arrivals[owner].slot_of[rank, token, k]
            out[token, k] = weights[owner][slot, k] if weights[owner].dim() == 2 else weights[owner][slot]
    return out


def quantize(x: torch.Tensor, cast: Float8Cast) -> tuple[torch.Tensor, torch.Tensor]:
    """Float8 rows and their scales: each element is looked up among all e4m3 numbers, in float64."""
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    # One zero: which of the two an element gets is its sign's affair.
    order = [i for i in range(256) if not math.isnan(float(numbers[i])) and i != 128]
    order.sort(key=lambda i: float(numbers[i]))
    values = torch.tensor([float(numbers[i]) for i in order], dtype=torch.float64)
    even = torch.tensor([i % 2 == 0 for i in order])
    blocks = x.float().reshape(x.shape[0], x.shape[1] // 128, 128)
    scales = torch.zeros(blocks.shape[:2])
    for row in range(blocks.shape[0]):
        for block in range(blocks.shape[1]):
            amax = max(float(blocks[row, block].abs().max()), float(torch.tensor(1e-4)))
            # A float64 quotient of two float32 numbers rounds to the float32 quotient.
            scale = float(torch.tensor(amax / 448.0, dtype=torch.float64).float())
            if cast.scale_format == "power_of_two":
                mantissa, exponent = math.frexp(scale)
                scale = math.ldexp(1.0, exponent - 1 if mantissa == 0.5 else exponent)
            scales[row, block] = scale
    quotients = (blocks.double() / scales.double().unsqueeze(-1)).float().double().reshape(-1)
    above = torch.searchsorted(values, quotients).clamp(1, len(values) - 1)
    to_low, to_high = quotients - values[above - 1], values[above] - quotients
    up = (to_high < to_low) | ((to_high == to_low) & even[above])
    chosen = torch.tensor(order)[torch.where(up, above, above - 1)].to(torch.uint8)
    negative_zero = (chosen == 0) & torch.signbit(quotients)
    data = torch.where(negative_zero, torch.tensor(128, dtype=torch.uint8), chosen)
    return data.view(torch.float8_e4m3fn).view(x.shape), scales
