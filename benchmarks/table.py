"""Writes the newest results into README.md, all of them into benchmarks/results/README.md, and the plots.

    python -m benchmarks.table            # after a benchmark
    python -m benchmarks.table --check    # exit status 1 if a text would change

README.md has the place marked: what stands between ``<!-- results:begin -->`` and ``<!-- results:end -->`` is replaced.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

from . import (
    cuda_dispatch_combine,
    cuda_layer,
    cuda_low_latency,
    cuda_summary,
    deepspeed_layer,
    dispatch_combine,
    recovery,
    start,
)
from .plots import plot_cuda_dispatch_combine, plot_deepspeed_layer, plot_dispatch_combine
from .records import RESULTS, ROOT, Record, by_case, latest, origin

Table = Callable[[list[Record]], str]

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
IMAGES = "docs/images"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """How one benchmark is shown."""

    name: str
    title: str
    explanation: str
    full_explanation: str = ""
    """Of the full table, where that has other columns."""
    table: Table
    """For README.md, and for all cases where there is no other."""
    full_table: Table | None = None
    is_headline: Callable[[Record], bool] = lambda record: True
    """Whether a line belongs into README.md too; these are plotted."""
    plot: Callable[[list[Record], Path], None] | None = None


def case_by_case(title: Table, table: Table) -> Table:
    """A titled table for each case."""
    return lambda records: "\n\n".join(f"{title(found)}:\n\n{table(found)}" for found in by_case(records))


REPORTS = (
    Report(
        name=cuda_dispatch_combine.NAME,
        title="On GPUs: dispatch and combine",
        explanation=cuda_summary.EXPLANATION,
        full_explanation=cuda_summary.FULL_EXPLANATION,
        table=cuda_summary.summary_table,
        full_table=case_by_case(cuda_dispatch_combine.title, cuda_dispatch_combine.table),
        is_headline=cuda_summary.is_headline,
        plot=plot_cuda_dispatch_combine,
    ),
    Report(
        name=cuda_low_latency.NAME,
        title="On GPUs: low-latency calls",
        explanation=cuda_low_latency.EXPLANATION,
        full_explanation=cuda_low_latency.FULL_EXPLANATION,
        table=cuda_low_latency.summary_table,
        full_table=case_by_case(cuda_low_latency.title, cuda_low_latency.table),
        is_headline=cuda_low_latency.is_headline,
    ),
    Report(
        name=cuda_layer.NAME,
        title="On GPUs: a DeepSpeed MoE layer",
        explanation=cuda_layer.EXPLANATION,
        table=case_by_case(cuda_layer.title, cuda_layer.table),
        is_headline=cuda_layer.is_headline,
    ),
    Report(
        name=dispatch_combine.NAME,
        title="On CPUs: rows to their experts and back",
        explanation=dispatch_combine.EXPLANATION,
        table=dispatch_combine.summary_table,
        is_headline=dispatch_combine.is_headline,
        plot=plot_dispatch_combine,
    ),
    Report(
        name=deepspeed_layer.NAME,
        title="On CPUs: a DeepSpeed MoE layer, forward and backward",
        explanation=deepspeed_layer.EXPLANATION,
        table=deepspeed_layer.summary_table,
        is_headline=deepspeed_layer.is_headline,
        plot=plot_deepspeed_layer,
    ),
    Report(
        name=start.NAME,
        title="Submitting a Ray job to its first training step",
        explanation=start.EXPLANATION,
        table=start.table,
    ),
    Report(
        name=recovery.NAME,
        title="From a fault to training again",
        explanation=recovery.EXPLANATION,
        table=recovery.table,
    ),
)


def headline(report: Report, records: list[Record], path: Path) -> str:
    """One benchmark in README.md."""
    parts = [f"**{report.title}.** {report.explanation}", report.table(records)]
    if report.plot is not None:
        parts.append(f"![{report.title}]({IMAGES}/{report.name}.png)")
    return "\n\n".join([*parts, origin(records, path)])


def full(report: Report, records: list[Record], path: Path) -> str:
    """One benchmark with all its cases."""
    introduction = f"**{report.title}.** {report.full_explanation or report.explanation}"
    table = report.full_table or report.table
    return "\n\n".join([introduction, table(records), origin(records, path)])


def between_markers(text: str, content: str) -> str:
    """``text`` with what stands between the markers replaced.

    Raises:
        ValueError: a marker is missing, or they are in the wrong order.
    """
    begin, end = text.find(BEGIN), text.find(END)
    if begin < 0 or end < begin:
        raise ValueError(f"put {BEGIN} and {END}, each on a line of its own, where the results belong")
    return f"{text[: begin + len(BEGIN)]}\n{content}\n{text[end:]}"


def texts(results: Path, readme: Path) -> dict[Path, str]:
    """What the files should hold."""
    headlines, all_cases = [], ["# Results\n\nWritten by `python -m benchmarks.table`; the newest run of each case."]
    for report in REPORTS:
        path = results / f"{report.name}.jsonl"
        records = latest(path)
        if not records:
            continue
        chosen = [record for record in records if report.is_headline(record)]
        if chosen:
            headlines.append(headline(report, chosen, path))
        all_cases.append(full(report, records, path))
    return {
        readme: between_markers(readme.read_text(encoding="utf-8"), "\n\n".join(headlines)),
        results / "README.md": "\n\n".join(all_cases) + "\n",
    }


def draw(results: Path, images: Path) -> None:
    """Draw the headline cases of each benchmark."""
    for report in REPORTS:
        chosen = [r for r in latest(results / f"{report.name}.jsonl") if report.is_headline(r)]
        if chosen and report.plot is not None:
            report.plot(chosen, images / f"{report.name}.png")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if a text would change")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="file with the markers")
    args = parser.parse_args(argv)
    try:
        wanted = texts(args.results, args.readme)
    except ValueError as error:
        print(f"{args.readme}: {error}", file=sys.stderr)
        return 2
    stale = [p for p, text in wanted.items() if not p.is_file() or p.read_text(encoding="utf-8") != text]
    for path in stale:
        print(f"{'stale' if args.check else 'written'}: {path}")
        if not args.check:
            path.write_text(wanted[path], encoding="utf-8")
    if args.check:
        return 1 if stale else 0
    draw(args.results, args.readme.parent / IMAGES)
    return 0


if __name__ == "__main__":
    sys.exit(main())
