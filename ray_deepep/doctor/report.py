"""Prints findings: coloured in a terminal, plain elsewhere, or as JSON."""

from __future__ import annotations

import collections
import dataclasses
import json
import shutil
import sys
import textwrap
from collections.abc import Iterable
from typing import TextIO

from .bandwidth import PairTest, measure_pairs
from .diagnosis import diagnose, num_usable_gpus
from .findings import Finding, Status, worst
from .operations import OperationTime
from .pairs import PairSpeed, judge_pairs, pair_lines
from .probes import read_machine

_COLOURS = {Status.OK: "32", Status.WARNING: "33", Status.PROBLEM: "31", Status.NOT_APPLICABLE: "2"}
_WORDS = {Status.NOT_APPLICABLE: "-"}
_MIN_COLUMNS = 80
_MEASURED = ("pairs", "operations", "transport", "num_ranks", "num_cores", "row_bytes")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What the doctor found on one machine."""

    host: str
    findings: tuple[Finding, ...]
    pairs: tuple[PairSpeed, ...] = ()
    operations: tuple[OperationTime, ...] = ()
    """Of all ranks at once: what ``ray-deepep plan --constants`` reads, with the four below."""
    transport: str = ""
    num_ranks: int = 0
    num_cores: int = 0
    row_bytes: int = 0


def run(*, as_json: bool = False, bandwidth: PairTest | None = None) -> int:
    """Examine this machine, with the test between pairs if asked for, and print.

    Returns:
        The exit code: 1 if there is a problem.
    """
    readings = read_machine()
    report = Report(host=readings.host, findings=tuple(diagnose(readings)))
    if bandwidth is not None:
        outcome = measure_pairs(bandwidth, num_gpus=num_usable_gpus(readings))
        report = dataclasses.replace(
            report,
            findings=(*report.findings, judge_pairs(outcome)),
            **{name: getattr(outcome, name) for name in _MEASURED},
        )
    if as_json:
        print(json.dumps(dataclasses.asdict(report), indent=1))
    else:
        lines = finding_lines(report.findings, **terminal(sys.stdout))
        write([*lines, *pair_lines(report.pairs), "", summary(report.findings)])
    return exit_code(report.findings)


def exit_code(findings: Iterable[Finding]) -> int:
    """1 if there is a problem."""
    return 1 if worst(findings) is Status.PROBLEM else 0


def summary(findings: Iterable[Finding]) -> str:
    """Such as ``1 problem, 2 warnings``."""
    counts = collections.Counter(finding.status for finding in findings)
    parts = ((counts[status], status) for status in (Status.PROBLEM, Status.WARNING))
    return ", ".join(f"{count} {status}{'' if count == 1 else 's'}" for count, status in parts)


def write(lines: Iterable[str]) -> None:
    """Print lines."""
    for line in lines:
        print(line)


def terminal(stream: TextIO) -> dict[str, object]:
    """``coloured`` and ``columns`` for :func:`finding_lines`: both only where a person looks."""
    if not stream.isatty():
        return {"coloured": False, "columns": None}
    return {"coloured": True, "columns": max(shutil.get_terminal_size().columns, _MIN_COLUMNS)}


def paint(text: str, status: Status, *, coloured: bool) -> str:
    """``text`` in the colour of ``status``."""
    return f"\033[{_COLOURS[status]}m{text}\033[0m" if coloured else text


def finding_lines(findings: Iterable[Finding], *, coloured: bool = False, columns: int | None = None) -> list[str]:
    """One line per finding and one more for its advice; wrapped at ``columns`` if given."""
    findings = list(findings)
    width = max((len(finding.name) for finding in findings), default=0)
    lines = []
    for finding in findings:
        word = f"{_WORDS.get(finding.status, finding.status):7}"
        head = f"{paint(word, finding.status, coloured=coloured)}  {finding.name:{width}}  "
        indent = " " * (len(word) + width + 4)
        lines += _wrapped(head, finding.value, indent, columns)
        if finding.advice:
            lines += _wrapped(f"{indent}-> ", finding.advice, f"{indent}   ", columns)
    return lines


def _wrapped(head: str, text: str, indent: str, columns: int | None) -> list[str]:
    if columns is None:
        return [head + text]
    # Wrapped without the head, whose colours have no width.
    first, *rest = textwrap.wrap(text, columns - len(indent), break_long_words=False) or [""]
    return [head + first, *(indent + line for line in rest)]
