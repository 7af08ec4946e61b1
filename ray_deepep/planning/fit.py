"""From what the doctor measured to constants: each is a difference of two cases that differ in one thing. Pure."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ..doctor.operations import OperationCase, OperationTime
from ..errors import InvalidArgumentError
from .costs import (
    EXACT_COMBINE,
    EXPERT_MAJOR,
    RDMA_GB_PER_S,
    RDMA_LATENCY_US,
    Costs,
    OperationCosts,
    copy_us,
    from_pairs,
)
from .moved import Moved, combine_bytes, dispatch_bytes, low_latency_bytes
from .workload import Workload

_DTYPES = MappingProxyType({4: "float32", 2: "bfloat16"})
_SHORTEST_US = 1e-3


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sample:
    """One measured case, and the bytes that it moved."""

    time: OperationTime
    moved: Mapping[str, Moved]
    """By side, ``dispatch`` and ``combine``."""

    def us(self, side: str) -> float:
        return self.time.dispatch_us if side == "dispatch" else self.time.combine_us


def _fit(times: list[OperationTime], *, source: str, common: dict[str, Any], element_size: int) -> Costs:
    """Token-major rows without staging and planning are the base; the others are compared with the largest of it."""
    samples = [_sample(entry, common["num_ranks"], common["transport"], element_size) for entry in times]
    samples.sort(key=lambda sample: sample.time.case.num_tokens)
    normal = [sample for sample in samples if not sample.time.case.low_latency]
    low_latency = [sample for sample in samples if sample.time.case.low_latency]
    expert_major = [sample for sample in normal if sample.time.case.layout == "expert_major"]
    staged = [sample for sample in normal if not sample.time.case.rows_in_heap]
    (planned,) = (sample for sample in normal if sample.time.case.new_routing)
    others = [*staged, planned, *expert_major]
    base = [sample for sample in normal if sample not in others]
    largest, operations = base[-1], {}
    for side in ("dispatch", "combine"):
        operation = _operation(base, side)
        staging = _staging(staged, largest, operation, side)
        operations[side] = dataclasses.replace(operation, **staging)
        for sample in expert_major:
            # GPUs: token-major rows wait for the link, so that copies show in expert-major ones alone.
            exact = sample.time.case.reduce == "exact"
            if not exact or side == "combine":
                name = EXACT_COMBINE if exact else f"{EXPERT_MAJOR}{side}"
                operations[name] = dataclasses.replace(_operation([base[0], sample], side), **staging)
        if low_latency:
            operations[f"low_latency_{side}"] = _operation(low_latency, side)
    return Costs(
        source=source,
        operations=MappingProxyType(operations),
        link_gb_per_s=_link_gb_per_s([largest, *expert_major], operations) if expert_major else None,
        **_planning(planned, largest, common),
        **common,
    )


def _link_gb_per_s(samples: list[_Sample], operations: Mapping[str, OperationCosts]) -> float:
    """By whatever gets most out of it: the others are not held up by the link."""
    return max(
        sample.moved[side].link / max(sample.us(side) - operations[side].latency_us, _SHORTEST_US) * 1e-3
        for sample in samples
        for side in ("dispatch", "combine")
    )


def _staging(staged: list[_Sample], largest: _Sample, operation: OperationCosts, side: str) -> dict[str, float]:
    """What plain tensors cost over those in the heap, by bytes and, where narrower rows were measured too, by rows."""
    narrow, wide = min(staged, key=_hidden), max(staged, key=_hidden)
    over = max(0.0, wide.us(side) - largest.us(side))
    moved, less = wide.moved[side], narrow.moved[side]
    if narrow is wide:
        return {"stage_us_per_byte": over / moved.staged}
    narrow_over = max(0.0, narrow.us(side) - operation.latency_us - copy_us(operation, less.copied))
    # Rows cost nothing less than zero beside their bytes, however much faster than expected the narrow ones were.
    per_byte = min(max(0.0, over - narrow_over) / (moved.staged - less.staged), over / moved.staged)
    return {
        "stage_us_per_byte": per_byte,
        "stage_us_per_row": (over - per_byte * moved.staged) / moved.staged_rows,
    }


def _hidden(sample: _Sample) -> int:
    return sample.time.case.hidden


def _planning(planned: _Sample, largest: _Sample, common: dict[str, Any]) -> dict[str, float]:
    """What new routing costs over a cached plan: a core looks at one route after the other; on GPUs it is two launches,
    signals and a few trips to memory, nearly the same whatever the routes."""
    over = max(0.0, planned.us("dispatch") - largest.us("dispatch"))
    if common["transport"] == "cuda":
        return {"plan_us": over}
    case = planned.time.case
    return {"plan_ns_per_route": over / (common["num_ranks"] * case.num_tokens * case.num_topk) * 1e3}


def _sample(entry: OperationTime, num_ranks: int, transport: str, element_size: int) -> _Sample:
    workload = workload_of(entry.case, num_ranks, transport, element_size)
    if entry.case.low_latency:
        moved = {side: low_latency_bytes(workload, side) for side in ("dispatch", "combine")}
    else:
        moved = {"dispatch": dispatch_bytes(workload), "combine": combine_bytes(workload)}
    return _Sample(time=entry, moved=moved)


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


def _operation(samples: list[_Sample], side: str) -> OperationCosts:
    """The first sample moves one row: its time is the latency. Noise must not make more bytes cheaper than fewer."""
    latency = samples[0].us(side)
    copy: list[tuple[float, float]] = []
    for sample in samples[1:]:
        at_least = copy[-1][1] if copy else _SHORTEST_US
        copy.append((sample.moved[side].copied, max(sample.us(side) - latency, at_least)))
    return OperationCosts(latency_us=latency, copy_us=tuple(copy))
