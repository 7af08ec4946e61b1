"""The whole page."""

from __future__ import annotations

from collections.abc import Sequence

from ..version import __version__
from .markup import Markup, join, tag
from .reader import Run
from .sections import NUM_COLOURS, SECTIONS, Shown, clock
from .style import STYLE
from .summary import summarize

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""The browser itself then refuses scripts and everything from elsewhere."""


def render_page(runs: Sequence[Run], *, now: float) -> Markup:
    """The HTML. ``now``: seconds since the epoch."""
    shown = [
        Shown(css=f"run{index % NUM_COLOURS}", run=run, summary=summarize(run, now=now))
        for index, run in enumerate(runs)
    ]
    title = "Report: " + ", ".join(run.label for run in runs)
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Markup(STYLE)),
    )
    keys = [tag("span", s.run.label, class_=f"key {s.css}") for s in shown]
    links = [tag("a", name, href=f"#{anchor}") for anchor, name, _ in SECTIONS]
    header = tag("header", tag("h1", "Training runs"), tag("p", *keys, class_="legend"), tag("nav", *links))
    body = [tag("section", tag("h2", name), draw(shown), id=anchor) for anchor, name, draw in SECTIONS]
    made = tag("footer", f"Made by ray-deepep {__version__} at {clock(now)} UTC. All times are UTC.")
    page = tag("html", head, tag("body", header, tag("main", *body), made), lang="en")
    return join(Markup("<!DOCTYPE html>\n"), page, Markup("\n"))
