"""The Grafana board: complete, and put where Grafana looks. That its queries return data is in test_jobs_ray.py."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from ray_deepep.cli import main
from ray_deepep.dashboard import ANNOTATIONS, FILE, PANELS, board
from ray_deepep.step_telemetry import comm_fields
from ray_deepep.telemetry import CommStats

ROOT = Path(__file__).parents[1]


def test_board_is_complete():
    found = json.loads(json.dumps(board()))
    assert len(found["panels"]) == len(PANELS)
    assert len({panel["title"] for panel in found["panels"]}) == len(PANELS)
    places = [tuple(panel["gridPos"][key] for key in "xy") for panel in found["panels"]]
    assert len(set(places)) == len(places)
    for panel in found["panels"]:
        assert panel["targets"] and panel["description"]
    assert [annotation["enable"] for annotation in found["annotations"]["list"]] == [True, True]


def test_queries_ask_for_metrics_that_exist():
    """By the names in the sources that set them."""
    sources = "".join((ROOT / "ray_deepep/cluster" / name).read_text() for name in ("metrics.py", "supervision.py"))
    for query in [query for panel in PANELS for query in panel.queries] + list(ANNOTATIONS):
        names = re.findall(r"ray_deepep_(\w+?)(?:_total)?\{", query.expr)
        assert names, query.expr
        for name in names:
            assert re.search(rf'["}}]{name}"', sources), name


def test_install(tmp_path, capsys):
    folder = tmp_path / "metrics/grafana/dashboards"
    folder.mkdir(parents=True)
    assert main(["dashboard", "install", "--session", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{folder / FILE}\n"
    assert json.loads((folder / FILE).read_text()) == board()
    assert [path.name for path in folder.iterdir()] == [FILE]
    assert main(["dashboard", "show"]) == 0
    assert json.loads(capsys.readouterr().out) == board()


def test_install_where_no_head_runs(tmp_path, capsys):
    assert main(["dashboard", "install", "--session", str(tmp_path)]) == 2
    assert "session: must be the session folder of a head node" in capsys.readouterr().err


def test_metrics_of_a_record(monkeypatch):
    """Counters add up over all records of a batch, gauges show the last; what was not measured is not set."""
    pytest.importorskip("ray", reason="Ray's metrics need Ray")
    from ray_deepep.cluster import metrics

    told: dict[tuple, float] = {}

    class Fake:
        def __init__(self, name, description, tag_keys):
            self.name, self.tag_keys = name, tag_keys

        def set(self, value, tags):
            assert set(tags) == set(self.tag_keys)
            told[self.name, *list(tags.values())[2:]] = value

        def inc(self, value, tags):
            assert set(tags) == set(self.tag_keys) and value > 0
            key = self.name, *list(tags.values())[2:]
            told[key] = told.get(key, 0) + value

    monkeypatch.setattr(metrics, "Gauge", Fake)
    monkeypatch.setattr(metrics, "Counter", Fake)
    sink = metrics.RayMetricsSink(run="r", rank=3, ranks=(2, 3))
    comm = CommStats(
        num_dispatch=2,
        num_combine=2,
        dispatch_ms=4.0,
        wait_ns=(5000, 0),
        recv_bytes=(10, 20),
        num_tokens_per_expert=(3, 1),
        num_dropped=4,
        heap_bytes=64,
    )
    records = [{"step": step, "loss": 3.0 - step, "step_ms": 7.0} | comm_fields(comm) for step in (1, 2)]
    sink.write(records)
    sink.close()
    assert told["deepep_loss",] == 1.0 and told["deepep_step_part_ms", "step"] == 7.0
    assert told["deepep_expert_tokens", "2"] == 3 and told["deepep_expert_tokens", "3"] == 1
    assert told["deepep_wait_us", "2"] == 10.0 and ("deepep_wait_us", "3") not in told
    assert (told["deepep_recv_bytes", "2"], told["deepep_recv_bytes", "3"]) == (20, 40)
    assert told["deepep_dropped_tokens",] == 8 and told["deepep_comm_calls", "dispatch"] == 4
    assert told["deepep_comm_us", "dispatch"] == 2000.0
    assert ("deepep_comm_gb_per_s", "dispatch") not in told and ("deepep_restarts",) not in told
