"""``predict``: time, bytes and memory of one MoE layer's dispatch and combine, from sizes and constants. Pure."""

from __future__ import annotations

import dataclasses

from ..errors import InvalidArgumentError
from .costs import (
    EXACT_COMBINE,
    EXPERT_MAJOR,
    RDMA_GB_PER_S,
    RDMA_LATENCY_US,
    RDMA_NOTE,
    Costs,
    OperationCosts,
    contention,
    copy_us,
    scaled,
)
from .memory import Memory, expected_memory
from .moved import Moved, combine_bytes, dispatch_bytes, low_latency_bytes
from .traffic import Traffic, expected_traffic
from .workload import Workload


@dataclasses.dataclass(frozen=True, kw_only=True)
class OperationPlan:
    """One operation, per rank."""

    operation: str
    us: float
    """Predicted time of a call."""
    floor_us: float
    """What the slower of NVLink and RDMA needs for the bytes alone; 0 where ranks share memory."""
    nvlink_bytes: float
    """Received over NVLink; from other ranks' memory on CPUs."""
    rdma_bytes: float
    """Sent to other nodes, and received from them."""
    local_bytes: float
    """Written to their final place, or read to be added up and written as sums."""
    staged_bytes: float
    """Copied into the heap before."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """What :func:`predict` says."""

    workload: Workload
    traffic: Traffic
    """Rows of a normal call."""
    operations: tuple[OperationPlan, ...]
    memory: Memory
    constants: str
    """Where the constants come from."""
    notes: tuple[str, ...]
    """What is assumed, extrapolated or left out."""


def predict(workload: Workload, costs: Costs) -> Prediction:
    """Predict with constants of :func:`default_costs` or :func:`read_costs`.

    Raises:
        InvalidArgumentError: the constants are those of another transport.
    """
    if costs.transport != workload.transport:
        rule = f"must be {costs.transport}, over which the constants were measured"
        raise InvalidArgumentError("transport", workload.transport, rule)
    moved = {"dispatch": dispatch_bytes(workload), "combine": combine_bytes(workload)}
    if workload.low_latency_tokens:
        for side in ("dispatch", "combine"):
            moved[f"low_latency_{side}"] = low_latency_bytes(workload, side)
    factor = _shared_cores(workload, costs)
    by_name = dict(costs.operations)
    if workload.layout == "expert_major":
        by_name |= {name: by_name[EXPERT_MAJOR + name] for name in moved if EXPERT_MAJOR + name in by_name}
        if workload.sends_routes and EXACT_COMBINE in by_name:
            by_name["combine"] = by_name[EXACT_COMBINE]
    known = {name: scaled(operation, factor) for name, operation in by_name.items()}
    plan_us = (costs.plan_us + costs.plan_ns_per_route * 1e-3 * _routes_read(workload)) * factor
    operations = tuple(
        _operation(
            name, bytes_, known[name], costs, plan_us if name == "dispatch" and not workload.cached_plan else 0.0
        )
        for name, bytes_ in moved.items()
        if name in known
    )
    traffic = expected_traffic(workload, workload.num_tokens)
    return Prediction(
        workload=workload,
        traffic=traffic,
        operations=operations,
        memory=expected_memory(workload, traffic),
        constants=costs.source,
        notes=_notes(workload, costs, missing=sorted(set(moved) - set(known))),
    )


def _routes_read(workload: Workload) -> int:
    return workload.num_ranks * workload.num_tokens * workload.num_topk


def _shared_cores(workload: Workload, costs: Costs) -> float:
    if costs.num_ranks is None or costs.num_cores is None:
        return 1.0
    return contention(workload.gpus_per_node, costs.num_cores) / contention(costs.num_ranks, costs.num_cores)


def _operation(name: str, moved: Moved, known: OperationCosts, costs: Costs, plan_us: float) -> OperationPlan:
    link_us = moved.link / costs.link_gb_per_s * 1e-3 if costs.link_gb_per_s else 0.0
    rdma_us = moved.rdma / costs.rdma_gb_per_s * 1e-3
    hop_us = costs.rdma_latency_us + rdma_us if moved.rdma else 0.0
    staging_us = moved.staged * known.stage_us_per_byte + moved.staged_rows * known.stage_us_per_row
    copying_us = copy_us(known, moved.copied) + staging_us
    return OperationPlan(
        operation=name,
        us=known.latency_us + max(link_us, copying_us) + hop_us + plan_us,
        floor_us=max(link_us, rdma_us),
        nvlink_bytes=moved.link,
        rdma_bytes=moved.rdma,
        local_bytes=moved.copied,
        staged_bytes=moved.staged,
    )


def _notes(workload: Workload, costs: Costs, missing: list[str]) -> tuple[str, ...]:
    notes = list(costs.notes)
    if workload.num_nodes > 1:
        notes.append("between nodes, the hop is added to the time within the node; where the two overlap, it is less")
        if (costs.rdma_gb_per_s, costs.rdma_latency_us) == (RDMA_GB_PER_S, RDMA_LATENCY_US):
            notes.append(RDMA_NOTE)
    if workload.transport == "cuda" and workload.low_latency_tokens:
        notes.append("low-latency times on GPUs are those of the normal kernels' model, not of the low-latency kernels")
    if costs.num_ranks is not None and costs.num_ranks != workload.gpus_per_node:
        notes.append(f"measured with {costs.num_ranks} ranks on a host, extrapolated to {workload.gpus_per_node}")
    if missing:
        notes.append(f"not measured, so not predicted: {', '.join(missing)}")
    return tuple(notes)
