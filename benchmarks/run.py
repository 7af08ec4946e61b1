"""What the benchmarks share on the command line, and one case of any of them from start to recorded lines."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path

from .machine import OthersWatch, wait_until_quiet
from .ranks import run_ranks
from .records import Record, append, run_facts


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How cases are run and where their lines go."""

    out: Path
    """Results file to append to."""
    nice: int = 0
    """Nice value of the ranks while the clock runs; see ``timing.measure``."""
    wait_quiet_s: float = 0.0
    """Longest wait for a quiet machine before each case."""

    @classmethod
    def of(cls, args: argparse.Namespace) -> RunOptions:
        """From the options of :func:`add_options`."""
        return cls(out=args.out, nice=args.nice, wait_quiet_s=args.wait_quiet)


def add_options(parser: argparse.ArgumentParser, results: Path) -> None:
    """Add the options that all benchmarks have."""
    parser.add_argument("--out", type=Path, default=results, help="results file to append to")
    parser.add_argument("--nice", type=int, default=0, help="nice value while the clock runs, such as -20 (as root)")
    parser.add_argument(
        "--wait-quiet", type=float, default=0.0, metavar="S", help="wait up to S seconds for a quiet machine, each case"
    )


def run_on_ranks(
    name: str,
    run_case: Callable[[Record, int, int], list[Record]],
    case: Record,
    *,
    num_rounds: int,
    options: RunOptions,
) -> list[Record]:
    """Run one case on ``case["num_ranks"]`` ranks, append its lines to ``options.out`` and return them."""
    if options.wait_quiet_s:
        wait_until_quiet(options.wait_quiet_s)
    facts = run_facts() | {"benchmark": name, "nice": options.nice}
    others = OthersWatch()
    found = run_ranks(run_case, case["num_ranks"], case, num_rounds, options.nice)
    facts["others_cpu"] = round(others.share(), 3)
    records = [facts | record for record in found]
    append(options.out, records)
    return records
