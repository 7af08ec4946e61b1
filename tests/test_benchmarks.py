"""Benchmarks run at tiny sizes, leave complete lines, and compare what computes the same. Times are not judged."""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import re
import time
from types import SimpleNamespace

import pytest
import torch.multiprocessing
from harness import PRELOADED, shm_problem

from benchmarks import deepspeed_layer, dispatch_combine, machine, ranks, records, run, table, telemetry, timing

RUN_FIELDS = {
    "benchmark",
    "nice",
    "others_cpu",
    "run",
    "git_sha",
    "git_dirty",
    "cpu",
    "cores",
    "load_1m",
    "python",
    "torch",
}
TIME_FIELDS = {
    "num_rounds",
    "median_ms",
    "min_ms",
    "p10_ms",
    "p90_ms",
    "rank_median_ms",
    "cpu_median_ms",
    "page_faults",
}
VARIANT_FIELDS = {"config", "variant"} | TIME_FIELDS
README = f"# Title\n\n{table.BEGIN}\nold\n{table.END}\n\nmore\n"

needs_core = pytest.mark.skipif(bool(shm_problem()), reason=shm_problem() or "-")


@pytest.fixture
def forked_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks come from the server of other tests, which has DeepSpeed imported; benchmarks themselves spawn them."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    start = functools.partial(torch.multiprocessing.start_processes, start_method="forkserver")
    monkeypatch.setattr(ranks, "mp", SimpleNamespace(spawn=start))


def tiny_dispatch_combine(path: pathlib.Path) -> list[records.Record]:
    case = dispatch_combine.Case(num_ranks=2, num_tokens=40, hidden=8, num_topk=3, num_experts=8)
    return dispatch_combine.run_cases([case], num_rounds=2, options=run.RunOptions(out=path))


def tiny_layer(path: pathlib.Path) -> list[records.Record]:
    case = deepspeed_layer.Case(num_ranks=2, num_tokens=64, hidden=16, num_experts=4)
    return deepspeed_layer.run_cases([case], num_rounds=2, options=run.RunOptions(out=path))


