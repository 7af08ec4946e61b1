"""From what the doctor measured to constants: each is a difference of two cases that differ in one thing. Pure."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ..doctor.operations import OperationCase, OperationTime
from ..errors import InvalidArgumentError
from .costs import RDMA_GB_PER_S, RDMA_LATENCY_US, Costs, OperationCosts, from_pairs
from .moved import Moved, combine_bytes, dispatch_bytes, low_latency_bytes
from .workload import Workload

_DTYPES = MappingProxyType({4: "float32", 2: "bfloat16"})


def read_costs(path: str | pathlib.Path, transport: str) -> Costs:
    """Constants from a file that ``ray-deepep doctor --bandwidth --json`` wrote.

    Raises:
        InvalidArgumentError: the file is not there, is not such a file, or is about another transport.
    """
    try:
        report = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgumentError("constants", str(path), f"must be a file that can be read ({error})") from error
    except ValueError as error:
        raise InvalidArgumentError("constants", str(path), f"must be JSON ({error})") from error
    if not isinstance(report, dict) or not report.get("pairs") or not report.get("transport"):
        rule = "must come from ray-deepep doctor --bandwidth --json, and hold transport and pairs"
        raise InvalidArgumentError("constants", str(path), rule)
    try:
        costs = fit_costs(report, source=f"{path}, measured on {report.get('host', 'an unnamed host')}")
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        rule = f"must hold what ray-deepep doctor --bandwidth --json writes ({type(error).__name__}: {error})"
        raise InvalidArgumentError("constants", str(path), rule) from error
    if costs.transport != transport:
        rule = f"must be measured over transport {transport}, not {costs.transport}"
        raise InvalidArgumentError("constants", str(path), rule)
    return costs


def fit_costs(report: Mapping[str, Any], *, source: str) -> Costs:
    """Constants from the doctor's report, as its JSON has it."""
    num_cores = report["num_cores"] if report["transport"] == "shm" else None
    common = {
        "transport": report["transport"],
        "num_ranks": report["num_ranks"],
        "num_cores": num_cores,
        "rdma_gb_per_s": RDMA_GB_PER_S,
        "rdma_latency_us": RDMA_LATENCY_US,
    }
    if not report["operations"]:
        operation = from_pairs(report["pairs"])
        return Costs(
            source=f"{source} (pairs only: operations of all ranks at once were not measured)",
            operations=MappingProxyType({"dispatch": operation, "combine": operation}),
            link_gb_per_s=None,
            **common,
        )
    times = [OperationTime.from_json(entry) for entry in report["operations"]]
    return _fit(times, source=source, common=common, element_size=report["row_bytes"] // times[0].case.hidden)


def _fit(times: list[OperationTime], *, source: str, common: dict[str, Any], element_size: int) -> Costs:
    """Token-major rows without staging and planning are the base; the others are compared with the largest of it."""
    base = sorted(
        (
            t
            for t in times
            if not t.case.low_latency
            and t.case.rows_in_heap
            and not t.case.new_routing
            and t.case.layout == "token_major"
        ),
        key=lambda t: t.case.num_tokens,
    )
    low = sorted((t for t in times if t.case.low_latency), key=lambda t: t.case.num_tokens)
    workloads = {id(t): workload_of(t.case, common["num_ranks"], common["transport"], element_size) for t in times}

    def points(chosen: list[OperationTime], side: str) -> list[tuple[Moved, float]]:
        return [(_moved(t.case, workloads[id(t)], side), getattr(t, f"{side}_us")) for t in chosen]

    largest = base[-1]
    (staged,) = (t for t in times if not t.case.rows_in_heap)
    (planned,) = (t for t in times if t.case.new_routing)
    expert_major = [t for t in times if t.case.layout == "expert_major"]
    operations = {}
    for side in ("dispatch", "combine"):
        stage_bytes = _moved(staged.case, workloads[id(staged)], side).staged
        stage_us = max(0.0, getattr(staged, f"{side}_us") - getattr(largest, f"{side}_us")) / stage_bytes
        curve = points(base, side) if not expert_major else [points(base[:1], side)[0], *points(expert_major, side)]
        operations[side] = _operation(curve, stage_us)
        if low:
            operations[f"low_latency_{side}"] = _operation(points(low, side), 0.0)
    routes = common["num_ranks"] * planned.case.num_tokens * planned.case.num_topk
    link = None
    if expert_major:
        ((moved, us),) = points([largest], "dispatch")
        link = moved.link / max(us - operations["dispatch"].latency_us, 1e-3) * 1e-3
    return Costs(
        source=source,
        operations=MappingProxyType(operations),
        link_gb_per_s=link,
        plan_ns_per_route=max(0.0, planned.dispatch_us - largest.dispatch_us) / routes * 1e3,
        **common,
    )


def workload_of(case: OperationCase, num_ranks: int, transport: str, element_size: int) -> Workload:
    """What a measured case is in the terms of a plan."""
    return Workload(
        num_nodes=1,
        gpus_per_node=num_ranks,
        hidden=case.hidden,
        num_experts=case.num_experts,
        num_topk=case.num_topk,
        num_tokens=case.num_tokens,
        low_latency_tokens=case.num_tokens if case.low_latency else 0,
        dtype="bfloat16" if case.low_latency else _DTYPES[element_size],
        layout=case.layout,
        reduce=case.reduce,
        transport=transport,
        rows_in_heap=case.rows_in_heap,
        cached_plan=not case.new_routing,
    )


def _moved(case: OperationCase, workload: Workload, side: str) -> Moved:
    if case.low_latency:
        return low_latency_bytes(workload, side)
    return dispatch_bytes(workload) if side == "dispatch" else combine_bytes(workload)


def _operation(curve: list[tuple[Moved, float]], stage_us_per_byte: float) -> OperationCosts:
    """The first point moves one row: its time is the latency. Noise must not make more bytes cheaper than fewer."""
    latency = curve[0][1]
    copy: list[tuple[float, float]] = []
    for moved, us in curve[1:]:
        copy.append((moved.copied, max(us - latency, copy[-1][1] if copy else 0.0, 1e-3)))
    return OperationCosts(latency_us=latency, copy_us=tuple(copy), stage_us_per_byte=stage_us_per_byte)
