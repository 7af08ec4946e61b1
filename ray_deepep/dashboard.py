"""A Grafana board for training runs: made here as JSON, put where the Grafana of a Ray head node looks for boards.

It asks for the metrics that ``ray_deepep.cluster.metrics`` and Ray's controller set. Ray's own panel helpers draw only
graphs, without heat maps or annotations, so none of them is used.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from .errors import InvalidArgumentError

UID = "ray-deepep"
FILE = "ray_deepep_grafana_dashboard.json"
_SESSION = "/tmp/ray/session_latest"
_BOARDS = Path("metrics", "grafana", "dashboards")
_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
_RUN = '{run=~"$run"}'
_WIDTH, _HEIGHT = 12, 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Query:
    """One line, or one family of lines, of a panel."""

    expr: str
    """In PromQL, with ``$run`` for the runs that are picked."""
    legend: str
    """In Grafana's braces."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Panel:
    """One picture."""

    title: str
    description: str
    queries: tuple[Query, ...]
    unit: str = "short"
    """Grafana's name of it."""
    kind: str = "timeseries"
    """``timeseries`` or ``status-history`` (a row of coloured cells for each line)."""


def _rate(counter: str, by: str, scale: str = "") -> str:
    return f"sum by ({by}) (rate(ray_deepep_{counter}_total{_RUN}[30s])){scale}"


def _gauge(name: str, more: str = "") -> str:
    inner = f'{{run=~"$run"{", " + more if more else ""}}}'
    return f"ray_deepep_{name}{inner}"


PANELS = (
    Panel(
        title="Throughput",
        description="Tokens of all ranks per second, as rank 0 measures it",
        queries=(Query(expr=_gauge("tokens_per_s", 'rank="0"'), legend="{{run}}"),),
    ),
    Panel(
        title="Loss",
        description="Cross-entropy per token, in nats",
        queries=(Query(expr=_gauge("loss", 'rank="0"'), legend="{{run}}"),),
    ),
    Panel(
        title="Step split",
        description="Where the time of a step goes, mean over ranks; dispatch and combine are in forward and backward",
        queries=(Query(expr=f"avg by (part) ({_gauge('step_part_ms')})", legend="{{part}}"),),
        unit="ms",
    ),
    Panel(
        title="Dispatch and combine",
        description="Mean time of a call, waits for peers included, by operation and rank",
        queries=(Query(expr=_gauge("comm_us"), legend="{{operation}}, rank {{rank}}"),),
        unit="µs",
    ),
    Panel(
        title="Rows moved",
        description="Rows received or given over the time of the calls",
        queries=(Query(expr=f"avg by (operation) ({_gauge('comm_gb_per_s')})", legend="{{operation}}"),),
        unit="GBs",
    ),
    Panel(
        title="Waits by peer",
        description="Share of its time that all other ranks together wait for this rank: the straggler is on top",
        queries=(Query(expr=_rate("wait_us", "peer", " / 1e6"), legend="for rank {{peer}}"),),
        unit="percentunit",
    ),
    Panel(
        title="Bytes by peer",
        description="Rows that each rank reads from each other",
        queries=(Query(expr=_rate("recv_bytes", "rank, peer"), legend="{{rank}} ← {{peer}}"),),
        unit="Bps",
    ),
    Panel(
        title="Expert load",
        description="Routes that reached each expert in the last step, all layers",
        queries=(Query(expr=f"sum by (expert) ({_gauge('expert_tokens')})", legend="{{expert}}"),),
        kind="status-history",
    ),
    Panel(
        title="Imbalance",
        description="Fullest expert over the mean of all",
        queries=(
            Query(
                expr="max by (run) ({0}) / avg by (run) ({0})".format(
                    f"sum by (run, expert) ({_gauge('expert_tokens')})"
                ),
                legend="{{run}}",
            ),
        ),
    ),
    Panel(
        title="Dropped tokens",
        description="Routes per second that gates dropped",
        queries=(Query(expr=_rate("dropped_tokens", "run"), legend="{{run}}"),),
    ),
    Panel(
        title="Heap",
        description="Bytes of each rank's heap in use",
        queries=(Query(expr=_gauge("heap_bytes"), legend="rank {{rank}}"),),
        unit="bytes",
    ),
    Panel(
        title="Restarts",
        description="Starts of the workers after the first",
        queries=(Query(expr=f"max by (run) ({_gauge('restarts')})", legend="{{run}}"),),
    ),
)

