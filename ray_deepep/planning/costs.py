"""What an operation costs: constants measured by ``ray-deepep doctor --bandwidth --json``, or documented defaults.

The model of an operation, which :mod:`predict` applies to expected traffic:

    time = latency + max(link bytes / link GB/s, copy(bytes written)) + staging + plan
    staging = staged bytes * stage_us_per_byte + staged rows * stage_us_per_row
    plan = plan_us + plan_ns_per_route * N * T * K, for routing that is new

``copy`` is a line through measured points (bytes, us), because bytes that stay in a cache cost less than others. On
GPUs token-major rows, expert-major rows, and expert-major rows that come home one by one (``exact``) have a line each;
for as many ranks as were measured, the first one's has the link in it.
Between nodes one hop comes before (dispatch) or after it (combine): rdma latency + rdma bytes / rdma GB/s.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

EXPERT_MAJOR = "expert_major_"
"""Before the name of an operation in ``Costs.operations``: with rows by expert, where that was measured by itself."""
EXACT_COMBINE = f"{EXPERT_MAJOR}exact_combine"
"""Likewise, a combine to which every route's row comes home."""
OPERATIONS = ("dispatch", "combine", "low_latency_dispatch", "low_latency_combine")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OperationCosts:
    """Of one kind of operation, with all ranks at it at once."""

    latency_us: float
    """Of an operation that moves one row."""
    copy_us: tuple[tuple[float, float], ...]
    """(bytes, us over the latency), ascending, of rows that a rank writes; beyond the last point, its slope goes on."""
    stage_us_per_byte: float = 0.0
    """Of rows that are copied into the heap first."""
    stage_us_per_row: float = 0.0
    """Beside that."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Costs:
    """Constants of one machine, and where they come from."""

    source: str
    """In words, for the output."""
    transport: str
    num_ranks: int | None
    """Ranks of a host with which they were measured; None: as many as there are GPUs."""
    num_cores: int | None
    """Cores that these ranks shared; None on GPUs, which share nothing."""
    operations: Mapping[str, OperationCosts]
    """By name; those of low-latency calls may be missing, and those of expert-major rows: they cost the same then."""
    link_gb_per_s: float | None
    """What a GPU reads over NVLink while it is read from; None where ranks share memory, and links are copies."""
    plan_us: float = 0.0
    plan_ns_per_route: float = 0.0
    """Per route of all ranks: each rank reads them all."""
    rdma_gb_per_s: float
    """What a GPU sends to other nodes."""
    rdma_latency_us: float
    notes: tuple[str, ...] = ()
    """What is assumed rather than measured."""


RDMA_GB_PER_S, RDMA_LATENCY_US = 45.0, 5.0
RDMA_NOTE = (
    f"between nodes {RDMA_GB_PER_S:g} GB/s per GPU (a 400 Gb/s adapter each, at 90 %) and {RDMA_LATENCY_US:g} us are "
    "assumed, not measured; give --rdma-gb-per-s and --rdma-latency-us"
)
MEMORY_LATENCY_US, MEMORY_GB_PER_S = 300.0, 6.0


def _one_rate(latency_us: float, gb_per_s: float, *, stage_gb_per_s: float = math.inf) -> OperationCosts:
    return OperationCosts(
        latency_us=latency_us, copy_us=((1e9, 1e6 / gb_per_s),), stage_us_per_byte=1e-3 / stage_gb_per_s
    )


def default_costs(transport: str) -> Costs:
    """Constants for a machine that nobody measured. GPUs: two H100s joined by NVLink 4, rows moved by 24 SMs."""
    if transport == "cuda":
        # Measured: 330 GB/s while both directions are busy; 1,080 GB/s for copies of 24 SMs within a GPU; 10 us for a
        # kernel with a barrier, launched in a loop; on 2 H200 39 us for new routing, until the host knows the counts
        # and has launched the rest (20 us of it publish and plan).
        operation = _one_rate(10.0, 1080.0)
        return Costs(
            source="defaults, measured on 2 H100 with NVLink 4, 24 SMs (docs/plan.md)",
            transport=transport,
            num_ranks=None,
            num_cores=None,
            operations=MappingProxyType(dict.fromkeys(OPERATIONS, operation)),
            link_gb_per_s=330.0,
            plan_us=39.0,
            rdma_gb_per_s=RDMA_GB_PER_S,
            rdma_latency_us=RDMA_LATENCY_US,
            notes=("staging is taken to be hidden under the transfer",),
        )
    operation = _one_rate(MEMORY_LATENCY_US, MEMORY_GB_PER_S, stage_gb_per_s=MEMORY_GB_PER_S)
    return Costs(
        source="defaults, of 2 ranks on 2 cores of an AMD EPYC (docs/plan.md)",
        transport=transport,
        num_ranks=2,
        num_cores=2,
        operations=MappingProxyType(dict.fromkeys(OPERATIONS, operation)),
        link_gb_per_s=None,
        plan_ns_per_route=10.0,
        rdma_gb_per_s=RDMA_GB_PER_S,
        rdma_latency_us=RDMA_LATENCY_US,
    )


def copy_us(costs: OperationCosts, num_bytes: float) -> float:
    """Time of writing ``num_bytes``, us, from the line through the measured points."""
    before = (0.0, 0.0)
    points = costs.copy_us
    for index, point in enumerate(points):
        if num_bytes <= point[0] or index == len(points) - 1:
            share = (num_bytes - before[0]) / (point[0] - before[0])
            return before[1] + share * (point[1] - before[1])
        before = point
    return 0.0


def contention(num_ranks: int, num_cores: int | None) -> float:
    """How many ranks share one core, at least one; 1 on GPUs."""
    return max(1.0, num_ranks / num_cores) if num_cores else 1.0


def scaled(costs: OperationCosts, factor: float) -> OperationCosts:
    """The same with every time ``factor`` times as long."""
    return OperationCosts(
        latency_us=costs.latency_us * factor,
        copy_us=tuple((num_bytes, us * factor) for num_bytes, us in costs.copy_us),
        stage_us_per_byte=costs.stage_us_per_byte * factor,
        stage_us_per_row=costs.stage_us_per_row * factor,
    )


def from_pairs(pairs: list[Mapping[str, Any]]) -> OperationCosts:
    """One rate and one latency, of the median pair, for a file without operations."""
    rates = [min(pair["dispatch_gb_per_s"], pair["combine_gb_per_s"]) for pair in pairs]
    latency = statistics.median(max(pair["dispatch_us"], pair["combine_us"]) for pair in pairs)
    rate = statistics.median(rates)
    return _one_rate(latency, rate, stage_gb_per_s=rate)
