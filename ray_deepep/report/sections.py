"""The parts of the page, each a function of all runs."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from .bars import phase_legend, step_parts, step_split, timeline
from .charts import Series, line_chart
from .heatmap import heatmap, load_legend
from .markup import Markup, join, tag
from .reader import Run
from .scale import compact, duration, size_of
from .summary import MODULES, Summary, activities, expert_load, imbalance, moments
from .tables import comparison_table, count_row, num_different, plain_table, split_table, summary_table

NUM_COLOURS = 8
_LIMIT = 3.0
"""Times above so many medians are no part of the picture: first steps, pauses."""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A run and how it is shown."""

    css: str
    run: Run
    summary: Summary

    @property
    def head(self) -> tuple[str, str]:
        """Colour class and label."""
        return self.css, self.run.label


def overview(shown: Sequence[Shown]) -> Markup:
    """Numbers of the whole runs, and what could not be read."""
    saved = [s.run.checkpoint for s in shown]
    rows = [
        count_row("starts / faults", [f"{len(s.run.starts)} / {len(s.run.faults)}" for s in shown]),
        count_row("newest checkpoint", [f"step {c.step}, {size_of(c.num_bytes)}" if c else "none" for c in saved]),
        count_row("folder", [s.run.path for s in shown]),
    ]
    notes = [tag("li", f"{s.run.label}: {note}") for s in shown for note in s.run.notes]
    table = summary_table([s.head for s in shown], [s.summary for s in shown], rows)
    return join(table, tag("ul", *notes, class_="notes") if notes else "")


def loss(shown: Sequence[Shown]) -> Markup:
    """Training, validation and load-balancing loss, learning rate."""
    unit = "nats per token"
    charts = [
        _by_step(shown, "loss", title="Training loss", y_label=unit, style="smooth"),
        _by_step(shown, "val_loss", title="Validation loss", y_label=unit, style="dots"),
        _by_step(shown, "aux_loss", title="Load-balancing loss", y_label="sum over layers", style="smooth"),
        _by_step(shown, "lr", title="Learning rate", y_label="learning rate", from_zero=True),
    ]
    return tag("div", *charts, class_="charts")


def throughput(shown: Sequence[Shown]) -> Markup:
    """Tokens per second and the time of a step, by step."""
    charts = [
        _by_step(shown, "tokens_per_s", title="Throughput", y_label="tokens/s", style="smooth", from_zero=True),
        _by_step(shown, "step_ms", title="Time of a step", y_label="ms", style="smooth", from_zero=True, clip=True),
    ]
    return tag("div", *charts, class_="charts")


def split(shown: Sequence[Shown]) -> Markup:
    """Where the time of a step goes."""
    names = {
        "step_ms": "whole step",
        "forward_ms": "forward",
        "backward_ms": "backward",
        "optimizer_ms": "optimizer",
        "rest_ms": "rest: batch, launches",
        "dispatch_ms": "dispatch (in forward and backward)",
        "combine_ms": "combine (in forward and backward)",
        "attention_ms": "attention (in forward and backward)",
        "gate_ms": "gates (in forward and backward)",
        "experts_ms": "experts (in forward and backward)",
    }
    parts = [dict(s.summary.median_ms) | step_parts(s.summary) for s in shown]
    known = {name for part in parts for name, ms in part.items() if not math.isnan(ms)}
    names = {name: title for name, title in names.items() if name in known or name not in MODULES}
    about = (
        "Median ms, without the first two steps. The thin bar is dispatch and combine, which are parts of the forward"
    )
    return join(
        tag("p", f"{about} and backward passes: means over ranks; the other times are rank 0's."),
        phase_legend(),
        step_split([(*s.head, s.summary) for s in shown]),
        split_table([s.head for s in shown], parts, names),
        tag(
            "div",
            _by_step(shown, "dispatch_ms", title="Dispatch", y_label="ms", style="smooth", from_zero=True, clip=True),
            _by_step(shown, "combine_ms", title="Combine", y_label="ms", style="smooth", from_zero=True, clip=True),
            class_="charts",
        ),
    )


def _by_step(
    shown: Sequence[Shown],
    name: str,
    *,
    title: str,
    y_label: str,
    style: str = "line",
    from_zero: bool = False,
    clip: bool = False,
) -> Markup:
    series = [Series(css=s.css, name=s.run.label, points=s.run.series(name), style=style) for s in shown]
    medians = [statistics.median(y for _, y in one.points) for one in series if one.points]
    limit = _LIMIT * max(medians) if clip and medians and max(medians) > 0 else math.inf
    return line_chart(series, title=title, x_label="step", y_label=y_label, from_zero=from_zero, y_limit=limit)


def load(shown: Sequence[Shown]) -> Markup:
    """How evenly gates use the experts, over time."""
    loads = [(s, expert_load(s.run)) for s in shown]
    worst = [
        Series(
            css=s.css,
            name=s.run.label,
            points=[(step, max(found)) for step, layers in tokens.items() if (found := _imbalances(layers))],
        )
        for s, tokens in loads
    ]
    about = "Tokens that gates sent to each expert, all ranks, before drops. Fullest over mean: 1 is an even load."
    chart = line_chart(
        worst, title="Fullest expert over the mean, worst layer", x_label="step", y_label="times the mean"
    )
    parts = [tag("p", about), tag("div", chart, class_="charts"), load_legend()]
    for s, tokens in loads:
        parts.append(tag("h3", tag("span", s.run.label, class_=f"key {s.css}")))
        if not tokens:
            parts.append(tag("p", "This run's metrics have no tokens per expert.", class_="empty"))
            continue
        num_layers = len(next(iter(tokens.values())))
        maps = [
            heatmap([(step, layers[i]) for step, layers in tokens.items()], title=f"MoE layer {i}: expert by step")
            for i in range(num_layers)
        ]
        parts.append(tag("div", *maps, class_="charts small"))
    return join(*parts)


