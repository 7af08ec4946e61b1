"""Metrics files, statistics, the comparison of two runs and its plot."""

import dataclasses
import json
import math

import pytest

from train.errors import DataError
from train.metrics import MetricsWriter, StepMetrics, read_metrics, run_stats, truncate_metrics
from train.plots import plot_losses
from train.report import compare_runs, main

PNG = b"\x89PNG\r\n\x1a\n"


def metrics(step, *, step_ms=100.0, comm_ms=10.0, val_loss=None, memory_bytes=None):
    return StepMetrics(
        step=step,
        loss=5.0 / step,
        aux_loss=1.0,
        lr=1e-3,
        tokens_per_s=1e5 / step_ms,
        step_ms=step_ms,
        forward_ms=40.0,
        backward_ms=50.0,
        optimizer_ms=5.0,
        dispatch_ms=comm_ms / 2,
        combine_ms=comm_ms / 2,
        comm_calls=8.0,
        val_loss=val_loss,
        memory_bytes=memory_bytes,
    )


def write(path, steps):
    writer = MetricsWriter(path)
    for step in steps:
        writer.write(step)
    writer.close()


def test_each_line_is_on_disk_before_the_writer_closes(tmp_path):
    path = tmp_path / "m.jsonl"
    writer = MetricsWriter(path)
    writer.write(metrics(1, val_loss=2.5))
    assert json.loads(path.read_text())["val_loss"] == 2.5
    writer.write(metrics(2))
    assert read_metrics(path) == [metrics(1, val_loss=2.5), metrics(2)]
    writer.close()


def test_truncation_leaves_no_step_twice(tmp_path):
    path = tmp_path / "m.jsonl"
    write(path, [metrics(s) for s in range(1, 8)])
    with open(path, "a") as file:
        file.write('{"step": 8, "lo')
    assert [m.step for m in truncate_metrics(path, 4)] == [1, 2, 3, 4]
    write(path, [metrics(5)])
    assert [m.step for m in read_metrics(path)] == [1, 2, 3, 4, 5]


def test_bad_line_in_the_middle_is_an_error(tmp_path):
    path = tmp_path / "m.jsonl"
    write(path, [metrics(1)])
    with open(path, "a") as file:
        file.write("oops\n")
    write(path, [metrics(2)])
    with pytest.raises(DataError, match=r"m\.jsonl: line 2 is no step record"):
        read_metrics(path)


def test_statistics_leave_out_the_first_steps():
    slow = [metrics(s, step_ms=1000.0) for s in (1, 2)]
    stats = run_stats(slow + [metrics(s, val_loss=3.0 if s == 4 else None) for s in (3, 4, 5)])
    assert (stats.num_steps, stats.first_loss, stats.last_loss, stats.val_loss) == (5, 5.0, 1.0, 3.0)
    assert (stats.step_ms, stats.comm_share, stats.tokens_per_s) == (100.0, 0.1, 1000.0)
    empty = run_stats([])
    assert empty.num_steps == 0 and math.isnan(empty.last_loss)


def test_comparison_table_and_plot(tmp_path, capsys):
    for name, comm_ms in (("stock", 40.0), ("ours", 10.0)):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "metrics.jsonl", [metrics(s, comm_ms=comm_ms, val_loss=1.0) for s in range(1, 6)])
    plot = tmp_path / "plots" / "both.png"
    table = compare_runs([tmp_path / "stock", tmp_path / "ours"], plot=plot)
    lines = {line[:28].strip(): line[28:].split() for line in table.splitlines()}
    assert lines["dispatch ms"] == ["20.00", "5.00", "4.00"]
    assert lines["share of dispatch + combine"] == ["40.0%", "10.0%", "4.00"]
    assert plot.read_bytes().startswith(PNG)
    assert main([str(tmp_path / "stock")]) == 0
    assert "stock" in capsys.readouterr().out
    assert main([str(tmp_path / "missing")]) == 2
    assert "holds no steps" in capsys.readouterr().err


def test_memory_is_the_most_of_all_steps(tmp_path, capsys):
    ours = [metrics(1), metrics(2, memory_bytes=3 * 10**9), metrics(3, memory_bytes=2 * 10**9)]
    assert run_stats(ours).memory_bytes == 3e9 and math.isnan(run_stats(ours[:1]).memory_bytes)
    for folder, steps in (("ours", ours), ("stock", [metrics(1, memory_bytes=4 * 10**9)]), ("old", [metrics(1)])):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "metrics.jsonl", steps)
    main([str(tmp_path / "ours"), str(tmp_path / "stock")])
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("memory of rank 0, GB"))
    assert line.split()[-3:] == ["3.00", "4.00", "0.75"]
    main([str(tmp_path / "old"), str(tmp_path / "old")])
    assert "\nmemory of" not in capsys.readouterr().out


def test_plot_without_validation(tmp_path):
    plot_losses({"a": [dataclasses.replace(metrics(s)) for s in (1, 2)]}, tmp_path / "p.png", title="t")
    assert (tmp_path / "p.png").read_bytes().startswith(PNG)
