"""Reads the folder of a run. Nothing in it is trusted to be there, whole, or of the right type."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import run_files
from ..errors import InvalidArgumentError

_RULE = f"must be the folder of a run (with {run_files.CONFIG} or {run_files.METRICS} in it), or hold such folders"

_HUGE = 1e15


@dataclass(frozen=True, kw_only=True)
class Start:
    """The program began, or resumed."""

    time_s: float
    """Seconds since the epoch."""
    step: int
    """Optimizer steps done before."""
    environment: Mapping[str, Any]
    """Flat."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A fault that was found."""

    time_s: float
    """Seconds since the epoch."""
    fields: Mapping[str, Any]
    """As in the job log: ``cause``, ``rank``, ``host``, ``gpu``, ``text`` and more."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The newest complete one."""

    step: int
    num_bytes: int
    """Of its files, as its seal says."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is in the folder of a run."""

    label: str
    path: Path
    steps: tuple[Mapping[str, Any], ...]
    """Records of the metrics file by ``step``, ascending, none twice."""
    columns: Mapping[str, Sequence[tuple[int, float]]]
    """By name of a metric, (step, value) where it is a finite number."""
    last_written_s: float | None
    """When the metrics file changed last, in seconds since the epoch; None without one."""
    config: Mapping[str, Any]
    """Flat: ``{"model.hidden": 128, ...}``."""
    starts: tuple[Start, ...]
    """By time."""
    faults: tuple[Fault, ...]
    """By time."""
    checkpoint: Checkpoint | None
    sample: str
    notes: tuple[str, ...]
    """What could not be read, and where."""

    def series(self, name: str) -> Sequence[tuple[int, float]]:
        """A column; empty if no record has it."""
        return self.columns.get(name, ())

    @property
    def num_steps(self) -> int | None:
        """Steps that the run is to do; None where its configuration does not say."""
        wanted = self.config.get("run.steps")
        return int(wanted) if is_number(wanted) else None

    @property
    def last_step(self) -> int:
        """0 before the first."""
        return self.steps[-1]["step"] if self.steps else 0


def is_number(value: object) -> bool:
    """Whether ``value`` is a finite int or float that can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _HUGE


def find_runs(paths: Sequence[str | Path]) -> list[Run]:
    """The runs in ``paths``, each once, with labels that tell them apart.

    Raises:
        InvalidArgumentError: no path is given, or one is no run and holds none.
    """
    folders: dict[Path, Path] = {}
    for path in paths:
        for folder in _folders(Path(path)):
            folders.setdefault(folder.resolve(), folder)
    if not folders:
        raise InvalidArgumentError("run", list(paths), "must name at least one run")
    return [read_run(path, label=label) for path, label in zip(folders.values(), _labels(list(folders)))]


def _folders(path: Path) -> list[Path]:
    try:
        if _is_run(path):
            return [path]
        found = sorted(child for child in path.iterdir() if child.is_dir() and _is_run(child))
    except OSError as error:
        raise InvalidArgumentError("run", str(path), f"{_RULE} ({error.strerror})") from error
    if not found:
        raise InvalidArgumentError("run", str(path), _RULE)
    return found


def _is_run(path: Path) -> bool:
    return any((path / name).is_file() for name in (run_files.CONFIG, run_files.METRICS))


def _labels(folders: Sequence[Path]) -> list[str]:
    """Names of the folders, with as many parents as it takes to tell them apart."""
    for depth in range(1, max(len(folder.parts) for folder in folders) + 1):
        labels = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(labels)) == len(labels):
            return labels
    return [str(folder) for folder in folders]


def read_run(path: Path, *, label: str) -> Run:
    """Read one folder.

    Raises:
        InvalidArgumentError: it is no run, or a file in it may not be read.
    """
    if not _is_run(path):
        raise InvalidArgumentError("run", str(path), _RULE)
    notes: list[str] = []
    metrics = path / run_files.METRICS
    try:
        by_step = {r["step"]: r for r in _records(metrics, notes) if _is_count(r.get("step"))}
        steps = tuple(by_step[step] for step in sorted(by_step))
        return Run(
            label=label,
            path=path,
            steps=steps,
            columns=_columns(steps),
            last_written_s=metrics.stat().st_mtime if metrics.is_file() else None,
            config=_read_config(path / run_files.CONFIG, notes),
            starts=_read_starts(path / run_files.STARTS, notes),
            faults=_read_faults(path / run_files.FAULTS, notes),
            checkpoint=_newest_checkpoint(path / run_files.CHECKPOINTS),
            sample=_read(path / run_files.SAMPLE),
            notes=tuple(notes),
        )
    except OSError as error:
        raise InvalidArgumentError("run", str(path), f"its files must be readable ({error})") from error


def _columns(steps: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    columns: dict[str, list[tuple[int, float]]] = {}
    for record in steps:
        for name, value in record.items():
            if is_number(value):
                columns.setdefault(name, []).append((record["step"], float(value)))
    return columns


def _is_count(value: object) -> bool:
    return isinstance(value, int) and is_number(value) and value >= 0


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _records(path: Path, notes: list[str]) -> Iterator[Mapping[str, Any]]:
    """Objects of a JSON-lines file. A last line without an end is being written, or was cut by a crash; another that
    is no object is noted."""
    *lines, rest = _read(path).split("\n")
    for number, line in enumerate([*lines, rest], start=1):
        record = _parse(line)
        if isinstance(record, dict):
            yield record
        elif line.strip():
            cut = number > len(lines)
            why = "is cut (the run stopped while it wrote it, or writes it now)" if cut else "is no JSON object"
            notes.append(f"{path.name}: line {number} {why} and is left out")


def _parse(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _read_config(path: Path, notes: list[str]) -> dict[str, Any]:
    content = _read(path)
    config = _parse(content)
    if not isinstance(config, dict):
        notes.append(f"{path.name} {'is no JSON object' if content else 'is missing or empty'}")
        return {}
    return flatten(config)


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` as ``{"a.b": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


def _read_starts(path: Path, notes: list[str]) -> tuple[Start, ...]:
    starts = []
    for record in _records(path, notes):
        if is_number(record.get("time_s")):
            step, environment = record.get("step"), record.get("environment")
            starts.append(
                Start(
                    time_s=float(record["time_s"]),
                    step=step if _is_count(step) else 0,
                    environment=flatten(environment) if isinstance(environment, dict) else {},
                )
            )
    return tuple(sorted(starts, key=lambda start: start.time_s))


def _read_faults(path: Path, notes: list[str]) -> tuple[Fault, ...]:
    faults = [
        Fault(time_s=float(record["time_s"]), fields=record)
        for record in _records(path, notes)
        if is_number(record.get("time_s"))
    ]
    return tuple(sorted(faults, key=lambda fault: fault.time_s))


def _newest_checkpoint(root: Path) -> Checkpoint | None:
    best: Checkpoint | None = None
    for seal_path in root.glob(f"*/{run_files.CHECKPOINT_SEAL}"):
        seal = _parse(_read(seal_path))
        if not isinstance(seal, dict) or not _is_count(seal.get("step")):
            continue
        files = seal.get("files")
        sizes = [stamp[0] for stamp in files.values()] if isinstance(files, dict) else []
        if best is None or seal["step"] > best.step:
            best = Checkpoint(step=seal["step"], num_bytes=sum(size for size in sizes if _is_count(size)))
    return best
