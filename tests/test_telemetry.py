"""Numbers of steps: what is counted, what becomes of it, and that training never waits for it."""

from __future__ import annotations

import builtins
import json
import pickle
import sys
import threading
import time
from pathlib import Path

import pytest
from harness import shm_problem
from train_cases import tiny, train

from ray_deepep.errors import InvalidArgumentError, MissingPackageError
from ray_deepep.step_telemetry import JsonLinesSink, StepTelemetry, TensorBoardSink, comm_fields
from ray_deepep.telemetry import CommRecorder, CommStats, TransportCounters, add_counts
from train.config import RunConfig
from train.errors import ConfigError
from train.telemetry import TelemetryOptions, open_telemetry

COUNTERS = TransportCounters(wait_ns=(0, 5000), recv_bytes=(100, 200), heap_bytes=4096)


class ListSink:
    """Keeps what it gets."""

    def __init__(self) -> None:
        self.records: list[dict] = []
        self.closed = False

    def write(self, records) -> None:
        self.records += records

    def close(self) -> None:
        self.closed = True


class BrokenSink(ListSink):
    def write(self, records) -> None:
        raise OSError("disk full")


class StuckSink(ListSink):
    """Holds the flushing thread until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()

    def write(self, records) -> None:
        self.go.wait(30)
        super().write(records)


def test_counters_are_differences_since_the_last_reset():
    recorder = CommRecorder()
    recorder.add("dispatch", recorder.begin(), 1000)
    recorder.add_routes((3, 1), 2)
    first = recorder.stats(COUNTERS, reset=True)
    assert (first.wait_ns, first.recv_bytes, first.heap_bytes) == ((0, 5000), (100, 200), 4096)
    assert (first.num_tokens_per_expert, first.num_dropped) == ((3, 1), 2)
    later = TransportCounters(wait_ns=(7, 5000), recv_bytes=(110, 260), heap_bytes=8192)
    second = recorder.stats(later)
    assert (second.wait_ns, second.recv_bytes, second.heap_bytes) == ((7, 0), (10, 60), 8192)
    assert (second.num_dispatch, second.num_tokens_per_expert, second.num_dropped) == (0, None, None)


def test_sums_know_what_nobody_measured():
    measured = CommStats(num_dispatch=1, wait_ns=(1, 2), num_dropped=0, heap_bytes=5)
    total = measured + CommStats(num_dispatch=2, timed=False)
    assert (total.num_dispatch, total.wait_ns, total.recv_bytes) == (3, (1, 2), None)
    assert (total.num_dropped, total.heap_bytes, total.timed) == (0, 5, False)
    assert add_counts((1, 2), (1, 2, 3)) == (2, 4, 3)
    assert add_counts(None, None) is None


def test_fields_of_a_record_are_those_that_were_measured():
    stats = CommStats(
        num_dispatch=2,
        num_combine=1,
        dispatch_ms=4.0,
        combine_ms=1.0,
        dispatch_bytes=8_000_000,
        combine_bytes=0,
        wait_ns=(0, 1500),
        recv_bytes=(1, 2),
        num_tokens_per_expert=(3, 1),
        num_dropped=0,
        heap_bytes=64,
    )
    found = comm_fields(stats)
    assert (found["dispatch_us"], found["dispatch_gb_per_s"], found["combine_us"]) == (2000.0, 2.0, 1000.0)
    assert "combine_gb_per_s" not in found, "no bytes were counted"
    assert (found["wait_us"], found["imbalance"], found["num_dropped"]) == ([0.0, 1.5], 1.5, 0)
    gpu = comm_fields(CommStats(num_dispatch=2, dispatch_ms=4.0, dispatch_bytes=8, timed=False))
    assert gpu == {"num_dispatch": 2, "num_combine": 0}
    assert comm_fields(None) == {}


def test_records_reach_all_sinks_and_one_that_breaks_is_left_out(tmp_path, caplog):
    good = ListSink()
    path = tmp_path / "deep" / "rank_00000.jsonl"
    with StepTelemetry([BrokenSink(), good, JsonLinesSink(path)], always={"rank": 0}, flush_every_s=0.01) as telemetry:
        telemetry.record(1, {"loss": 2.5}, CommStats(num_dispatch=1))
        end = time.monotonic() + 10
        while not good.records and time.monotonic() < end:
            time.sleep(0.01)
        telemetry.record(2, {"loss": 2.25, "step_ms": 1.23456789})
    assert [(r["step"], r["rank"], r["loss"]) for r in good.records] == [(1, 0, 2.5), (2, 0, 2.25)]
    assert good.closed
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[1]["step_ms"] == 1.23457 and lines[0]["num_dispatch"] == 1
    assert caplog.text.count("BrokenSink is left out from now on: OSError: disk full") == 1


def test_a_sink_that_hangs_costs_records_and_no_time(monkeypatch):
    from ray_deepep import step_telemetry

    monkeypatch.setattr(step_telemetry, "_MAX_WAITING", 3)
    stuck = StuckSink()
    telemetry = StepTelemetry([stuck], flush_every_s=0.01)
    telemetry.record(1, {})
    time.sleep(0.2)  # the thread is in the sink now, with step 1
    for step in range(2, 9):
        telemetry.record(step, {})
    assert telemetry.num_lost == 4
    stuck.go.set()
    telemetry.close()
    assert [record["step"] for record in stuck.records] == [1, 2, 3, 4]


def test_bad_input():
    with pytest.raises(InvalidArgumentError, match="flush_every_s: must be > 0"):
        StepTelemetry([], flush_every_s=0)


def test_tensorboard_that_is_not_installed(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "tensorboard":
            raise ModuleNotFoundError("No module named 'tensorboard'")
        return real(name, *args, **kwargs)

    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingPackageError, match="TensorBoard files need the package tensorboard: pip install"):
        TensorBoardSink(tmp_path)
    with pytest.raises(ConfigError, match=r"run\.tensorboard = True: TensorBoard files need the package"):
        open_telemetry(RunConfig(out_dir=str(tmp_path), tensorboard=True), 0, TelemetryOptions())
    error = MissingPackageError("tensorboard", "TensorBoard files", "why")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_tensorboard_files(tmp_path):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with StepTelemetry([TensorBoardSink(tmp_path)]) as telemetry:
        telemetry.record(7, {"loss": 2.5}, CommStats(wait_ns=(0, 3000)))
    found = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in found.Scalars("loss")] == [(7, 2.5)]
    assert [e.value for e in found.Scalars("wait_us/1")] == [3.0]


def test_a_run_without_telemetry_writes_none(tmp_path):
    assert open_telemetry(RunConfig(out_dir=str(tmp_path), telemetry=False), 0, TelemetryOptions()) is None
    assert list(tmp_path.iterdir()) == []


# On ranks


def count_exchanges(context, transport: str):
    """A dispatch and an exact combine on two ranks; rank 1 comes late. Returns the counters."""
    import torch

    from ray_deepep import ExpertMajor

    buffer = context.buffer(transport, num_experts=4, hidden=8, num_topk=2, max_tokens=16)
    buffer.stats(reset=True)
    # Of three tokens: the first to experts 0 and 1 (rank 0), the second to 1 and 2, the third to 3 alone.
    topk_idx = torch.tensor([[0, 1], [1, 2], [3, -1]])
    if context.rank == 1:
        time.sleep(0.2)
    arrived = buffer.dispatch(torch.ones(3, 8), topk_idx, layout=ExpertMajor())
    buffer.combine(arrived.x, arrived.handle, reduce="exact")
    return buffer.stats(reset=True), buffer.stats()


def test_what_ranks_count(ranks, transport):
    for rank, (stats, after) in enumerate(ranks.run(2, count_exchanges, transport)):
        assert (stats.num_dispatch, stats.num_combine, after.num_dispatch) == (1, 1, 0)
        assert stats.num_tokens_per_expert == ((2, 4) if rank == 0 else (2, 2))
        assert stats.num_dropped == 1
        if transport != "shm":
            assert (stats.wait_ns, stats.recv_bytes, stats.heap_bytes) == (None, None, None)
            continue
        row = 8 * 4
        # Both ranks send two tokens to either rank; routes come back one by one: 3 from rank 0, 2 from rank 1.
        assert stats.recv_bytes == ((2 + 3) * row, (2 + 2) * row)
        assert after.recv_bytes == (0, 0)
        assert stats.wait_ns[rank] == 0
        late = stats.wait_ns[1 - rank]
        assert late > 0.15e9 if rank == 0 else late < 0.15e9
        assert stats.heap_bytes == after.heap_bytes >= 2 * 3 * row


@pytest.mark.parametrize("backend", ["stock", "ray_deepep"])
def test_a_run_writes_a_line_per_step_and_rank(ranks, tmp_path, backend):
    if backend == "ray_deepep" and shm_problem():
        pytest.skip(shm_problem())
    fields = {"run.steps": 3, "run.checkpoint_every": 0, "run.sample_tokens": 0, "run.backend": backend}
    ranks.run(2, train, tiny(tmp_path / "run", **fields).to_json(), deadline_s=120)
    for rank in range(2):
        lines = read(tmp_path / "run" / "telemetry" / f"rank_{rank:05d}.jsonl")
        assert [(line["step"], line["rank"], line["restarts"]) for line in lines] == [(n, rank, 0) for n in (1, 2, 3)]
        for line in lines:
            assert line["forward_ms"] + line["backward_ms"] + line["optimizer_ms"] <= line["step_ms"] * 1.001
            assert line["num_dispatch"] == line["num_combine"] == 4
            assert line["dispatch_us"] > 0 and line["combine_us"] > 0
            measured = {"recv_bytes", "wait_us", "num_tokens_per_expert", "imbalance", "num_dropped", "heap_bytes"}
            assert measured & set(line) == (measured if backend == "ray_deepep" else set())
        if backend == "ray_deepep":
            # Two layers of top-2; what the gate did not drop has arrived somewhere.
            other = read(tmp_path / "run" / "telemetry" / f"rank_{1 - rank:05d}.jsonl")
            for ours, theirs in zip(lines, other):
                arrived = sum(ours["num_tokens_per_expert"]) + sum(theirs["num_tokens_per_expert"])
                assert arrived + ours["num_dropped"] + theirs["num_dropped"] == 2 * 2 * (4 * 32) * 2


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
