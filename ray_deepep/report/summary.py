"""What the records of a run say in a few numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from .reader import Run, is_number

_WARM_UP_STEPS = 2
_GOING_S = 120.0
_GOING_STEPS = 20

PHASES = ("forward_ms", "backward_ms", "optimizer_ms")
"""Parts of ``step_ms`` that follow each other; what is left is the batch and the start of kernels."""
COMM = ("dispatch_ms", "combine_ms")
"""Parts of the forward and backward passes."""
MODULES = ("attention_ms", "gate_ms", "experts_ms")
"""Other parts of these, of runs that time them."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """NaN stands for what the run has no number for. Medians leave out the first two steps, which warm caches up."""

    status: str
    """In words, with the step."""
    ok: bool
    """Whether it ended as it should, or still goes."""
    first_loss: float
    last_loss: float
    last_val_loss: float
    best_val_loss: float
    tokens_per_s: float
    """Median."""
    median_ms: Mapping[str, float]
    """Of ``step_ms``, PHASES, COMM and MODULES."""
    comm_share: float
    """Median of (dispatch + combine) / step, from 0 to 1."""
    wall_s: float
    """From the first moment that was noted to the last."""


def summarize(run: Run, *, now: float) -> Summary:
    """now: seconds since the epoch, by which a run that was written to lately still goes."""
    losses = [value for _, value in run.series("loss")]
    val_losses = [value for _, value in run.series("val_loss")]
    median_ms = {name: _median(run, name) for name in ("step_ms", *PHASES, *COMM, *MODULES)}
    status, ok = _status(run, median_ms["step_ms"], now)
    return Summary(
        status=status,
        ok=ok,
        first_loss=losses[0] if losses else math.nan,
        last_loss=losses[-1] if losses else math.nan,
        last_val_loss=val_losses[-1] if val_losses else math.nan,
        best_val_loss=min(val_losses, default=math.nan),
        tokens_per_s=_median(run, "tokens_per_s"),
        median_ms=median_ms,
        comm_share=_comm_share(run),
        wall_s=_wall(run),
    )


def _median(run: Run, name: str) -> float:
    values = [value for _, value in run.series(name)]
    return statistics.median(values[_WARM_UP_STEPS:] or values) if values else math.nan


def _comm_share(run: Run) -> float:
    series = [dict(run.series(name)) for name in ("step_ms", *COMM)]
    steps = sorted(set(series[0]).intersection(*series[1:]))
    shares = [(series[1][s] + series[2][s]) / series[0][s] for s in steps if series[0][s] > 0]
    return statistics.median(shares[_WARM_UP_STEPS:] or shares) if shares else math.nan


def _status(run: Run, step_ms: float, now: float) -> tuple[str, bool]:
    wanted, last = run.num_steps, run.last_step
    of = f" of {wanted}" if wanted else ""
    if wanted and last >= wanted:
        return f"finished: {last} steps", True
    heard = max([run.last_written_s or 0.0, *(start.time_s for start in run.starts)])
    silent = now - heard if heard else math.inf
    patience = max(_GOING_S, 0.0 if math.isnan(step_ms) else _GOING_STEPS * step_ms / 1e3)
    where = f"step {last}{of}" if last else f"before step 1{of}"
    if silent <= patience:
        return f"going: {where}, heard of {max(silent, 0):.0f} s ago", True
    return f"ended early: {where}", False


def moments(run: Run) -> list[float]:
    """All times that were noted, ascending, in seconds since the epoch."""
    times = [start.time_s for start in run.starts] + [fault.time_s for fault in run.faults]
    return sorted(times + [value for _, value in run.series("time_s")])


def _wall(run: Run) -> float:
    times = moments(run)
    return times[-1] - times[0] if len(times) > 1 else math.nan


@dataclass(frozen=True, kw_only=True)
class Activity:
    """From one start of the program to the next, or to the end. Seconds since the epoch."""

    started_s: float
    step: int
    """Steps done before it."""
    training_s: float | None
    """Its first step began; None if it did none that was kept."""
    ended_s: float
    """Its fault, or its last step."""


def activities(run: Run) -> list[Activity]:
    """One for each start. Steps after the checkpoint that the next start took are not in the metrics any more."""
    times = run.series("time_s")
    step_ms = dict(run.series("step_ms"))
    found = []
    for index, start in enumerate(run.starts):
        until = run.starts[index + 1].time_s if index + 1 < len(run.starts) else math.inf
        inside = sorted((time, step) for step, time in times if start.time_s <= time < until)
        faults = [fault.time_s for fault in run.faults if start.time_s <= fault.time_s < until]
        training = inside[0][0] - step_ms.get(inside[0][1], 0.0) / 1e3 if inside else None
        ended = max([start.time_s, *faults, *(time for time, _ in inside[-1:])])
        found.append(Activity(started_s=start.time_s, step=start.step, training_s=training, ended_s=ended))
    return found


def expert_load(run: Run) -> dict[int, list[list[float]]]:
    """Tokens per expert by step, [MoE layers][E]; records of another shape than the first one are left out."""
    found: dict[int, list[list[float]]] = {}
    shape: list[int] | None = None
    for record in run.steps:
        layers = record.get("expert_tokens")
        if not (isinstance(layers, list) and layers and all(_is_row(row) for row in layers)):
            continue
        lengths = [len(row) for row in layers]
        shape = shape or lengths
        if lengths == shape and len(set(lengths)) == 1:
            found[record["step"]] = layers
    return found


def _is_row(row: object) -> bool:
    return isinstance(row, list) and bool(row) and all(is_number(value) and value >= 0 for value in row)


def imbalance(tokens: list[float]) -> float:
    """Fullest expert over the mean, 1 where all have the same; NaN without tokens."""
    total = sum(tokens)
    return max(tokens) * len(tokens) / total if total else math.nan
