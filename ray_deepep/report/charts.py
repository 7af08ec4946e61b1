"""Line charts as SVG. Colours are CSS classes (``run0``, ...), so that a run looks the same everywhere on the page."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from .markup import Markup, join, tag
from .scale import Scale, compact

WIDTH, HEIGHT = 640, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 14, 12, 44
_MAX_POINTS = 800
_MEDIANS = 200
_SMOOTH_FROM = 60
"""Lines of so many points are drawn faint, with their running median over them."""

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line."""

    css: str
    """Class that gives the colour."""
    name: str
    points: Sequence[Point]
    """By x."""
    style: str = "line"
    """``line``, ``smooth`` (faint, its running median over it where it is long) or ``dots`` (joined by dashes)."""


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    from_zero: bool = False,
    y_limit: float = math.inf,
) -> Markup:
    """All series in one system of axes. Values above ``y_limit`` are drawn at it; the caption says so."""
    drawn = [s for s in series if s.points]
    if not drawn:
        return _figure(title, tag("p", "no data", class_="empty"))
    xs = [x for s in drawn for x, _ in s.points]
    ys = [min(y, y_limit) for s in drawn for _, y in s.points]
    x_scale = Scale.over(min(xs), max(xs), _LEFT, WIDTH - _RIGHT)
    y_scale = Scale.over(min(0.0, *ys) if from_zero else min(ys), max(ys), HEIGHT - _BOTTOM, _TOP, pad=0.04)
    lines = [_draw(s, x_scale, y_scale, y_limit, over=index > 0) for index, s in enumerate(drawn)]
    svg = tag(
        "svg",
        tag("title", title),
        axes(x_scale, y_scale, x_label=x_label, y_label=y_label),
        *lines,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
    )
    above = sum(y > y_limit for s in drawn for _, y in s.points)
    note = f"{above} values above {compact(y_limit)} are drawn at it." if above else ""
    return _figure(title, svg, note)


def _figure(title: str, content: Markup, note: str = "") -> Markup:
    caption = tag("figcaption", tag("b", title), *([" ", tag("span", note, class_="note")] if note else []))
    return tag("figure", caption, content)


def axes(x_scale: Scale, y_scale: Scale, *, x_label: str, y_label: str) -> Markup:
    """Grid, ticks and names of both axes."""
    left, right, bottom, top = x_scale.start, x_scale.end, y_scale.start, y_scale.end
    parts: list[Markup] = []
    for value in y_scale.ticks(5):
        y = y_scale(value)
        parts.append(tag("line", x1=left, x2=right, y1=y, y2=y, class_="grid"))
        parts.append(tag("text", compact(value), x=left - 6, y=y + 4, text_anchor="end"))
    for value in x_scale.ticks(8):
        x = x_scale(value)
        parts.append(tag("line", x1=x, x2=x, y1=bottom, y2=bottom + 4, class_="axis"))
        parts.append(tag("text", compact(value), x=x, y=bottom + 17, text_anchor="middle"))
    parts.append(tag("line", x1=left, x2=right, y1=bottom, y2=bottom, class_="axis"))
    parts.append(tag("text", x_label, x=(left + right) / 2, y=bottom + 36, text_anchor="middle", class_="label"))
    middle = (top + bottom) / 2
    turned = f"rotate(-90 14 {middle:.0f})"
    parts.append(tag("text", y_label, x=14, y=middle, text_anchor="middle", transform=turned, class_="label"))
    return join(*parts)


def _draw(series: Series, x_scale: Scale, y_scale: Scale, y_limit: float, *, over: bool) -> Markup:
    """``over``: another series is drawn already; it shows through gaps in this one where both are equal."""

    def polyline(points: Sequence[Point], css: str) -> Markup:
        at = " ".join(f"{x_scale(x):.1f},{y_scale(min(y, y_limit)):.1f}" for x, y in points)
        return tag("polyline", points=at, class_=f"{css} over {series.css}" if over else f"{css} {series.css}")

    points = thin_out(series.points)
    if series.style == "dots" or len(points) == 1:
        dots = [
            tag(
                "circle",
                tag("title", f"{series.name}: {y:.4f} at {compact(x)}"),
                cx=x_scale(x),
                cy=y_scale(min(y, y_limit)),
                r=3.0 if over else 4.5,
                class_=f"dot {series.css}",
            )
            for x, y in points
        ]
        return join(polyline(points, "line dashed"), *dots)
    if series.style == "smooth" and len(series.points) >= _SMOOTH_FROM:
        return join(polyline(points, "line faint"), polyline(running_median(series.points), "line"))
    return polyline(points, "line")


def thin_out(points: Sequence[Point], limit: int = _MAX_POINTS) -> list[Point]:
    """At most about ``limit`` points: of each stretch the first, the lowest and the highest, and the very last."""
    if len(points) <= limit:
        return list(points)
    size = math.ceil(3 * len(points) / limit)
    kept: list[Point] = []
    for begin in range(0, len(points), size):
        part = points[begin : begin + size]
        kept.extend(sorted({part[0], min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}))
    return [*kept, points[-1]] if kept[-1] != points[-1] else kept


def running_median(points: Sequence[Point]) -> list[Point]:
    """Median of y over a fiftieth of the points around each of some hundreds of them: outliers do not move it."""
    half, stride = max(2, len(points) // 100), math.ceil(len(points) / _MEDIANS)
    places = sorted({*range(0, len(points), stride), len(points) - 1})
    return [(points[i][0], statistics.median(y for _, y in points[max(0, i - half) : i + half + 1])) for i in places]
