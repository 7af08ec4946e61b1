"""Tables with a column for each run, and a mark where runs differ."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .markup import Markup, tag
from .scale import duration
from .summary import Summary

_ABSENT = "–"


def run_header(runs: Sequence[tuple[str, str]]) -> Markup:
    """Heading row of (CSS class, label)."""
    names = [tag("th", tag("span", label, class_=f"key {css}"), scope="col") for css, label in runs]
    return tag("thead", tag("tr", tag("td"), *names))


def number(value: float, digits: int) -> str:
    """With thousands separators; a dash for NaN."""
    return _ABSENT if math.isnan(value) else f"{value:,.{digits}f}"


def summary_table(runs: Sequence[tuple[str, str]], summaries: Sequence[Summary], rows: Sequence[Markup]) -> Markup:
    """The overview; ``rows`` come after the rows made here."""
    first = summaries[0]

    def ratio(value: float, base: float) -> str:
        comparable = len(summaries) > 1 and base > 0 and not math.isnan(value)
        return f" ({value / base:.2f}×)" if comparable else ""

    def row(name: str, show: Callable[[Summary], str]) -> Markup:
        return tag("tr", tag("th", name, scope="row"), *(tag("td", show(summary)) for summary in summaries))

    status = [tag("td", summary.status, class_="ok" if summary.ok else "bad") for summary in summaries]
    body = [
        tag("tr", tag("th", "status", scope="row"), *status),
        row("first loss", lambda s: number(s.first_loss, 4)),
        row("last loss", lambda s: number(s.last_loss, 4)),
        row("last validation loss", lambda s: number(s.last_val_loss, 4)),
        row("best validation loss", lambda s: number(s.best_val_loss, 4)),
        row("tokens/s", lambda s: number(s.tokens_per_s, 0) + ratio(s.tokens_per_s, first.tokens_per_s)),
        row("dispatch + combine, share of a step", lambda s: percent(s.comm_share)),
        row("time from first start to last step", lambda s: duration(s.wall_s)),
        *rows,
    ]
    return _table(run_header(runs), body)


def percent(share: float) -> str:
    """0.123 as 12.3%."""
    return _ABSENT if math.isnan(share) else f"{share:.1%}"


def count_row(name: str, values: Sequence[object]) -> Markup:
    """A row of plain values."""
    return tag("tr", tag("th", name, scope="row"), *(tag("td", value) for value in values))


def split_table(
    runs: Sequence[tuple[str, str]], parts: Sequence[Mapping[str, float]], names: Mapping[str, str]
) -> Markup:
    """Median ms: a row for each of ``names``, a column for each run."""
    body = [
        tag(
            "tr",
            tag("th", title, scope="row"),
            *(tag("td", number(part.get(name, math.nan), 2)) for part in parts),
        )
        for name, title in names.items()
    ]
    return _table(run_header(runs), body)


def plain_table(names: Sequence[str], rows: Sequence[Sequence[object]], *, css: str | None = None) -> Markup:
    """Heading and rows of any cells."""
    head = tag("thead", tag("tr", *(tag("th", name, scope="col") for name in names)))
    body = [tag("tr", *(tag("td", cell) for cell in row)) for row in rows]
    return _table(head, body, css=css)


def num_different(runs: Sequence[Mapping[str, Any]]) -> int:
    """How many keys have other values in some run."""
    return sum(_differs(runs, key) for key in _keys(runs))


def comparison_table(runs: Sequence[tuple[str, str]], values: Sequence[Mapping[str, Any]]) -> Markup:
    """A row for each key of the flat ``values``, marked where runs differ; a dash where a run has no such key."""
    body = []
    for key in _keys(values):
        differs = _differs(values, key)
        mark = tag("span", "≠ ", class_="mark") if differs else ""
        cells = [tag("td", _show(run[key]) if key in run else _ABSENT) for run in values]
        body.append(tag("tr", tag("th", mark, key, scope="row"), *cells, class_="differs" if differs else None))
    return _table(run_header(runs), body, css="settings")


def _keys(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for run in runs for key in run))


def _differs(runs: Sequence[Mapping[str, Any]], key: str) -> bool:
    return len({json.dumps(run[key], sort_keys=True) if key in run else None for run in runs}) > 1


def _show(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _table(head: Markup, body: Sequence[Markup], *, css: str | None = None) -> Markup:
    return tag("div", tag("table", head, tag("tbody", *body), class_=css), class_="scroll")
