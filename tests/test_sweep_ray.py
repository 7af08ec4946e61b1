"""`train.sweep` on a real Ray: a failing trial, a driver that is killed, and the rest after `--resume`."""

from __future__ import annotations

import csv
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="sweeps need Ray")
pytest.importorskip("deepspeed", reason="trials train with DeepSpeed")

import ray

from train import ray_sweep, sweep
from train.config import TrainConfig
from train.ray_main import RayOptions
from train.ray_sweep import max_at_once
from train.sweep_results import DONE, FAILED, Row, read_row, trial_folder, write_result
from train.sweep_space import Trial

pytestmark = pytest.mark.xdist_group("ray")

ROOT = Path(__file__).parents[1]
DEADLINE_S = 240.0


@pytest.fixture(scope="module")
def cluster(shared_ray):
    """Address of the shared Ray, to which this process is connected."""
    ray.init(address=shared_ray.address, log_to_driver=False)
    yield shared_ray.address
    ray.shutdown()


def wait_for(path: Path, driver: subprocess.Popen) -> None:
    end = time.monotonic() + DEADLINE_S
    while not path.is_file():
        assert driver.poll() is None, f"the driver ended with status {driver.returncode}"
        assert time.monotonic() < end, f"no {path} within {DEADLINE_S:g} s"
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_sweep_goes_on_after_its_driver_was_killed(
    cluster: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sweep"
    # The tiny model has four experts, so five choices are too many: that trial fails.
    arguments = ["--preset", "tiny", "--steps", "4", "--workers", "1", "--at-once", "1", "--out", str(out)]
    command = [sys.executable, "-m", "train.sweep", *arguments, "--param", "topk=5,2", "--address", cluster]
    with open(tmp_path / "driver.log", "w") as log:
        driver = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(out / "trials" / "000" / "trial.json", driver)
    finally:
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
    first = (out / "trials" / "000" / "trial.json").stat().st_mtime_ns
    assert not (out / "trials" / "001" / "trial.json").exists()

    assert sweep.main(["--resume", "--workers", "1", "--at-once", "1", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert (out / "trials" / "000" / "trial.json").stat().st_mtime_ns == first, "a trial that had ended ran again"
    with open(out / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["failed", "done"]
    assert rows[0]["error"].startswith("ConfigError: model.num_topk = 5: must be at most num_experts=4")
    assert float(rows[1]["val_loss"]) > 0
    assert rows[0]["error"] in printed
    assert (out / "sweep.png").is_file() and (out / "loss.png").is_file()


@pytest.mark.parametrize(("more", "expected"), (([], [2]), (["--retry-failed"], [1, 2])))
def test_a_resumed_sweep_runs_what_has_not_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str], expected: list[int]
) -> None:
    """Of a trial that is done, one that failed and one that was broken off."""
    out, ran = tmp_path / "sweep", []

    def run_trials(base: TrainConfig, trials: list[Trial], **_: object) -> list[Row]:
        ran.append([trial.index for trial in trials])
        return [read_row(trial, trial_folder(out, trial)) for trial in trials]

    monkeypatch.setattr(ray_sweep, "run_trials", run_trials)
    arguments = ["--workers", "1", "--out", str(out)]
    sweep.main(["--preset", "tiny", "--param", "topk=1,2,3", *arguments])
    write_result(out / "trials" / "000", status=DONE, metrics={"val_loss": 1.0})
    write_result(out / "trials" / "001", status=FAILED, error="it broke")
    assert sweep.main(["--resume", *more, *arguments]) == 0
    assert ran == [[0, 1, 2], expected]


@pytest.mark.parametrize(
    ("cluster", "workers", "use_gpu", "at_once"),
    (
        ({"CPU": 8.0}, 2, False, 4),
        ({"CPU": 7.9}, 2, False, 3),
        ({"CPU": 1.0}, 2, False, 1),
        ({"CPU": 64.0, "GPU": 8.0}, 4, True, 2),
        ({"CPU": 6.0, "GPU": 8.0}, 2, True, 3),
    ),
)
def test_as_many_trials_as_fit(cluster: dict[str, float], workers: int, use_gpu: bool, at_once: int) -> None:
    assert max_at_once(cluster, RayOptions(num_workers=workers), use_gpu=use_gpu) == at_once
    if use_gpu:
        half = RayOptions(num_workers=workers, gpus_per_worker=0.5, cpus_per_worker=0.1)
        assert max_at_once(cluster, half, use_gpu=True) == math.floor(2 * cluster["GPU"] / workers)


def test_a_cluster_that_is_too_small(cluster: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "sweep"
    assert sweep.main(["--preset", "tiny", "--param", "workers=1,64", "--out", str(out)]) == 2
    assert "needs 64 CPUs and the cluster has 8" in capsys.readouterr().err
    assert not (out / "sweep.json").exists()
