"""Numbers of a run: one JSON line for each step, and what is worth saying about all of them."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from train.errors import DataError
from train.files import write_text_atomic

_WARM_UP_STEPS = 2
_MEDIANS = (
    "tokens_per_s",
    *(f"{part}_ms" for part in ("step", "forward", "backward", "optimizer", "dispatch", "combine")),
    *(f"{part}_ms" for part in ("attention", "gate", "experts")),
)


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """One optimizer step. Losses and dispatch/combine times are means over all ranks, other times are this rank's."""

    step: int
    """Counts from 1."""
    loss: float
    """Cross-entropy per token, in nats, mean over micro-batches and ranks."""
    aux_loss: float
    """Load-balancing loss summed over layers, unweighted."""
    lr: float
    """Learning rate this step used."""
    tokens_per_s: float
    """Tokens of all ranks over the time of the step."""
    step_ms: float
    """The whole step: batch, forward, backward, optimizer."""
    forward_ms: float
    """Forward passes, dispatch and combine included."""
    backward_ms: float
    """Backward passes, gradient reduction, dispatch and combine included."""
    optimizer_ms: float
    """Clipping and update."""
    dispatch_ms: float
    """Tokens on their way to experts, forward and backward passes."""
    combine_ms: float
    """Rows on their way back, forward and backward passes."""
    comm_calls: float
    """Calls behind `dispatch_ms` and `combine_ms`, mean over ranks."""
    attention_ms: float | None = None
    """Attention, forward and backward passes. This and the next two with `run.split`."""
    gate_ms: float | None = None
    """Gates, which choose experts."""
    experts_ms: float | None = None
    """MoE layers without gates, dispatch and combine: experts, and what puts their rows in order."""
    memory_bytes: int | None = None
    """What `train.memory` says of this rank, on every tenth step and the last."""
    val_loss: float | None = None
    """Validation cross-entropy, on steps that validate."""
    time_s: float | None = None
    """When the step was done, in seconds since the epoch."""
    world_size: int | None = None
    """Ranks that did the step."""
    expert_tokens: list[list[int]] | None = None
    """Tokens that all ranks routed to each expert, before drops, [MoE layers][E]; see `run.load_every`."""


@dataclass(frozen=True, kw_only=True)
class RunStats:
    """What a list of steps says about a run. Times are medians, without the first two steps."""

    num_steps: int
    first_loss: float
    last_loss: float
    val_loss: float
    """The last validation loss; NaN if there was none."""
    tokens_per_s: float
    step_ms: float
    forward_ms: float
    backward_ms: float
    optimizer_ms: float
    dispatch_ms: float
    combine_ms: float
    comm_share: float
    """(dispatch + combine) / step, from 0 to 1."""
    attention_ms: float
    """NaN, as the next two, without `run.split`."""
    gate_ms: float
    experts_ms: float
    memory_bytes: float
    """The most of all steps; NaN if none says."""


def run_stats(steps: list[StepMetrics]) -> RunStats:
    """Summarise `steps`; all NaN if there are none."""
    if not steps:
        nan = math.nan
        empty = {field.name: nan for field in dataclasses.fields(RunStats)}
        return RunStats(**(empty | {"num_steps": 0}))
    timed = steps[_WARM_UP_STEPS:] or steps
    validated = [m.val_loss for m in steps if m.val_loss is not None]

    def median(name: str) -> float:
        known = [getattr(m, name) for m in timed if getattr(m, name) is not None]
        return statistics.median(known) if known else math.nan

    return RunStats(
        num_steps=len(steps),
        first_loss=steps[0].loss,
        last_loss=steps[-1].loss,
        val_loss=validated[-1] if validated else math.nan,
        **{name: median(name) for name in _MEDIANS},
        memory_bytes=max((m.memory_bytes for m in steps if m.memory_bytes is not None), default=math.nan),
        comm_share=statistics.median((m.dispatch_ms + m.combine_ms) / m.step_ms for m in timed),
    )


class MetricsWriter:
    """Appends steps to a JSON-lines file; each line is with the operating system before the next step begins."""

    def __init__(self, path: Path):
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()

    def write(self, metrics: StepMetrics) -> None:
        record = {key: value for key, value in dataclasses.asdict(metrics).items() if value is not None}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[StepMetrics]:
    """The steps in a metrics file. A last line cut short by a crash is left out; any other bad line is a DataError."""
    lines = path.read_text(encoding="utf-8").split("\n")
    steps: list[StepMetrics] = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            steps.append(StepMetrics(**json.loads(line)))
        except (ValueError, TypeError) as error:
            if number == len(lines):  # complete lines end with a newline, so this one was cut
                break
            raise DataError(str(path), f"line {number} is no step record ({error})", "Remove the line") from error
    return steps


def truncate_metrics(path: Path, last_step: int) -> list[StepMetrics]:
    """Drop steps after `last_step` (they will be run again) and return the rest. A missing file stays missing."""
    if not path.is_file():
        return []
    kept = [m for m in read_metrics(path) if m.step <= last_step]
    records = [{k: v for k, v in dataclasses.asdict(m).items() if v is not None} for m in kept]
    write_text_atomic(path, "".join(json.dumps(record) + "\n" for record in records))
    return kept
