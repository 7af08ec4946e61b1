"""An elastic run on a Ray of several nodes: a node is lost, the run goes on smaller, and grows with a new one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="ray_deepep.cluster needs Ray")

from cluster_cases import ROOT
from ray.cluster_utils import Cluster
from train_cases import losses, tiny, train_until

from train.errors import DataError
from train.metrics import StepMetrics, read_metrics

pytestmark = pytest.mark.xdist_group("ray")

# Steps of about a tenth of a second, so that few pass while Ray starts workers: differences of rounding grow with each.
FIELDS = {"optim.micro_batch": 32, "optim.lr": 1e-3, "optim.warmup_steps": 50, "run.steps": 5000, "run.eval_every": 0}
DEADLINE_S = 300.0


class ElasticRun:
    """`python -m train.ray_main --workers 1:2` on a cluster, watched through the files in its folder."""

    def __init__(self, address: str, out: Path, log: Path) -> None:
        self.out, self.log = out, log
        command = [sys.executable, "-m", "train.ray_main", "--preset", "tiny", "--backend", "ray_deepep"]
        command += ["--workers", "1:2", "--resize-check", "1", "--out", str(out), "--no-progress", "--set"]
        command += [f"{name}={value}" for name, value in FIELDS.items()]
        command += ["run.checkpoint_every=4", "run.device=cpu"]
        with open(log, "w") as file:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=os.environ | {"RAY_ADDRESS": address}, stdout=file, stderr=subprocess.STDOUT
            )

    def steps(self) -> list[StepMetrics]:
        """What is written so far."""
        path = self.out / "metrics.jsonl"
        try:
            return read_metrics(path) if path.is_file() else []
        except DataError:  # a line that is being written
            return []

    def wait_until(self, what: str, reached) -> None:
        """Until `reached(steps)`."""
        end = time.monotonic() + DEADLINE_S
        while not reached(self.steps()):
            assert self.process.poll() is None, f"ended before {what}:\n{self.text()[-3000:]}"
            assert time.monotonic() < end, f"no {what} within {DEADLINE_S:g} s:\n{self.text()[-3000:]}"
            time.sleep(0.2)

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def lines(self, word: str) -> list[str]:
        return [line[line.index(word) :] for line in self.text().splitlines() if word in line]


@pytest.fixture
def cluster():
    """Two nodes with room for one worker each."""
    with tempfile.TemporaryDirectory(prefix="rd") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        patch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        patch.setenv("RAY_TRAIN_ENABLE_STATE_TRACKING", "0")
        cluster = Cluster()
        try:
            settings = {"prestart_worker_first_driver": False}
            cluster.add_node(num_cpus=1, include_dashboard=False, _system_config=settings)
            yield cluster
        finally:
            cluster.shutdown()


@pytest.mark.slow
def test_a_run_goes_on_smaller_and_grows_back(cluster, ranks, tmp_path):
    doomed = cluster.add_node(num_cpus=1)
    run = ElasticRun(cluster.address, tmp_path / "run", tmp_path / "log")
    try:
        run.wait_until("steps of two workers", lambda steps: len(steps) > 5)
        cluster.remove_node(doomed, allow_graceful=False)
        run.wait_until("a step of one worker", lambda steps: steps and steps[-1].world_size == 1)
        cluster.add_node(num_cpus=1)
        run.wait_until("steps of two workers again", lambda steps: [step.world_size for step in steps[-2:]] == [2, 2])
        run.process.send_signal(signal.SIGTERM)
        assert run.process.wait(DEADLINE_S) == 128 + signal.SIGTERM, run.text()[-3000:]
    finally:
        run.process.kill()
        run.process.wait()
    assert run.lines("attempt ") == [
        "attempt 1 begins with 2 workers",
        "attempt 2 begins with 1 worker",
        "attempt 3 begins with 2 workers",
    ]
    assert run.lines("elastic: ") == [
        "elastic: workers 2, EP degree 2",
        "elastic: workers 1, EP degree 1",
        "elastic: room for 2 workers instead of 1; asking for a checkpoint",
        "elastic: workers 2, EP degree 2",
    ]
    steps = run.steps()
    assert [step.step for step in steps] == list(range(1, len(steps) + 1))
    sizes = [step.world_size for step in steps]
    assert sizes == [2] * sizes.index(1) + [1] * sizes.count(1) + [2] * (len(sizes) - sizes.index(1) - sizes.count(1))
    starts = [json.loads(line) for line in (run.out / "starts.jsonl").read_text().splitlines()]
    assert [start["environment"]["EP size"] for start in starts] == [2, 1, 2]
    # The lost node costs the steps since the last checkpoint and one fault; growing costs neither.
    (fault,) = (json.loads(line) for line in (run.out / "faults.jsonl").read_text().splitlines())
    assert (fault["cause"], fault["attempt"], fault["node_id"]) == ("node_died", 1, doomed.node_id)
    assert starts[1]["step"] % 4 == 0
    before_third = run.text().partition("attempt 3 begins")[0]
    saved = [line for line in before_third.splitlines() if "checkpoint after step" in line][-1]
    assert f"checkpoint after step {starts[2]['step']}: " in saved
    # As if nothing had been, up to the order of sums.
    whole = tiny(tmp_path / "whole", **FIELDS, **{"run.checkpoint_every": 0, "run.num_shares": 2})
    ranks.run(2, train_until, whole.to_json(), 0, len(steps), deadline_s=DEADLINE_S)
    for ours, theirs in zip(losses(run.out), losses(tmp_path / "whole"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
