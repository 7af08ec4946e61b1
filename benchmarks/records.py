"""Results as JSON lines: one line per variant, with all that is needed to judge it later."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
from pathlib import Path
from typing import Any

import torch

from .timing import Timing

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# What a figure depends on; results and texts made from them may differ from the commit.
_MEASURED = ("ray_deepep", "csrc", "train", "setup.py", "pyproject.toml", "benchmarks/*.py")

Record = dict[str, Any]


def run_facts() -> Record:
    """What all lines of one run share: date, commit, machine."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {
        "run": now,
        "git_sha": _git("rev-parse", "--short=12", "HEAD"),
        "git_dirty": bool(_git("status", "--porcelain", "--", *_MEASURED)),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "load_1m": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def gpu_facts() -> Record:
    """What lines of runs on this machine's GPUs say of them."""
    return {"gpu": torch.cuda.get_device_name(), "gpus": torch.cuda.device_count()}


def summarise(timing: Timing) -> Record:
    """Median, least, 10th and 90th percentile of a variant, and the medians of its parts, ms."""
    deciles = _deciles(timing.span_ms)
    record = {
        "variant": timing.name,
        "num_rounds": len(timing.span_ms),
        "median_ms": _round(statistics.median(timing.span_ms)),
        "min_ms": _round(min(timing.span_ms)),
        "p10_ms": _round(deciles[0]),
        "p90_ms": _round(deciles[-1]),
        "rank_median_ms": _round(statistics.median(timing.rank_ms)),
        "cpu_median_ms": _round(statistics.median(timing.cpu_ms)),
        "page_faults": _round(statistics.mean(timing.page_faults)),
    }
    if timing.parts:
        record["parts"] = {name: _round(statistics.median(values)) for name, values in timing.parts.items()}
    return record


def append(path: Path, records: list[Record]) -> None:
    """Add lines to a results file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def latest(path: Path) -> list[Record]:
    """The newest lines of each case and number of SMs in a results file, in the order in which these first appear."""
    if not path.is_file():
        return []
    cases: dict[tuple[str, int | None], list[Record]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        lines = cases.setdefault((_case_key(record), record.get("num_sms")), [])
        if lines and lines[0]["run"] != record["run"]:
            lines.clear()
        lines.append(record)
    return [record for lines in cases.values() for record in lines]


def workers_text(num_workers: int, gpus_per_worker: float) -> str:
    """Workers of a run in a table, such as `2 × 0.5 GPU`; gpus_per_worker: 0 for a run on CPUs."""
    device = "GPU" if gpus_per_worker == 1 else f"{gpus_per_worker:g} GPU"
    return f"{num_workers} × {device if gpus_per_worker else 'CPU'}"


def by_case(records: list[Record]) -> list[list[Record]]:
    """Lines apart by case."""
    cases: dict[str, list[Record]] = {}
    for record in records:
        cases.setdefault(_case_key(record), []).append(record)
    return list(cases.values())


def by_sms(records: list[Record]) -> dict[str, dict[int, Record]]:
    """Lines of one case by variant and number of SMs, without those that have no such number."""
    found: dict[str, dict[int, Record]] = {}
    for record in records:
        if record["num_sms"] is not None:
            found.setdefault(record["variant"], {})[record["num_sms"]] = record
    return found


def has_own_gpus(record: Record) -> bool:
    """Whether there were several ranks, and a GPU for each."""
    return 1 < record["config"]["num_ranks"] <= record["gpus"]


def machine(record: Record) -> str:
    """What the figures depend on most."""
    return f"{record['gpus']} × {record['gpu']}" if "gpu" in record else f"{record['cores']} cores of {record['cpu']}"


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A table that reads well as text too: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: list[str]) -> str:
        padded = [cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths))]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join([line(header), line(rule), *map(line, rows)])


def origin(records: list[Record], path: Path) -> str:
    """One sentence on where a table comes from."""
    commits = dict.fromkeys(f"`{r['git_sha']}`{' with local changes' if r['git_dirty'] else ''}" for r in records)
    days = sorted({r["run"][:10] for r in records})
    machines = dict.fromkeys(map(machine, records))
    where = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    parts = [f"From `{where}`", f"commit {', '.join(commits)}", " to ".join(dict.fromkeys([days[0], days[-1]]))]
    # Runs on GPUs do not watch it, and jobs of Ray are not this process's children.
    others = [r["others_cpu"] for r in records if "others_cpu" in r]
    busy = f"; at most {max(others):.0%} of its time went to other programs" if others else ""
    return f"{', '.join([*parts, *machines])}{busy}."


def _case_key(record: Record) -> str:
    """Figures of other GPUs, or of more of them, do not take the place of these."""
    return json.dumps([record["config"], record.get("gpu"), record.get("gpus")], sort_keys=True)


def _deciles(values: list[float]) -> list[float]:
    return statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else [values[0]]


def _round(value: float) -> float:
    return round(value, 4)


def _git(*args: str) -> str:
    try:
        done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