_FAULTS, _RESTARTS = f"ray_deepep_faults_total{_RUN}", f"max by (run) ({_gauge('restarts')})"
# A counter's first value is no increase to Prometheus, hence the first half.
ANNOTATIONS = (
    Query(
        expr=f"({_FAULTS} unless {_FAULTS} offset 30s) or (increase({_FAULTS}[30s]) > 0)",
        legend="fault: rank {{rank}} {{cause}}",
    ),
    # Whatever was 30 s ago, nothing included: workers may be away for longer.
    Query(
        expr=f"({_RESTARTS} > 0) unless ({_RESTARTS} == max by (run) ({_gauge('restarts')} offset 30s))",
        legend="restart of {{run}}",
    ),
)


def board() -> dict[str, Any]:
    """The board, as Grafana reads it."""
    return {
        "uid": UID,
        "title": "ray_deepep: expert-parallel training",
        "tags": ["ray", "ray_deepep"],
        "schemaVersion": 39,
        "refresh": "5s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": [_datasource(), _run_choice()]},
        "annotations": {"list": [_annotation(query) for query in ANNOTATIONS]},
        "panels": [_panel(number, panel) for number, panel in enumerate(PANELS)],
    }


def _datasource() -> dict[str, Any]:
    return {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus", "refresh": 1}


def _run_choice() -> dict[str, Any]:
    return {
        "name": "run",
        "label": "Run",
        "type": "query",
        "datasource": _DATASOURCE,
        "query": "label_values(ray_deepep_step, run)",
        "refresh": 2,
        "includeAll": True,
        "allValue": ".*",
        "multi": True,
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
    }


def _annotation(query: Query) -> dict[str, Any]:
    return {
        "name": query.legend.split(":")[0].split(" of ")[0],
        "datasource": _DATASOURCE,
        "enable": True,
        "expr": query.expr,
        "titleFormat": query.legend,
        "step": "5s",
        "iconColor": "red" if "fault" in query.legend else "blue",
    }


def _panel(number: int, panel: Panel) -> dict[str, Any]:
    targets = [
        {"refId": chr(ord("A") + index), "datasource": _DATASOURCE, "expr": query.expr, "legendFormat": query.legend}
        for index, query in enumerate(panel.queries)
    ]
    defaults: dict[str, Any] = {"unit": panel.unit}
    if panel.kind == "status-history":
        defaults["color"] = {"mode": "continuous-BlYlRd"}
    return {
        "id": number + 1,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": _DATASOURCE,
        "gridPos": {"x": number % 2 * _WIDTH, "y": number // 2 * _HEIGHT, "w": _WIDTH, "h": _HEIGHT},
        "targets": targets,
        "fieldConfig": {"defaults": defaults, "overrides": []},
    }


def install(session: str | Path = "") -> Path:
    """Write the board for the head node that runs here; returns the file. Grafana finds it within ten seconds.

    session: Ray's session folder; empty: the newest one of this machine.

    Raises:
        InvalidArgumentError: it is no session of a head node with its dashboard, or may not be written.
    """
    folder = Path(session or _SESSION) / _BOARDS
    if not folder.is_dir():
        rule = f"must be the session folder of a head node that runs with its dashboard (it has no {_BOARDS})"
        raise InvalidArgumentError("session", str(session or _SESSION), rule)
    target = folder / FILE
    temporary = target.with_suffix(f".{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(board(), indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, target)
    except OSError as error:
        raise InvalidArgumentError("session", str(session), f"must be writable ({error.strerror})") from error
    return target
