"""A prediction as text. Pure."""

from __future__ import annotations

import dataclasses
from typing import Any

from .plan_step import PlanStep
from .predict import Prediction

_UNITS = ("B", "KB", "MB", "GB", "TB", "PB", "EB")


def prediction_lines(prediction: Prediction) -> list[str]:
    """The report of ``ray-deepep plan``."""
    workload, traffic = prediction.workload, prediction.traffic
    sizes = f"{workload.num_tokens} tokens x {workload.hidden} {workload.dtype}"
    place = "GPUs" if workload.transport == "cuda" else "ranks"
    return [
        f"{workload.num_nodes} nodes x {workload.gpus_per_node} {place} = EP {workload.num_ranks}, {sizes},"
        f" top-{workload.num_topk} of {workload.num_experts} experts, {workload.layout}, {workload.reduce}",
        f"constants: {prediction.constants}",
        "",
        f"rows per rank: {traffic.pairs:,.0f} received (token, rank), {traffic.link_pairs:,.0f} of them over "
        f"{'NVLink' if workload.transport == 'cuda' else 'shared memory'}; "
        f"{traffic.rdma_rows:,.0f} sent to other nodes (token, node); {traffic.routes:,.0f} routes",
        "",
        *_operation_lines(prediction),
        "",
        *_memory_lines(prediction),
        *(f"note: {note}" for note in prediction.notes),
    ]


def _operation_lines(prediction: Prediction) -> list[str]:
    link = "NVLink" if prediction.workload.transport == "cuda" else "shared"
    header = (
        f"{'operation, per rank':22} {'us':>10} {'floor us':>10} {link:>10} {'RDMA':>10} {'local':>10} {'staged':>10}"
    )
    lines = [header]
    for plan in prediction.operations:
        sizes = (plan.nvlink_bytes, plan.rdma_bytes, plan.local_bytes, plan.staged_bytes)
        cells = " ".join(f"{bytes_text(size):>10}" for size in sizes)
        lines.append(f"{plan.operation:22} {plan.us:10,.0f} {plan.floor_us:10,.0f} {cells}")
    return lines


def _memory_lines(prediction: Prediction) -> list[str]:
    memory, shm = prediction.memory, prediction.workload.transport == "shm"
    entries = [
        ("heap, reserved" if shm else "heap", memory.heap_bytes),
        ("heap, used at most", memory.heap_used_bytes if shm else None),
        (f"heap with max_rows={memory.suggested_max_rows}", None if shm else memory.suggested_heap_bytes),
        ("landing zone for other nodes", memory.landing_bytes or None),
        ("low-latency heap, reserved", memory.low_latency_heap_bytes or None),
        ("low-latency heap, used at most", memory.low_latency_used_bytes or None),
        ("outputs", memory.output_bytes),
        ("plan", memory.plan_bytes),
        ("host memory", memory.host_bytes),
        ("host memory of a node", memory.host_bytes_per_node),
    ]
    lines = ["memory per rank"]
    return lines + [f"  {name:32} {bytes_text(size):>10}" for name, size in entries if size is not None]


def plan_step_lines(steps: list[PlanStep]) -> list[str]:
    """The table of ``--simulate``."""
    lines = [
        f"{'ranks':>6} {'experts':>8} {'plan ms':>9} {'ns/route':>9} {'routing read':>13} {'plan':>10} {'rows':>9}"
    ]
    for step in steps:
        lines.append(
            f"{step.num_ranks:6} {step.num_experts:8} {step.plan_ms:9.2f} {step.ns_per_route:9.2f}"
            f" {bytes_text(step.read_bytes):>13} {bytes_text(step.plan_bytes):>10} {step.num_recv_tokens:9,}"
        )
    return lines


def bytes_text(num_bytes: float) -> str:
    """Such as ``58.7 MB``, in powers of ten."""
    value, unit = float(num_bytes), 0
    while value >= 1000 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return (
        f"{value:.0f} B"
        if unit == 0
        else f"{value:.3g} {_UNITS[unit]}"
        if value < 100
        else f"{value:.0f} {_UNITS[unit]}"
    )


def as_json(prediction: Prediction, steps: list[PlanStep]) -> dict[str, Any]:
    """For ``--json``."""
    return dataclasses.asdict(prediction) | {"plan_steps": [dataclasses.asdict(step) for step in steps]}
