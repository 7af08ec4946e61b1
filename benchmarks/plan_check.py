"""Predictions of ``ray-deepep plan`` against measurements, in one run: fit some sizes, predict others.

    python -m benchmarks.plan_check                        # the CPU core, 2 and 4 ranks
    python -m benchmarks.plan_check --transport cuda       # one rank per GPU, or several under MPS
    python -m benchmarks.plan_check --ranks 2 --rounds 20

Cases of both kinds take turns, round after round, and are timed by the doctor's own code; what counts is the lower
quartile of the rounds. None of the sizes that are predicted is among those from which constants come. Time between
nodes cannot be checked on one host. Nothing is asserted: the table shows predicted over measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from typing import Any

import torch
import torch.distributed as dist

from ray_deepep import CommConfig, Communicator
from ray_deepep.doctor.operations import OperationCase, OperationTime, fitting_cases, time_operations
from ray_deepep.planning import fit_costs, predict
from ray_deepep.planning.fit import workload_of

from .machine import OthersWatch, wait_until_quiet
from .ranks import run_ranks
from .records import RESULTS, Record, append, markdown_table, run_facts
from .run import RunOptions, add_options

NAME = "plan_check"
RESULTS_PATH = RESULTS / f"{NAME}.jsonl"
SIDES = ("dispatch", "combine")
WITHIN = 0.2
"""The share of its measurement by which a prediction may be off to count as close."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """What constants and checks have in common."""

    transport: str
    num_ranks: int
    hidden: int
    num_tokens: int
    dtype: str

    @classmethod
    def of(cls, transport: str, num_ranks: int) -> Machine:
        """As the doctor chooses."""
        if transport == "cuda":
            return cls(transport=transport, num_ranks=num_ranks, hidden=7168, num_tokens=4096, dtype="bfloat16")
        return cls(transport=transport, num_ranks=num_ranks, hidden=1024, num_tokens=2048, dtype="float32")


def checked_cases(machine: Machine) -> list[OperationCase]:
    """Sizes that no constant comes from: another H, T, K and E each, both layouts, with and without staging."""
    base = OperationCase(
        num_tokens=machine.num_tokens,
        hidden=machine.hidden,
        num_topk=2,
        num_experts=4 * machine.num_ranks,
        new_routing=True,
    )
    half, more = machine.hidden // 2, machine.num_tokens * 3 // 2
    cases = [
        base,
        dataclasses.replace(base, rows_in_heap=False),
        dataclasses.replace(base, hidden=half, num_topk=6, num_experts=16 * machine.num_ranks),
        dataclasses.replace(base, num_tokens=more, hidden=half, rows_in_heap=False, new_routing=False),
        dataclasses.replace(base, num_tokens=more, num_topk=3, new_routing=False),
        dataclasses.replace(base, num_tokens=machine.num_tokens // 2, hidden=2 * machine.hidden, rows_in_heap=False),
        dataclasses.replace(base, num_topk=3, layout="expert_major", reduce="exact"),
    ]
    if machine.transport == "shm":
        cases.append(dataclasses.replace(base, low_latency=True, new_routing=False, num_tokens=64, num_topk=6))
    return cases


def measure(machine: dict[str, Any], cases: list[dict[str, Any]], num_rounds: int) -> list[dict[str, Any]]:
    """Times of all cases; called on every rank."""
    if machine["transport"] == "cuda":
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    config = CommConfig(transport=machine["transport"], num_threads=1, allow_shared_gpus=True)
    with Communicator.from_process_group(config=config) as comm:
        times = time_operations(
            comm,
            [OperationCase(**case) for case in cases],
            dtype=getattr(torch, machine["dtype"]),
            num_rounds=num_rounds,
            progress=dist.get_rank() == 0,
        )
    return [dataclasses.asdict(entry) for entry in times]


def run_machine(machine: Machine, *, num_rounds: int, options: RunOptions) -> list[Record]:
    """Measure, fit, predict; one line per operation that was predicted, appended to ``options.out``."""
    if options.wait_quiet_s:
        wait_until_quiet(options.wait_quiet_s)
    facts, others = run_facts() | {"benchmark": NAME}, OthersWatch()
    fitted = fitting_cases(
        transport=machine.transport,
        num_ranks=machine.num_ranks,
        hidden=machine.hidden,
        num_tokens=machine.num_tokens,
    )
    asked = [dataclasses.asdict(case) for case in (*fitted, *checked_cases(machine))]
    times = run_ranks(measure, machine.num_ranks, dataclasses.asdict(machine), asked, num_rounds)
    facts |= {"others_cpu": round(others.share(), 3), "num_rounds": num_rounds}
    # In the order of fitting_cases: what another model would have to start from.
    facts["fitted_us"] = [[round(entry[f"{side}_us"], 1) for side in SIDES] for entry in times[: len(fitted)]]
    element_size = getattr(torch, machine.dtype).itemsize
    report = {
        "transport": machine.transport,
        "num_ranks": machine.num_ranks,
        "num_cores": facts["cores"],
        "row_bytes": machine.hidden * element_size,
        "pairs": [],
        "operations": times[: len(fitted)],
    }
    costs = fit_costs(report, source="this run")
    records: list[Record] = []
    for entry in map(OperationTime.from_json, times[len(fitted) :]):
        workload = workload_of(entry.case, machine.num_ranks, machine.transport, element_size)
        planned = {plan.operation: plan.us for plan in predict(workload, costs).operations}
        for side in SIDES:
            name = f"low_latency_{side}" if entry.case.low_latency else side
            records.append(
                facts
                | {
                    "config": dataclasses.asdict(machine) | dataclasses.asdict(entry.case) | {"operation": name},
                    "predicted_us": round(planned[name], 1),
                    "measured_us": round(getattr(entry, f"{side}_us"), 1),
                }
            )
    append(options.out, records)
    return records


def table(records: list[Record]) -> str:
    """Predicted beside measured, one line per operation."""
    rows = []
    for record in records:
        case = record["config"]
        sizes = f"{case['num_tokens']} × {case['hidden']}, top-{case['num_topk']} of {case['num_experts']}"
        rows.append(
            [
                f"{case['operation']}, {case['layout'].replace('_', '-')}",
                str(case["num_ranks"]),
                sizes,
                "heap" if case["rows_in_heap"] else "plain",
                "new" if case["new_routing"] else "cached",
                f"{record['measured_us']:,.0f}",
                f"{record['predicted_us']:,.0f}",
                f"{record['predicted_us'] / record['measured_us']:.2f}",
            ]
        )
    header = ["operation", "ranks", "sizes", "rows", "plan", "measured us", "predicted us", "predicted / measured"]
    return markdown_table(header, rows)


def summary(records: list[Record]) -> str:
    """How many predictions are close, and how far off the median is."""
    ratios = [record["predicted_us"] / record["measured_us"] for record in records]
    close = sum(abs(ratio - 1) <= WITHIN for ratio in ratios)
    off = statistics.median(abs(ratio - 1) for ratio in ratios)
    busy = max(record["others_cpu"] for record in records)
    return (
        f"{close} of {len(ratios)} within {WITHIN:.0%}, median error {off:.0%}, ratios {min(ratios):.2f} to "
        f"{max(ratios):.2f}; {busy:.0%} of the machine's time went to other programs"
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--transport", choices=("shm", "cuda"), default="shm")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="rank counts (default 2 4)")
    parser.add_argument("--rounds", type=int, default=60, help="times each case is measured (default 60)")
    add_options(parser, RESULTS_PATH)
    args = parser.parse_args(argv)
    for num_ranks in args.ranks:
        machine = Machine.of(args.transport, num_ranks)
        records = run_machine(machine, num_rounds=args.rounds, options=RunOptions.of(args))
        print(f"\n{args.transport}, {num_ranks} ranks\n\n{table(records)}\n\n{summary(records)}\n", flush=True)


if __name__ == "__main__":
    main()
