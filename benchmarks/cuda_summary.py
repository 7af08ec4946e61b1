"""The chief cases of ``cuda_dispatch_combine`` for README.md: by number of SMs, the floor and NCCL beside them."""

from __future__ import annotations

import dataclasses

from .cuda_traffic import WIRE_GB_S
from .records import Record, by_case, by_sms, has_own_gpus, markdown_table

COMPARED_SMS = 24
"""What NCCL is compared with: more than most operations need, few enough to leave the GPU to others."""
ALL_GATHER = "NCCL all_gather of all tokens"
REDUCE_SCATTER = "NCCL reduce_scatter of all tokens"
ALL_TO_ALL = "sort + gather + NCCL all-to-all-v of routes"
# Each with what NCCL needs for the same rows; none where NCCL has no call that does as much and no more.
CHIEF = {
    "dispatch bfloat16, token-major, cached, in heap": ALL_GATHER,
    "dispatch bfloat16, token-major, fresh, in heap": ALL_GATHER,
    "dispatch bfloat16, token-major, fixed, in heap": ALL_GATHER,
    "dispatch bfloat16, token-major, cached": ALL_GATHER,
    "dispatch bfloat16, expert-major 1, cached, in heap": None,
    "dispatch bfloat16, expert-major 1, fresh, in heap": ALL_TO_ALL,
    "dispatch fp8 given, token-major, cached, in heap": None,
    "dispatch fp8 cast, token-major, cached, in heap": None,
    "combine bfloat16, token-major, in heap": REDUCE_SCATTER,
    "combine bfloat16, token-major": REDUCE_SCATTER,
    "combine bfloat16, expert-major 128, weighted, fast, in heap": None,
    "combine bfloat16, expert-major 128, weighted, exact, in heap": None,
}
_TERMS = (
    "*Cached*: along the plan of an earlier dispatch; *fresh*: new routing, the host learns the counts; *fixed*: new "
    "routing, fixed shapes, the host waits for nothing. *Expert-major 1*, *128*: rows by expert, each expert's rows "
    "filled up to a multiple of that. *In heap*: rows were made in tensors of `symm_empty`; elsewhere they are plain "
    "and are staged. *fp8 given*: rows are float8 with scales; *cast*: dispatch makes them so. *Fast* sums on the "
    "experts' rank, *exact* sends a row for each route. *Floor* is the time of the bytes that must cross to other "
    f"ranks, each row once, at {WIRE_GB_S:.0f} GB/s (bulk copies over NVLink 4 between H100s)"
)
EXPLANATION = (
    "Whole calls between CUDA events, us, median of the slowest rank, the L2 flushed before each. The GPU is busy "
    "until all is launched and ranks begin together, so this is what the GPUs need (calls that wait for counts show "
    "that wait). Each number of SMs is from its newest run. With an idle GPU the host's time comes on top: "
    f"`benchmarks/results/README.md` has both, and all variants. {_TERMS}; *share* is floor by the row's best time. "
    "*NCCL* is of the same run, from plain tensors, with "
    f"its ratio to ours at {COMPARED_SMS} SMs: `all_gather` and `reduce_scatter` of all tokens beside token-major rows "
    "(with two ranks and top-8 nearly every token goes to both, so that the same bytes cross; they need no plan), and "
    "sort, gather, exchange of counts and all-to-all-v, a row per route, beside the expert-major dispatch that learns "
    "counts too."
)
FULL_EXPLANATION = (
    "Whole calls between CUDA events, median of the slowest rank, the L2 flushed before each. *us*, with p10 and p90: "
    "the GPU is idle when the call is made, so that the host's work before the launches counts. *Queued*: the GPU is "
    "busy until all is launched and ranks begin together, so this is what the GPUs need (calls that wait for counts "
    f"show that wait). *Host*: from call to return, the GPU idle. {_TERMS}. *DeepEP's GB/s* are all token rows that a "
    "rank gets, its own too, by *us*."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chief:
    """One row of the table, us."""

    name: str
    times: dict[int, float]
    """By number of SMs."""
    floor: float
    nccl: float | None

    @property
    def ratio(self) -> float | None:
        """NCCL by ours."""
        ours = self.times.get(COMPARED_SMS)
        return None if self.nccl is None or ours is None else self.nccl / ours


def chief_rows(records: list[Record]) -> list[Chief]:
    """Those of one case that were measured."""
    nccl = {r["variant"]: r["queued_median_us"] for r in records if r["num_sms"] is None}
    found = by_sms(records)
    return [
        Chief(
            name=name,
            times={num_sms: r["queued_median_us"] for num_sms, r in found[name].items()},
            floor=next(iter(found[name].values()))["floor_us"],
            nccl=nccl.get(baseline),
        )
        for name, baseline in CHIEF.items()
        if name in found
    ]


def summary_table(records: list[Record]) -> str:
    """A table per case."""
    return "\n\n".join(map(_case_table, by_case(records)))


def _case_table(records: list[Record]) -> str:
    config, rows = records[0]["config"], chief_rows(records)
    all_sms = sorted({num_sms for row in rows for num_sms in row.times})
    cells = [
        [
            row.name,
            *(f"{row.times[num_sms]:,.0f}" if num_sms in row.times else "" for num_sms in all_sms),
            f"{row.floor:.0f}",
            f"{row.floor / min(row.times.values()):.0%}",
            "" if row.nccl is None else f"{row.nccl:,.0f}",
            "" if row.ratio is None else f"**{row.ratio:.2f}×**",
        ]
        for row in rows
    ]
    sizes = f"{config['num_tokens']} × {config['hidden']}, top-{config['num_topk']} of {config['num_experts']}"
    header = [f"us, {config['num_ranks']} ranks, {sizes}", *(f"{num_sms} SMs" for num_sms in all_sms)]
    return markdown_table([*header, "floor", "share", "NCCL", "NCCL / ours"], cells)


def is_headline(record: Record) -> bool:
    """The case that stands for the others, over a wire."""
    wanted = {"num_tokens": 4096, "hidden": 7168, "num_topk": 8, "num_experts": 256, "routing": "uniform"}
    config = record["config"]
    unusual = {"domain_size", "heap_provider"} & config.keys()
    return has_own_gpus(record) and not unusual and wanted.items() <= config.items()
