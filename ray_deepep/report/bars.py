"""Bars as SVG: the parts of a step, and when the program ran."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .markup import Markup, join, tag
from .reader import Run
from .scale import Scale, compact, duration
from .summary import COMM, PHASES, Activity, Summary, activities, moments

_WIDTH, _LEFT, _RIGHT = 960, 16, 16
_LANE = 62
_NAMES = {
    "forward_ms": "forward",
    "backward_ms": "backward",
    "optimizer_ms": "optimizer",
    "rest_ms": "rest",
    "dispatch_ms": "dispatch",
    "combine_ms": "combine",
}


def phase_legend() -> Markup:
    """Which colour is which part of a step."""
    return tag("p", *(tag("span", name, class_=f"key {key[:-3]}") for key, name in _NAMES.items()), class_="legend")


def step_parts(summary: Summary) -> dict[str, float]:
    """Median ms of the parts of a step, in order; those that the run has no number for are left out."""
    parts = {name: summary.median_ms[name] for name in PHASES if not math.isnan(summary.median_ms[name])}
    rest = summary.median_ms["step_ms"] - sum(parts.values())
    return parts | ({"rest_ms": max(0.0, rest)} if parts and not math.isnan(rest) else {})


def step_split(runs: Sequence[tuple[str, str, Summary]]) -> Markup:
    """A pair of bars for each (CSS class, label, summary): the parts of a step, and dispatch and combine within."""
    longest = max((sum(step_parts(summary).values()) for _, _, summary in runs), default=0.0)
    if longest <= 0:
        return tag("p", "no times", class_="empty")
    scale = Scale.over(0.0, longest, _LEFT, _WIDTH - _RIGHT)
    lanes = []
    for index, (css, label, summary) in enumerate(runs):
        top = index * (_LANE + 8) + 16
        parts = step_parts(summary)
        comm = {name: value for name in COMM if not math.isnan(value := summary.median_ms[name])}
        lanes.append(tag("text", label, x=_LEFT, y=top, class_=f"lane {css}"))
        lanes.append(_stack(parts, scale, y=top + 8, height=22))
        lanes.append(_stack(comm, scale, y=top + 32, height=10))
    height = len(runs) * (_LANE + 8) + 30
    return tag("svg", tag("title", "Median time of a step"), *lanes, _axis(scale, height, "ms"), **_frame(height))


def _stack(parts: dict[str, float], scale: Scale, *, y: float, height: float) -> Markup:
    at, drawn = 0.0, []
    for name, value in parts.items():
        x, width = scale(at), scale(at + value) - scale(at)
        title = tag("title", f"{_NAMES[name]}: {value:.2f} ms")
        drawn.append(tag("rect", title, x=x, y=y, width=width, height=height, class_=f"part {name[:-3]}"))
        at += value
    return join(*drawn)


def _axis(scale: Scale, height: float, unit: str) -> Markup:
    y = height - 24
    parts = [tag("line", x1=scale.start, x2=scale.end, y1=y, y2=y, class_="axis")]
    for value in scale.ticks(8):
        x = scale(value)
        parts.append(tag("line", x1=x, x2=x, y1=y, y2=y + 4, class_="axis"))
        parts.append(tag("text", f"{compact(value)} {unit}", x=x, y=y + 18, text_anchor="middle"))
    return join(*parts)


def _frame(height: float) -> dict[str, object]:
    return {"viewBox": f"-24 0 {_WIDTH + 48} {height:.0f}", "role": "img", "class_": "wide"}


@dataclass(frozen=True, kw_only=True)
class _Unit:
    seconds: float
    name: str

    @classmethod
    def for_span(cls, seconds: float) -> _Unit:
        for unit, name in ((3600.0, "h"), (60.0, "min")):
            if seconds >= 3 * unit:
                return cls(seconds=unit, name=name)
        return cls(seconds=1.0, name="s")


def timeline(runs: Sequence[tuple[str, Run]]) -> Markup:
    """A lane for each (CSS class, run): light where the program came up, full where it trained, marks at faults."""
    spans = {id(run): times for _, run in runs if (times := moments(run)) and (run.starts or run.faults)}
    if not spans:
        return tag("p", "no times of starts, steps or faults", class_="empty")
    unit = _Unit.for_span(max(times[-1] - times[0] for times in spans.values()))
    longest = max(times[-1] - times[0] for times in spans.values()) / unit.seconds
    scale = Scale.over(0.0, longest, _LEFT, _WIDTH - _RIGHT)
    lanes = []
    for index, (css, run) in enumerate(runs):
        top = index * _LANE + 16
        lanes.append(tag("text", run.label, x=_LEFT, y=top, class_=f"lane {css}"))
        if id(run) in spans:
            lanes.append(_lane(css, run, scale, zero=spans[id(run)][0], unit_s=unit.seconds, y=top + 8))
    height = len(runs) * _LANE + 34
    return tag("svg", tag("title", "When the runs ran"), *lanes, _axis(scale, height, unit.name), **_frame(height))


def _lane(css: str, run: Run, scale: Scale, *, zero: float, unit_s: float, y: float) -> Markup:
    def at(time_s: float) -> float:
        return scale((time_s - zero) / unit_s)

    drawn = [join(*_bars(css, activity, at, y)) for activity in activities(run)]
    for number, fault in enumerate(run.faults, start=1):
        x = at(fault.time_s)
        title = tag("title", f"fault {number}: {fault.fields.get('cause', '')}, {duration(fault.time_s - zero)} in")
        drawn.append(tag("line", title, x1=x, x2=x, y1=y - 4, y2=y + 28, class_="fault"))
        drawn.append(tag("text", number, x=x, y=y + 40, text_anchor="middle", class_="fault"))
    return join(*drawn)


def _bars(css: str, activity: Activity, at, y: float) -> list[Markup]:
    begin = activity.ended_s if activity.training_s is None else activity.training_s
    title = tag("title", f"start after step {activity.step}: up in {duration(begin - activity.started_s)}")
    bars = [_bar(title, at(activity.started_s), at(begin), y, f"{css} coming")]
    if activity.training_s is not None:
        title = tag("title", f"training for {duration(activity.ended_s - begin)}")
        bars.append(_bar(title, at(begin), at(activity.ended_s), y, f"{css} training"))
    return bars


def _bar(title: Markup, x1: float, x2: float, y: float, css: str) -> Markup:
    return tag("rect", title, x=x1, y=y, width=max(1.0, x2 - x1), height=24, class_=css)
