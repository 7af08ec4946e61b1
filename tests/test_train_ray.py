"""Training runs and examples on a real Ray, as users start them: faults, retries, and what they print."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="ray_deepep.cluster needs Ray")

import cluster_cases
from cluster_cases import Run, SharedMemoryWatch, attempt_details
from process_cases import wait_until_gone
from train_cases import losses, tiny, train

pytestmark = pytest.mark.xdist_group("ray")


@pytest.fixture(scope="module")
def cluster(connected_ray):
    return connected_ray


# Ray Train runs, as a user starts them


@pytest.fixture(scope="module")
def undisturbed(ranks, tmp_path_factory) -> Path:
    """The folder of the same run on two processes without Ray. Undisturbed runs on Ray: test_demo_ray.py."""
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    ranks.run(2, train, tiny(out, **{"run.backend": "ray_deepep"}).to_json(), deadline_s=120)
    return out


@pytest.fixture(scope="module")
def watch() -> Iterator[SharedMemoryWatch]:
    with SharedMemoryWatch() as watch:
        yield watch


@pytest.fixture(scope="module")
def failed(cluster, watch, tmp_path_factory) -> Run:
    """A run that outlives its first fault, before its first checkpoint, and not its second, after it. One that outlives
    SIGKILL is the example, one that outlives an exception is in test_jobs_ray.py."""
    faults = ("stop:rank=1,step=3", "hang:rank=1,step=6")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_DEEPEP_DEADLINE_S", "4")
        return Run(tmp_path_factory.mktemp("runs") / "failed", "--max-failures", "1", "--inject", *faults)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_faults_are_named_until_no_retry_is_left(cluster, failed):
    assert failed.status == 1
    assert failed.lines("error: training failed"), failed.text
    named = [(fault["attempt"], fault["rank"], fault["cause"]) for fault in failed.faults]
    assert named == [(1, 1, "stopped"), (2, 1, "late")]
    hang = failed.faults[1]
    assert (hang["operation"], hang["phase"]) == ("dispatch", "wait_published"), hang
    assert hang["expected"] == hang["seen"] + 1 and hang["beacons"]["0"]["phase"] == "dispatch", hang
    culprit = hang["beacons"]["1"]
    assert (culprit["step"], culprit["phase"]) == (6, "callbacks"), hang
    assert hang["node_id"] and hang["host"] and culprit["age_s"] + culprit["silent_s"] > 3.0
    pids = [fault["pid"] for fault in failed.faults]
    # The report comes first: whoever adopted a killed process takes it out of /proc when it gets to it.
    assert not wait_until_gone(pids, deadline_s=30), "a culprit's process was left behind"
    details = attempt_details(cluster.url, "tiny-ray_deepep")
    for text in ("rank 1 (pid", "is stopped (SIGSTOP)", "was late"):
        assert any(text in detail for detail in details), (text, details)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_faults_do_not_change_the_losses(failed, undisturbed, ranks, watch):
    """The run that failed, taken up again without Ray, ends with the numbers of an undisturbed one."""
    again = tiny(failed.out, **{"run.backend": "ray_deepep", "run.on_existing": "resume"})
    ranks.run(2, train, again.to_json(), deadline_s=120)
    assert losses(failed.out) == losses(undisturbed)
    assert [step for step, *_ in losses(failed.out)] == list(range(1, 9))
    assert not [name for name in watch.names if "deepep" in name]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_an_error_of_the_user_is_not_retried(cluster, undisturbed, failed):
    """A worker refuses the folder; with `failed` there is a record of attempts to ask."""
    before = len(attempt_details(cluster.url, "tiny-ray_deepep"))
    run = Run(undisturbed, "--workers", "1")
    assert run.status == 2
    assert run.lines("holds checkpoints"), run.text
    assert run.faults == []
    assert len(attempt_details(cluster.url, "tiny-ray_deepep")) == before + 1


def test_too_few_cpus_are_an_error_at_once(cluster, tmp_path):
    run = Run(tmp_path / "many", "--workers", "64", "--set", "model.num_experts=64")
    assert run.status == 2
    assert run.lines("error: --workers = 64: needs 64 CPUs and the cluster has 8"), run.text


# Examples, as a reader starts them


@pytest.fixture(scope="module")
def examples(cluster, undisturbed, watch) -> dict[str, subprocess.CompletedProcess]:
    """All of them, side by side."""
    # Python puts the script's folder on the path, not this one; ray_deepep may not be installed.
    path = os.pathsep.join([str(cluster_cases.ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"RAY_ADDRESS": cluster.address, "RAY_DEDUP_LOGS": "0", "PYTHONPATH": path}
    # A process for each attempt that waits for the loss of a node, of which there is one.
    environment["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"

    def run(name: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(cluster_cases.ROOT / "examples" / name)]
        if name == "05_decode.py":
            command += ["--run", str(undisturbed), "--num-tokens", "12", "--json", str(undisturbed / "decode.json")]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)

    names = ("03_ray_actors.py", "04_ray_train.py", "05_decode.py")
    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(run, names), strict=True))


@pytest.mark.slow
def test_example_of_actors(examples):
    done = examples["03_ray_actors.py"]
    assert done.returncode == 0, done.stdout + done.stderr
    text = done.stdout
    for rank in range(4):
        ranks = (0, 1) if rank < 2 else (2, 3)
        assert f"world rank {rank} is rank {rank % 2} of ranks {ranks}, transport shm: 32 rows arrived" in text
        assert f"came home as {2 * (rank + 1)}\n" in text
    pid = re.search(r"killed world rank 3 \(pid (\d+)\); world rank 2 says:", text).group(1)
    assert re.search(rf"on rank 0, wait_published: the process of rank 1 \(pid {pid} on .*\) is gone", text)
    assert "with a replacement: world rank 3 is rank 1 of ranks (2, 3)" in text


@pytest.mark.slow
def test_example_of_a_train_run(examples, watch):
    done = examples["04_ray_train.py"]
    assert done.returncode == 0, done.stdout + done.stderr
    assert not [name for name in watch.names if "deepep" in name]
    (fault,) = re.findall(r"RAY_DEEPEP_FAULT (\{.*\})", done.stdout + done.stderr)
    assert (json.loads(fault)["rank"], json.loads(fault)["cause"]) == (1, "died")
    by_step: dict[int, set[str]] = {}
    printed = re.findall(r"step (\d): loss ([\d.]+)", done.stdout)
    for step, loss in printed:
        by_step.setdefault(int(step), set()).add(loss)
    assert sorted(by_step) == list(range(6))
    assert all(len(same) == 1 for same in by_step.values()), "a repeated step must give the same loss"
    assert [step for step, _ in printed].count("0") == 1, "the second attempt must go on from a checkpoint"
    assert f"last loss {by_step[5].pop()}" in done.stdout


@pytest.mark.slow
def test_example_of_decoding(examples, undisturbed):
    """What the texts should be: test_decode.py."""
    done = examples["05_decode.py"]
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{undisturbed}, step 8: 4 experts on 2 ranks, transport shm\n" in done.stdout
    result = json.loads((undisturbed / "decode.json").read_text())
    texts, stats = result["texts"], result["stats"]
    assert [(text["index"], text["rank"]) for text in texts] == [(i, i % 2) for i in range(5)]
    for text in texts:
        assert (
            text["text"] and f"--- rank {text['rank']}, {text['end']}\n{text['prompt']}⟶{text['text']}" in done.stdout
        )
    assert stats["num_drawn"] >= 12 and stats["num_prefill_steps"] > 0 and stats["num_decode_steps"] >= 11
    assert 0 < stats["step_us_p50"] <= stats["step_us_p99"] and 0 < stats["comm_share"] < 1
    assert f"{stats['num_drawn']} tokens; {stats['tokens_per_s']:,.0f} tokens/s" in done.stdout