@needs_core
def test_dispatch_combine_lines(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.jsonl"
    found = tiny_dispatch_combine(path)
    assert [json.loads(line) for line in path.read_text().splitlines()] == found
    assert len(found) == 14
    for record in found:
        assert record.keys() == RUN_FIELDS | VARIANT_FIELDS | {"kind", "rows", "bytes", "max_error"}
        assert record["p10_ms"] <= record["median_ms"] <= record["p90_ms"]
        assert record["bytes"] > 0
    # What is compared gives the same sums, small integers times the inputs up to the order of addition.
    errors = {record["variant"]: record["max_error"] for record in found}
    assert {name for name, error in errors.items() if error is None} == {
        f"{name}, {rows}"
        for rows in ("pairs", "routes")
        for name in ("gloo all-to-all-v alone", "memcpy to ready memory", "memcpy to fresh memory")
    }
    assert max(error for error in errors.values() if error is not None) < 1e-5
    moved = {(record["kind"], record["rows"]): record["bytes"] for record in found}
    assert moved["core", "pairs"] == moved["gloo", "pairs"] < moved["core", "routes"] == moved["gloo", "routes"]
    assert "core, expert-major exact" in capsys.readouterr().out
    assert dispatch_combine.summary_table(found).count("\n") == 1 + 5


@needs_core
def test_deepspeed_layer_lines(tmp_path: pathlib.Path, forked_ranks: None) -> None:
    path = tmp_path / "results.jsonl"
    found = tiny_layer(path)
    assert [json.loads(line) for line in path.read_text().splitlines()] == found
    by_name = {record["variant"]: record for record in found}
    assert list(by_name) == ["stock", "padded, exact", "padded, fast", "compact, exact", "compact, fast"]
    for name, record in by_name.items():
        assert record.keys() == RUN_FIELDS | VARIANT_FIELDS | {"parts", "aligned_parts", "bytes", "max_difference"}
        assert record["aligned_parts"].keys() == record["parts"].keys()
        for part in ("gate", "experts", "dispatch_forward", "combine_forward", "combine_backward", "dispatch_backward"):
            assert record["parts"][part] > 0 and record["aligned_parts"][part] > 0, (name, part)
        assert (record["bytes"] > 0) == (name != "stock")
        assert record["max_difference"] < 1e-5
    assert by_name["padded, exact"]["max_difference"] == 0.0
    assert deepspeed_layer.summary_table(found).count("\n") == 1 + 4


def timing_of(name: str) -> timing.Timing:
    values = [float(value) for value in range(1, 12)]
    return timing.Timing(
        name=name, span_ms=values, rank_ms=values, cpu_ms=values, page_faults=values, parts={"gate": values}
    )


def test_summary_of_a_timing() -> None:
    record = records.summarise(timing_of("a"))
    assert (record["median_ms"], record["p10_ms"], record["p90_ms"], record["num_rounds"]) == (6.0, 2.0, 10.0, 11)
    assert record["parts"] == {"gate": 6.0}


def test_newest_lines_of_each_case_are_shown(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "results.jsonl"
    assert records.latest(path) == []
    first, second = {"num_ranks": 2}, {"num_ranks": 4}
    records.append(
        path, [{"run": "08:00", "config": first, "value": 1}, {"run": "08:01", "config": second, "value": 2}]
    )
    records.append(path, [{"run": "09:00", "config": first, "value": value} for value in (3, 4)])
    assert [record["value"] for record in records.latest(path)] == [3, 4, 2]


def test_each_number_of_sms_is_shown_from_its_newest_run(tmp_path: pathlib.Path) -> None:
    path, case = tmp_path / "results.jsonl", {"config": {"num_ranks": 2}}
    lines = [("08:00", 8, 1), ("08:00", 24, 2), ("08:00", None, 3), ("09:00", 24, 4), ("09:00", None, 5)]
    records.append(path, [case | {"run": run, "num_sms": sms, "value": value} for run, sms, value in lines])
    assert [record["value"] for record in records.latest(path)] == [1, 4, 5]


def test_time_of_this_process_is_not_of_others() -> None:
    watch, begin = machine.OthersWatch(), time.monotonic()
    end = time.process_time() + 0.5
    while time.process_time() < end:
        pass
    all_s = (time.monotonic() - begin) * (os.cpu_count() or 1)
    assert watch.share() <= 1 - 0.4 / all_s


def test_waiting_for_a_quiet_machine_ends() -> None:
    start = time.monotonic()
    machine.wait_until_quiet(0.5)
    assert time.monotonic() - start < 10


def layer_records() -> list[records.Record]:
    facts = records.run_facts() | {"benchmark": "deepspeed_layer", "others_cpu": 0.02}
    config = {"num_ranks": 2, "k": 2, "num_experts": 8, "num_tokens": 64, "hidden": 16, "capacity_factor": 1.25}
    parts = {"gate": 1.0, "experts": 2.0, "communication": 3.0, "communication_cpu": 2.5}
    variant = {"config": config, "median_ms": 6.0, "p10_ms": 5.0, "p90_ms": 7.0, "parts": parts, "aligned_parts": parts}
    return [facts | variant | {"variant": name} for name in ("stock", "padded, exact")]


def test_table_fills_the_readme_and_draws(tmp_path: pathlib.Path) -> None:
    readme, results = tmp_path / "README.md", tmp_path / "results"
    readme.write_text(README)
    records.append(results / "deepspeed_layer.jsonl", layer_records())
    arguments = ["--results", str(results), "--readme", str(readme)]
    assert table.main([*arguments, "--check"]) == 1
    assert readme.read_text() == README
    assert table.main(arguments) == 0
    text = readme.read_text()
    assert text.startswith("# Title\n\n<!-- results:begin -->\n") and text.endswith("<!-- results:end -->\n\nmore\n")
    assert "padded, exact" in text and "**1.00×**" in text and "old" not in text
    assert f"commit `{records.run_facts()['git_sha']}`" in text
    assert (tmp_path / "docs/images/deepspeed_layer.png").read_bytes().startswith(b"\x89PNG")
    assert "padded, exact" in (results / "README.md").read_text()
    assert table.main([*arguments, "--check"]) == 0


def test_table_says_where_it_wants_markers(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("no markers")
    assert table.main(["--results", str(tmp_path), "--readme", str(readme)]) == 2
    assert "results:begin" in capsys.readouterr().err
    assert readme.read_text() == "no markers"


def test_recovery_reads_what_a_run_prints() -> None:
    recovery = pytest.importorskip("benchmarks.recovery", reason="needs the packages of train")
    times = {"fault": 100.0, "worker_started": 103.0, "worker_entered": 110.0, "first_step_began": 112.0}
    result = {"recoveries": [{"kind": kind, **times, "first_step_done": 112.5} for kind in ("kill", "hang")]}
    report = {"attempt": 2, "cause": "late", "rank": 1, "time_s": 104.25}
    text = "\n".join(
        [
            f"\x1b[36m(TrainController pid=7)\x1b[0m RAY_DEEPEP_FAULT {json.dumps(report)}",
            f"TRAIN_RESULT {json.dumps(result)}",
        ]
    )
    kill, hang = recovery.recoveries(text)
    assert kill["cause"] == "" and math.isnan(kill["report_s"]), "a fault that nobody reported is no success"
    assert (hang["cause"], hang["named_rank"], hang["report_s"], hang["training_again_s"]) == ("late", 1, 4.25, 12.5)
    config = {"num_workers": 2, "transport": "shm", "deadline_s": 4.0, "timeout_s": 1.0, "kind": "hang"}
    row = recovery.table([hang | {"config": config}]).splitlines()[-1]
    assert row.replace(" ", "") == "|hang|2×CPU|late|4.2|0.2|12.5|3.0|7.0|2.5|"


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_recovery_on_whole_gpus_is_the_case_it_was(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    """Lines of before workers could share a GPU are replaced by newer ones, not shown beside them."""
    recovery = pytest.importorskip("benchmarks.recovery", reason="needs the packages of train")
    setup = recovery.Setup(num_workers=2, transport="cuda", deadline_s=4.0, timeout_s=1.0, gpus_per_worker=share)
    times = {
        "fault": 1.0,
        "worker_started": 3.0,
        "worker_entered": 4.0,
        "first_step_began": 5.0,
        "first_step_done": 6.0,
    }
    text = f"TRAIN_RESULT {json.dumps({'recoveries': [{'kind': 'kill', **times}]})}"
    monkeypatch.setattr(recovery, "train", lambda *_: text)
    monkeypatch.setattr(recovery, "gpu_facts", lambda: {"gpu": "NVIDIA H200", "gpus": 2})
    (line,) = recovery.measure(["kill"], setup)
    before = {"num_workers": 2, "transport": "cuda", "deadline_s": 4.0, "kind": "kill"}
    assert line["config"] == (before if share == 1 else before | {"gpus_per_worker": 0.5})
    assert ("| 2 × GPU |" if share == 1 else "| 2 × 0.5 GPU |") in recovery.table([line])


def test_recovery_that_can_measure_nothing_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    recovery = pytest.importorskip("benchmarks.recovery", reason="needs the packages of train")
    assert recovery.main(["--kinds", "assert"]) == 2
    told = capsys.readouterr()
    assert "assert is left out: it needs a GPU" in told.out and "no fault is left to measure" in told.err
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            recovery.parse(["--transport", "cuda"])
        assert "--transport: cuda needs a GPU, and torch sees none" in capsys.readouterr().err


def test_recovery_says_what_it_leaves_out() -> None:
    recovery = pytest.importorskip("benchmarks.recovery", reason="needs the packages of train")
    left_out = {}
    for transport, num_workers in (("shm", 2), ("cuda", 2), ("shm", 1)):
        setup = recovery.Setup(num_workers=num_workers, transport=transport, deadline_s=4.0, timeout_s=1.0)
        left_out[transport, num_workers] = [kind for kind in recovery.KINDS if recovery.why_not(kind, setup)]
    assert left_out == {("shm", 2): ["assert"], ("cuda", 2): ["node"], ("shm", 1): ["hang", "assert"]}


def test_start_adds_up_what_jobs_tell(capsys: pytest.CaptureFixture[str]) -> None:
    start = pytest.importorskip("benchmarks.start", reason="needs the packages of train")
    names = ("submitted", "driver_started", "driver_imported", "ray_connected", "worker_started", "worker_entered")
    names += ("first_step_began", "first_step_done")
    moments = [
        dict(zip(names, itertools.accumulate((100.0, 1.0, 2.0, 0.5, scale * 4.0, 3.0, 2.0, 0.25))))
        for scale in (1, 2, 4)
    ]
    record = start.summarise("further jobs", [start.StartTimes(**each) for each in moments])
    assert (record["median_s"], record["min_s"], record["max_s"]) == (16.75, 12.75, 24.75)
    assert sum(record["parts"].values()) == record["median_s"], "only one part differs"
    configs = [{}, {"gpus_per_worker": 1.0}, {"gpus_per_worker": 0.5}]
    records = [record | {"config": {"workers": 2, "preset": "tiny"} | config} for config in configs]
    rows = [row.replace(" ", "") for row in start.table(records).splitlines()[2:]]
    for row, workers in zip(rows, ("2×CPU", "2×GPU", "2×0.5GPU"), strict=True):
        assert row == f"|furtherjobs|{workers}|3|**16.8**|12.8–24.8|1.0|2.5|8.0|3.0|2.2|"
    with pytest.raises(SystemExit):
        start.parse(["--rounds", "0"])
    assert "--rounds: must be at least 1, got 0" in capsys.readouterr().err


@needs_core
def test_telemetry_lines(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], forked_ranks: None) -> None:
    path = tmp_path / "results.jsonl"
    telemetry.main(["--preset", "tiny", "--steps", "7", "--rounds", "1", "--out", str(path)])
    without, with_it = [json.loads(line) for line in path.read_text().splitlines()]
    assert (without["variant"], with_it["variant"]) == ("without", "with")
    assert {"config", "step_ms", "step_us", "thread_us", "share"} | RUN_FIELDS <= set(with_it)
    assert without["step_us"] == without["thread_us"] == 0 < min(with_it["step_us"], with_it["thread_us"])
    assert "| share of a step |" in capsys.readouterr().out


def test_the_script_of_all_figures_asks_for_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    """``benchmarks/gpu.sh``: every module and option of its parts exists, and each part is listed."""
    pytest.importorskip("ray", reason="a part of it is train.demo")
    lines = (records.ROOT / "benchmarks" / "gpu.sh").read_text().splitlines()
    calls = [found.split() for line in lines for found in re.findall(r"\bpart \d+ -m ([^;]+)", line)]
    assert len(calls) >= 10
    for module, *words in calls:
        with pytest.raises(SystemExit):
            importlib.import_module(module).main(["--help"])
        known = capsys.readouterr().out
        assert all(f"{word} " in known or f"{word}\n" in known for word in words if word.startswith("--")), words
    named = {line.partition("(")[0] for line in lines if re.match(r"\w+\(\) \{", line)} - {"part"}
    (listed,) = (line for line in lines if line.startswith("parts=("))
    assert named == set(listed.removeprefix("parts=(").removesuffix(")").split())
