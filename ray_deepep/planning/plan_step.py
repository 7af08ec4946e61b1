"""The plan step for many ranks: the CPU core's own plan arithmetic on made-up routing, its time and its memory.

Every rank reads the routing of all ranks, so planning is the part of an operation that grows with the number of ranks
while a rank's rows do not. One rank's plan is made here, with the routing of all ranks in this process's memory.
"""

from __future__ import annotations

import dataclasses
import time

import torch
from tqdm import tqdm

from .. import shm
from ..errors import InvalidArgumentError, TransportUnavailableError

MAX_RANKS = 2048
MAX_ROUTING_BYTES = 1 << 31
"""Of the routing of all ranks, to be held here at once."""
_REPEATS = 3
_MOST_DENSE = 8
"""Up to so many experts per choice, routing is drawn by sorting; beyond, by drawing again where a choice repeats."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanStep:
    """The plan of one rank."""

    num_ranks: int
    num_experts: int
    num_tokens: int
    num_topk: int
    layout: str
    plan_ms: float
    """One thread, best of three."""
    ns_per_route: float
    """The time over the routes of all ranks that are read."""
    read_bytes: int
    """Routing and counts of all ranks."""
    plan_bytes: int
    """Index lists of the rank's plan."""
    num_recv_tokens: int
    """Rows that the rank would receive, one per (token, rank)."""


def simulate_plan_steps(
    rank_counts: list[int], *, num_tokens: int, num_topk: int, num_experts: int | None = None, layout: str
) -> list[PlanStep]:
    """Make the plan of the middle rank for each number of ranks.

    num_experts: the same for all; None: one per rank, and at least 256.

    Raises:
        InvalidArgumentError: a size breaks its rule, or the routing would not fit.
        TransportUnavailableError: the CPU core is not built.
    """
    if not shm.core_version()[0]:
        raise TransportUnavailableError(f"the plan step needs the CPU core: {shm.core_version()[1]}")
    sizes = [(ranks, num_experts or _experts_for(ranks)) for ranks in rank_counts]
    for ranks, experts in sizes:
        _check(ranks, experts, num_tokens, num_topk)
    bar = tqdm(sizes, desc="plan step", unit="size", leave=False, disable=None)
    return [
        _plan_step(ranks, experts, num_tokens=num_tokens, num_topk=num_topk, layout=layout) for ranks, experts in bar
    ]


def _experts_for(num_ranks: int) -> int:
    return num_ranks * max(1, -(-256 // num_ranks))


def _check(num_ranks: int, num_experts: int, num_tokens: int, num_topk: int) -> None:
    if not 1 <= num_ranks <= MAX_RANKS:
        raise InvalidArgumentError("simulate", num_ranks, f"must be in [1, {MAX_RANKS}] ranks")
    if num_experts % num_ranks:
        raise InvalidArgumentError("num_experts", num_experts, f"must be a multiple of {num_ranks} ranks")
    if not 1 <= num_topk <= num_experts:
        raise InvalidArgumentError("num_topk", num_topk, f"must be in [1, {num_experts}]")
    num_bytes = 4 * num_ranks * num_tokens * num_topk
    if num_bytes > MAX_ROUTING_BYTES:
        most = MAX_ROUTING_BYTES // (4 * num_ranks * num_topk)
        raise InvalidArgumentError("num_tokens", num_tokens, f"must be at most {most} to simulate {num_ranks} ranks")


def _plan_step(num_ranks: int, num_experts: int, *, num_tokens: int, num_topk: int, layout: str) -> PlanStep:
    core = shm._load()
    topk_idx = uniform_routing(num_ranks * num_tokens, num_topk, num_experts, seed=num_ranks)
    table = core.RoutingTable(
        num_ranks=num_ranks,
        num_experts=num_experts,
        num_tokens=num_tokens,
        num_topk=num_topk,
        topk_idx=topk_idx.data_ptr(),
    )
    kind = core.LayoutKind.TOKEN_MAJOR if layout == "token_major" else core.LayoutKind.EXPERT_MAJOR
    best, plan = float("inf"), None
    for _ in range(_REPEATS):
        start = time.perf_counter()
        plan = table.plan(num_ranks // 2, core.Layout(kind))
        best = min(best, time.perf_counter() - start)
    routes = num_ranks * num_tokens * num_topk
    return PlanStep(
        num_ranks=num_ranks,
        num_experts=num_experts,
        num_tokens=num_tokens,
        num_topk=num_topk,
        layout=layout,
        plan_ms=best * 1e3,
        ns_per_route=best * 1e9 / max(routes, 1),
        read_bytes=table.published_bytes,
        plan_bytes=plan.num_bytes,
        num_recv_tokens=plan.num_recv_tokens,
    )


def uniform_routing(num_tokens: int, num_topk: int, num_experts: int, *, seed: int) -> torch.Tensor:
    """``[num_tokens, num_topk]`` int32: different experts of each token, every set of them equally likely."""
    generator = torch.Generator().manual_seed(seed)
    if num_experts < _MOST_DENSE * num_topk:
        return torch.rand(num_tokens, num_experts, generator=generator).topk(num_topk).indices.to(torch.int32)
    chosen = torch.randint(num_experts, (num_tokens, num_topk), generator=generator, dtype=torch.int32)
    while True:
        ordered = chosen.sort(1).values
        again = (ordered[:, 1:] == ordered[:, :-1]).any(1).nonzero().flatten()
        if len(again) == 0:
            return chosen
        chosen[again] = torch.randint(num_experts, (len(again), num_topk), generator=generator, dtype=torch.int32)
