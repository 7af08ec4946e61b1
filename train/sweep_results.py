"""Rows of a sweep: what came of each trial, as a table and as CSV; and the efficiency of a scaling study. Pure."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.files import write_text_atomic
from train.sweep_space import METRICS, Trial

RESULT_FILE = "trial.json"
DONE, FAILED, UNFINISHED = "done", "failed", "unfinished"
_LONGEST_ERROR = 300


@dataclass(frozen=True, kw_only=True)
class Row:
    """One trial and what came of it."""

    trial: Trial
    status: str
    """`done`, `failed`, or `unfinished`: it never came to an end."""
    error: str = ""
    """Why it failed, in one line."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Numbers of `RunStats`, and `seconds`, the time of the whole run."""
    folder: str = ""
    """Its run folder: metrics, plots, checkpoints, for `ray-deepep report`."""


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """One number of workers in a scaling study, against the fewest."""

    mode: str
    num_workers: int
    tokens_per_s: float
    speedup: float
    """Tokens per second over those of the fewest workers."""
    efficiency: float
    """Speed-up over the growth of workers: 1 is ideal, for weak and for strong scaling."""


def trial_folder(out_dir: Path, trial: Trial) -> Path:
    """The run folder of a trial."""
    return out_dir / "trials" / trial.name


def write_result(folder: Path, *, status: str, error: str = "", metrics: dict[str, float] | None = None) -> None:
    """Leave a trial's end in its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {"status": status, "error": error, "metrics": metrics or {}}
    write_text_atomic(folder / RESULT_FILE, json.dumps(record, indent=1))


def read_row(trial: Trial, folder: Path) -> Row:
    """The row of a trial, from its folder."""
    path = folder / RESULT_FILE
    if not path.is_file():
        return Row(trial=trial, status=UNFINISHED, folder=str(folder))
    return Row(trial=trial, folder=str(folder), **json.loads(path.read_text(encoding="utf-8")))


def one_line(error: BaseException) -> str:
    """An exception's type and message in one line, cut where it is long."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= _LONGEST_ERROR else text[: _LONGEST_ERROR - 3] + "..."


def ranked(rows: list[Row], metric: str) -> list[Row]:
    """Done trials from best to worst by `metric`, then the others in order. A value that is not a number comes last."""
    sign = 1 if METRICS[metric] == "min" else -1

    def key(row: Row) -> tuple[bool, float, int]:
        value = row.metrics.get(metric, math.nan) if row.status == DONE else math.nan
        return math.isnan(value), 0.0 if math.isnan(value) else sign * value, row.trial.index

    return sorted(rows, key=key)


def columns(rows: list[Row]) -> list[str]:
    """Parameters that the trials set, in the order in which they come."""
    return list(dict.fromkeys(name for row in rows for name in row.trial.values))


def csv_text(rows: list[Row]) -> str:
    """One line per trial, all metrics; fields that a trial has not are empty."""
    names = columns(rows)
    measured = list(dict.fromkeys(name for row in rows for name in row.metrics))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["trial", *names, "status", *measured, "error", "folder"])
    for row in rows:
        values = [row.trial.values.get(name, "") for name in names]
        numbers = [row.metrics.get(name, "") for name in measured]
        writer.writerow([row.trial.name, *values, row.status, *numbers, row.error, row.folder])
    return out.getvalue()


def table_lines(rows: list[Row], metric: str) -> list[str]:
    """The trials from best to worst; a failed one's last column says why."""
    names = columns(rows)
    shown = list(dict.fromkeys([metric, "val_loss", "tokens_per_s", "step_ms", "comm_share"]))
    header = ["trial", *names, *shown, "status"]
    cells = [header]
    for row in ranked(rows, metric):
        numbers = [_number(row.metrics.get(name)) for name in shown]
        status = f"{row.status}: {row.error}" if row.error else row.status
        cells.append([row.trial.name, *(_number(row.trial.values.get(name)) for name in names), *numbers, status])
    widths = [max(len(line[i]) for line in cells) for i in range(len(header) - 1)]
    return ["  ".join([*(cell.rjust(width) for cell, width in zip(line, widths)), line[-1]]) for line in cells]


def efficiencies(rows: list[Row]) -> list[Efficiency]:
    """Of the done trials of a scaling study, each mode against its fewest workers."""
    found: list[Efficiency] = []
    for mode in dict.fromkeys(row.trial.values.get("mode") for row in rows):
        runs = [row for row in rows if row.trial.values.get("mode") == mode and row.status == DONE]
        if mode is None or not runs:
            continue
        first = min(runs, key=lambda row: row.trial.num_workers)
        for row in sorted(runs, key=lambda row: row.trial.num_workers):
            speedup = row.metrics["tokens_per_s"] / first.metrics["tokens_per_s"]
            found.append(
                Efficiency(
                    mode=mode,
                    num_workers=row.trial.num_workers,
                    tokens_per_s=row.metrics["tokens_per_s"],
                    speedup=speedup,
                    efficiency=speedup * first.trial.num_workers / row.trial.num_workers,
                )
            )
    return found


def efficiency_lines(found: list[Efficiency]) -> list[str]:
    """A table; empty without a study."""
    if not found:
        return []
    lines = [f"{'mode':>8} {'workers':>8} {'tokens/s':>10} {'speed-up':>9} {'efficiency':>10}"]
    for entry in found:
        lines.append(
            f"{entry.mode:>8} {entry.num_workers:8} {entry.tokens_per_s:10,.0f} {entry.speedup:9.2f}"
            f" {entry.efficiency:10.0%}"
        )
    return lines


def _number(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