def _imbalances(layers: Sequence[list[float]]) -> list[float]:
    return [value for row in layers if not math.isnan(value := imbalance(row))]


def faults(shown: Sequence[Shown]) -> Markup:
    """When runs ran and what stopped them."""
    legend = tag(
        "p",
        tag("span", "coming up", class_="key coming run0"),
        tag("span", "training", class_="key run0"),
        tag("span", "fault", class_="key fault"),
        class_="legend",
    )
    fault_rows = [row for s in shown for row in _fault_rows(s)]
    restart_rows = [row for s in shown for row in _restart_rows(s)]
    parts = [legend, timeline([(s.css, s.run) for s in shown])]
    if restart_rows:
        names = (
            "run",
            "start",
            "at",
            "after",
            "resumed at step",
            "fault to training again",
            "last kept step to training again",
        )
        parts += [tag("h3", "Restarts"), plain_table(names, restart_rows)]
    parts.append(tag("h3", "Faults"))
    if fault_rows:
        names = ("run", "no.", "at", "cause", "rank", "host", "GPU", "attempt", "what")
        parts.append(plain_table(names, fault_rows, css="faults"))
    else:
        parts.append(tag("p", "None was noted.", class_="empty"))
    parts.append(_progress(shown))
    return join(*parts)


def _fault_rows(s: Shown) -> list[list[object]]:
    zero = moments(s.run)[:1]
    rows = []
    for number, fault in enumerate(s.run.faults, start=1):
        known = [fault.fields.get(name) for name in ("cause", "rank", "host", "gpu", "attempt", "text")]
        cells = ["" if value is None else value for value in known]
        at = f"{clock(fault.time_s)} (+{duration(fault.time_s - zero[0])})"
        rows.append([tag("span", s.run.label, class_=f"key {s.css}"), number, at, *cells])
    return rows


def _restart_rows(s: Shown) -> list[list[object]]:
    """A row for each start but the first."""
    rows, found = [], activities(s.run)
    times = sorted(time for _, time in s.run.series("time_s"))
    for number, (before, after) in enumerate(itertools.pairwise(found), start=2):
        causes = [f for f in s.run.faults if before.started_s <= f.time_s < after.started_s]
        down = lost = math.nan
        if after.training_s is not None:
            down = after.training_s - causes[-1].time_s if causes else math.nan
            kept = [time for time in times if time < after.started_s]
            lost = after.training_s - kept[-1] if kept else after.training_s - found[0].started_s
        cause = ", ".join(str(fault.fields.get("cause", "fault")) for fault in causes) or "no fault noted"
        label = tag("span", s.run.label, class_=f"key {s.css}")
        rows.append([label, number, clock(after.started_s), cause, after.step, duration(down), duration(lost)])
    return rows


def _progress(shown: Sequence[Shown]) -> Markup:
    """Steps done over wall time."""
    series, longest = [], 0.0
    for s in shown:
        zero = (moments(s.run) or [0.0])[0]
        points = sorted((time - zero, float(step)) for step, time in s.run.series("time_s"))
        longest = max([longest, *(x for x, _ in points[-1:])])
        series.append(Series(css=s.css, name=s.run.label, points=points))
    if not any(one.points for one in series):
        return join()
    unit, name = next((u for u in ((3600.0, "hours"), (60.0, "minutes")) if longest >= 3 * u[0]), (1.0, "seconds"))
    scaled = [Series(css=o.css, name=o.name, points=[(x / unit, y) for x, y in o.points]) for o in series]
    chart = line_chart(
        scaled, title="Steps over time", x_label=f"{name} since the run began", y_label="step", from_zero=True
    )
    return tag("div", chart, class_="charts")


def clock(time_s: float) -> str:
    """Seconds since the epoch as a date and a time, UTC."""
    try:
        return datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%d %H:%M:%S")
    except (OverflowError, OSError, ValueError):
        return f"{compact(time_s)} s since the epoch"


def configuration(shown: Sequence[Shown]) -> Markup:
    """Every setting."""
    return _compared(
        shown, [s.run.config for s in shown], "Settings that differ", "No run has a configuration that can be read."
    )


def environment(shown: Sequence[Shown]) -> Markup:
    """What the runs ran on, by their last start."""
    found = [s.run.starts[-1].environment if s.run.starts else {} for s in shown]
    return _compared(shown, found, "Entries that differ", "No run has noted what it ran on.")


def _compared(shown: Sequence[Shown], values: list, what: str, if_none: str) -> Markup:
    if not any(values):
        return tag("p", if_none, class_="empty")
    count = num_different(values)
    several = f"{what}: {count}, marked ≠." if len(shown) > 1 else ""
    return join(tag("p", several) if several else "", comparison_table([s.head for s in shown], values))


def samples(shown: Sequence[Shown]) -> Markup:
    """Text by the models."""
    parts = [
        join(tag("h3", tag("span", s.run.label, class_=f"key {s.css}")), tag("pre", s.run.sample))
        for s in shown
        if s.run.sample
    ]
    return join(*parts) if parts else tag("p", "No run has written a sample yet.", class_="empty")


SECTIONS: tuple[tuple[str, str, Callable[[Sequence[Shown]], Markup]], ...] = (
    ("overview", "Overview", overview),
    ("loss", "Loss", loss),
    ("throughput", "Throughput", throughput),
    ("split", "Step split", split),
    ("load", "Expert load", load),
    ("faults", "Faults and restarts", faults),
    ("configuration", "Configuration", configuration),
    ("environment", "Environment", environment),
    ("samples", "Sample text", samples),
)
