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

from . import deepspeed_layer, dispatch_combine
from .plots import plot_deepspeed_layer, plot_dispatch_combine
from .records import RESULTS, ROOT, Record, latest, origin

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
IMAGES = "docs/images"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """How one benchmark is shown."""

    name: str
    title: str
    explanation: str
    table: Callable[[list[Record]], str]
    is_headline: Callable[[Record], bool]
    """Whether a line belongs into README.md too; these are plotted."""
    plot: Callable[[list[Record], Path], None]


REPORTS = (
    Report(
        name=dispatch_combine.NAME,
        title="Rows to their experts and back",
        explanation=dispatch_combine.EXPLANATION,
        table=dispatch_combine.summary_table,
        is_headline=dispatch_combine.is_headline,
        plot=plot_dispatch_combine,
    ),
    Report(
        name=deepspeed_layer.NAME,
        title="A DeepSpeed MoE layer, forward and backward",
        explanation=deepspeed_layer.EXPLANATION,
        table=deepspeed_layer.summary_table,
        is_headline=deepspeed_layer.is_headline,
        plot=plot_deepspeed_layer,
    ),
)


def section(report: Report, records: list[Record], path: Path, *, image: str) -> str:
    """One benchmark in Markdown."""
    parts = [f"**{report.title}.** {report.explanation}", report.table(records)]
    if image:
        parts.append(f"![{report.title}]({image})")
    parts.append(origin(records, path))
    return "\n\n".join(parts)


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
    headlines, full = [], ["# Results\n\nWritten by `python -m benchmarks.table`; the newest run of each case."]
    for report in REPORTS:
        path = results / f"{report.name}.jsonl"
        records = latest(path)
        if not records:
            continue
        chosen = [record for record in records if report.is_headline(record)]
        if chosen:
            headlines.append(section(report, chosen, path, image=f"{IMAGES}/{report.name}.png"))
        full.append(section(report, records, path, image=""))
    return {
        readme: between_markers(readme.read_text(encoding="utf-8"), "\n\n".join(headlines)),
        results / "README.md": "\n\n".join(full) + "\n",
    }


def draw(results: Path, images: Path) -> None:
    """Draw the headline cases of each benchmark."""
    for report in REPORTS:
        chosen = [r for r in latest(results / f"{report.name}.jsonl") if report.is_headline(r)]
        if chosen:
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
