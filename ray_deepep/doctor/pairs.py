"""Speeds between pairs of ranks, and what to think of them. Pure."""

from __future__ import annotations

import dataclasses
import statistics

from .findings import Finding, not_applicable, ok, problem, warning
from .operations import OperationTime

SLOW_PAIR = 0.6
"""Of the median: a pair of GPUs below it is named."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairSpeed:
    """One direction between two ranks."""

    source: int
    target: int
    dispatch_gb_per_s: float
    """Rows from source to target; bytes of rows over the time of a call, median."""
    combine_gb_per_s: float
    """The same rows from target back to source."""
    dispatch_us: float
    """Dispatch of one row, median of the slower of the two ranks."""
    combine_us: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairOutcome:
    """What came of the test."""

    transport: str
    num_ranks: int
    row_bytes: int
    num_rows: int
    num_cores: int = 1
    """Of the machine, for the ranks together."""
    pairs: tuple[PairSpeed, ...] = ()
    operations: tuple[OperationTime, ...] = ()
    """Of all ranks at once; empty on transport reference."""
    problem: str = ""
    """Why there are no pairs."""


def judge_pairs(outcome: PairOutcome) -> Finding:
    """One finding about all pairs: the range of their speeds, and the pairs that fall behind."""
    name = f"pairs ({outcome.transport})"
    if outcome.problem:
        return problem(name, outcome.problem, "the findings above may say why; --deadline gives it more time")
    if not outcome.pairs:
        return not_applicable(name, "no pairs")
    speeds = [min(pair.dispatch_gb_per_s, pair.combine_gb_per_s) for pair in outcome.pairs]
    median = statistics.median(speeds)
    latency = statistics.median(pair.dispatch_us for pair in outcome.pairs)
    value = f"{len(outcome.pairs)} directions, {min(speeds):.1f} to {max(speeds):.1f} GB/s"
    value += f" ({outcome.num_rows} rows of {outcome.row_bytes} bytes), one row {latency:.0f} us"
    # Between processes all pairs go through the same memory, and differ only by what else runs on their cores.
    compared = zip(outcome.pairs, speeds) if outcome.transport == "cuda" else ()
    slow = [pair for pair, speed in compared if speed < SLOW_PAIR * median]
    if slow:
        names = ", ".join(f"{pair.source}->{pair.target}" for pair in slow)
        advice = (
            "look at links, slots and clocks of the ranks that these have in common; run it again on a quiet machine"
        )
        return warning(name, f"{value}; below {SLOW_PAIR:.0%} of the median: {names}", advice)
    return ok(name, value)


def pair_lines(pairs: tuple[PairSpeed, ...]) -> list[str]:
    """A table of the pairs; empty without pairs."""
    if not pairs:
        return []
    lines = ["", "source -> target   dispatch GB/s   combine GB/s   one row: dispatch us   combine us"]
    for pair in pairs:
        speeds = f"{pair.dispatch_gb_per_s:13.2f}   {pair.combine_gb_per_s:12.2f}"
        lines.append(
            f"{pair.source:6} -> {pair.target:<6}   {speeds}   {pair.dispatch_us:20.1f}   {pair.combine_us:10.1f}"
        )
    return lines
