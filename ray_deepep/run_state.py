"""How a training run is doing, in one small record: from the log of its job, or from the files in its folder."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from .job_log import LogState
from .report.reader import Run
from .report.summary import summarize

_ENDED = ("succeeded", "failed", "stopped")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunState:
    """None and empty texts stand for what the run has not said."""

    name: str
    """Of the job, or the folder."""
    phase: str
    """``pending``, ``starting``, ``training``, ``restarting``, ``stopping``, ``succeeded``, ``failed`` or ``stopped``.
    From a folder ``training``, ``succeeded`` or ``ended``: files do not tell why nobody writes them any more."""
    step: int = 0
    """Optimizer steps done."""
    num_steps: int | None = None
    """Steps that the run is to do."""
    loss: float | None = None
    val_loss: float | None = None
    """The last validation loss."""
    tokens_per_s: float | None = None
    num_workers: int | None = None
    """Workers of the last start, where their number may change."""
    restarts: int = 0
    """Starts of the workers after the first."""
    num_faults: int = 0
    last_fault: Mapping[str, Any] | None = None
    """As in the log's ``RAY_DEEPEP_FAULT`` line."""
    checkpoint: str = ""
    """The newest complete one."""
    error: str = ""
    """Why the run ended, if it failed."""
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Of the job: ``preset``, ``backend``, ``ep_size``, ``git_sha`` and what else was submitted with it."""

    @property
    def ended(self) -> bool:
        """Whether nothing will change any more."""
        return self.phase in (*_ENDED, "ended")

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(dataclasses.asdict(self) | {"metadata": dict(self.metadata)}, sort_keys=True)

    def __str__(self) -> str:
        """Several lines, one for each thing that is known."""
        of = "" if self.num_steps is None else f" of {self.num_steps}"
        fault = "" if self.last_fault is None else str(self.last_fault.get("text") or self.last_fault.get("cause", ""))
        rows = (
            ("run", self.name),
            ("phase", self.phase),
            ("step", f"{self.step}{of}" if self.step or of else ""),
            ("loss", _text(self.loss, ".4f")),
            ("validation loss", _text(self.val_loss, ".4f")),
            ("tokens/s", _text(self.tokens_per_s, ",.0f")),
            ("workers", _text(self.num_workers, "d")),
            ("restarts", str(self.restarts)),
            ("faults", str(self.num_faults)),
            ("last fault", fault),
            ("checkpoint", self.checkpoint),
            ("error", self.error),
            *sorted(self.metadata.items()),
        )
        known = [(name, text) for name, text in rows if text]
        width = max(len(name) for name, _ in known)
        return "\n".join(f"{name:<{width}}  {text}" for name, text in known)


def state_of_job(
    name: str, status: str, log: LogState, *, message: str = "", metadata: Mapping[str, str] | None = None
) -> RunState:
    """From a job's status as Ray has it (``PENDING``, ``RUNNING``, ``SUCCEEDED``, ``FAILED``, ``STOPPED``), what its
    log says, and Ray's own words about how it ended."""
    phase = _phase(status.lower(), log)
    last = log.last_step
    return RunState(
        name=name,
        phase=phase,
        step=0 if last is None else last.step,
        num_steps=None if last is None else last.num_steps,
        loss=None if last is None else last.loss,
        val_loss=log.val_loss,
        tokens_per_s=None if last is None else last.tokens_per_s,
        num_workers=log.num_workers,
        restarts=max(0, log.num_attempts - 1),
        num_faults=log.num_faults,
        last_fault=log.fault,
        checkpoint=log.checkpoint,
        error=(log.error or message) if phase == "failed" else "",
        metadata=metadata or {},
    )


def _phase(status: str, log: LogState) -> str:
    if status != "running":
        return status
    if log.is_stopping:
        return "stopping"
    if log.is_training:
        return "training"
    return "restarting" if log.num_attempts > 1 or log.num_faults else "starting"


def state_of_folder(run: Run, *, now: float | None = None) -> RunState:
    """From the files of a run. now: seconds since the epoch, by which a run that was written to lately still goes."""
    summary = summarize(run, now=time.time() if now is None else now)
    word = summary.status.split(":")[0]
    phase = {"finished": "succeeded", "going": "training"}.get(word, "ended")
    return RunState(
        name=str(run.path),
        phase=phase,
        step=run.last_step,
        num_steps=run.num_steps,
        loss=_last(run.series("loss")),
        val_loss=_last(run.series("val_loss")),
        tokens_per_s=_last(run.series("tokens_per_s")),
        restarts=max(0, len(run.starts) - 1),
        num_faults=len(run.faults),
        last_fault=dict(run.faults[-1].fields) if run.faults else None,
        checkpoint="" if run.checkpoint is None else f"{run.path}, step {run.checkpoint.step}",
        metadata={key: str(value) for key, value in _described(run)},
    )


def _described(run: Run) -> list[tuple[str, Any]]:
    environment = run.starts[-1].environment if run.starts else {}
    found = [
        ("preset", run.config.get("name")),
        ("backend", run.config.get("run.backend")),
        ("ep_size", environment.get("EP size")),
        ("num_workers", environment.get("ranks")),
        ("git_sha", environment.get("commit")),
    ]
    return [(key, value) for key, value in found if value not in (None, "")]


def table(states: Sequence[RunState]) -> str:
    """A line for each run, under a header."""
    rows = [("run", "phase", "step", "loss", "tokens/s", "restarts", "last fault"), *map(_cells, states)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows)


def _cells(state: RunState) -> tuple[str, ...]:
    of = "" if state.num_steps is None else f"/{state.num_steps}"
    fault = state.last_fault or {}
    words = f"rank {fault.get('rank')} {fault.get('cause')}" if fault else ""
    loss, tokens = _text(state.loss, ".4f"), _text(state.tokens_per_s, ",.0f")
    return (state.name, state.phase, f"{state.step}{of}", loss, tokens, str(state.restarts), words)


def _text(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)


def _last(series: Sequence[tuple[int, float]]) -> float | None:
    return series[-1][1] if series else None
