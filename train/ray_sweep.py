"""Runs the trials of a sweep on Ray Tune. Each trial is a Ray Train run of its own, with its folder and its line in the
dashboard; the trial's own process only starts it and waits, so it takes no CPU from the workers.

As many trials run at once as the cluster has room for, by the largest of them. What a trial came to stands in its
folder, so a sweep whose driver was killed goes on with the trials that have none, each from its last checkpoint.
"""

from __future__ import annotations

import dataclasses
import math
import os
import time
import traceback
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import tune
from tqdm import tqdm

from train.config import TrainConfig
from train.ray_main import TRAIN_SETTINGS, RayOptions, check_resources, connect, make_trainer
from train.ray_worker import USER_ERRORS
from train.sweep_results import DONE, FAILED, Row, one_line, read_row, trial_folder, write_result
from train.sweep_space import Trial

_MAX_LOST = 2
"""How often a trial is started again whose own process, or node, is lost."""
_TRIAL_BYTES = 2**20
"""Tune wants a resource for a trial; a CPU would be one less for workers."""


@dataclass(frozen=True, kw_only=True)
class SweepJob:
    """What every trial gets beside its values."""

    base: dict[str, Any]
    """`TrainConfig.to_dict`, all paths absolute."""
    out_dir: str
    """Folder of the sweep, absolute; trials have folders in it."""
    name: str
    options: RayOptions
    use_gpu: bool


def run_trials(
    base: TrainConfig, trials: list[Trial], *, out_dir: Path, options: RayOptions, at_once: int = 0
) -> list[Row]:
    """Run `trials` and return their rows. A trial that fails has its reason in its row, and the others go on.

    base: with absolute paths. at_once: most trials at the same time; 0: as many as there is room for. A Ray that is
    connected already is used and left connected.
    Raises ConfigError where the cluster is too small for one of the trials.
    """
    for name, value in TRAIN_SETTINGS.items():
        os.environ.setdefault(name, value)
    largest = dataclasses.replace(options, num_workers=max(trial.num_workers for trial in trials))
    owned = not ray.is_initialized()
    if owned:
        connect(largest)
    try:
        cluster = ray.cluster_resources()
        use_gpu = check_resources(base, largest, cluster)
        job = SweepJob(base=base.to_dict(), out_dir=str(out_dir), name=out_dir.name, options=options, use_gpu=use_gpu)
        fit = max_at_once(cluster, largest, use_gpu=use_gpu)
        _tune(job, trials, at_once=min(at_once, fit) if at_once else fit)
    finally:
        if owned:
            ray.shutdown()
    return [read_row(trial, trial_folder(out_dir, trial)) for trial in trials]


def max_at_once(cluster: dict[str, float], largest: RayOptions, *, use_gpu: bool) -> int:
    """How many trials of the largest size have room at once; at least one."""
    fit = math.floor(cluster.get("CPU", 0) / (largest.num_workers * largest.cpus_per_worker))
    if use_gpu:
        fit = min(fit, math.floor(cluster.get("GPU", 0) / (largest.num_workers * largest.gpus_per_worker)))
    return max(1, fit)


def _tune(job: SweepJob, trials: list[Trial], *, at_once: int) -> None:
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(_run_trial, job=job), {"memory": _TRIAL_BYTES}),
        param_space={"trial": tune.grid_search([dataclasses.asdict(trial) for trial in trials])},
        tune_config=tune.TuneConfig(
            max_concurrent_trials=at_once, trial_name_creator=_trial_name, trial_dirname_creator=_trial_name
        ),
        run_config=tune.RunConfig(
            name=f"{job.name}-{time.strftime('%Y%m%d-%H%M%S')}",
            storage_path=str(Path(job.out_dir) / "tune"),
            failure_config=tune.FailureConfig(max_failures=_MAX_LOST),
            callbacks=[_Bar(total=len(trials), title=f"sweep {job.name}")],
            verbose=0,
        ),
    )
    tuner.fit()


def _trial_name(trial: Any) -> str:
    return f"trial-{trial.config['trial']['index']:03d}"


class _Bar(tune.Callback):
    """A bar that moves as trials end, and says how each did. Tune copies callbacks, so the bar is made late."""

    def __init__(self, *, total: int, title: str) -> None:
        self._total, self._title = total, title
        self._bar: tqdm | None = None

    def setup(self, **info: Any) -> None:
        self._bar = tqdm(total=self._total, desc=self._title, unit="trial", dynamic_ncols=True)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        result = trial.last_result or {}
        self._say(f"{trial}: {result.get('status', 'lost')} {result.get('error', '')}".rstrip())

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._say(f"{trial}: lost, its process or node is gone")

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _say(self, line: str) -> None:
        if self._bar is not None:
            self._bar.write(line)
            self._bar.update()


def _run_trial(space: dict[str, Any], job: SweepJob) -> None:
    """One trial, in a process of its own; its end is written to its folder, whatever it is."""
    trial = Trial(**space["trial"])
    folder = trial_folder(Path(job.out_dir), trial)
    begun = time.monotonic()
    for name, value in TRAIN_SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        metrics = _train(trial, job, folder) | {"seconds": time.monotonic() - begun}
        status, error = DONE, ""
    except Exception as failure:  # whatever it is, it ends this trial only, and its row says why
        if not isinstance(failure, USER_ERRORS):
            traceback.print_exc()
        status, error, metrics = FAILED, one_line(_cause(failure)), {}
    write_result(folder, status=status, error=error, metrics=metrics)
    tune.report(metrics | {"status": status, "error": error})


def _train(trial: Trial, job: SweepJob, folder: Path) -> dict[str, float]:
    config = trial.config(TrainConfig.from_dict(job.base)).replace(
        **{"run.out_dir": str(folder), "run.on_existing": "resume"}
    )
    config = dataclasses.replace(config, name=f"{job.name}-{trial.name}")
    options = dataclasses.replace(job.options, num_workers=trial.num_workers, num_sms=trial.num_sms)
    trainer = make_trainer(config, options, uuid.uuid4().hex[:8], use_gpu=job.use_gpu)
    outcome = trainer.fit().return_value
    if outcome.error is not None:
        raise outcome.error
    return dataclasses.asdict(outcome.summary.stats)


def _cause(failure: Exception) -> BaseException:
    """The first worker's own error, where Ray Train wraps one."""
    wrapped = getattr(failure, "worker_failures", None)
    if wrapped:
        return wrapped[min(wrapped)]
    return failure.__cause__ if isinstance(failure, ray.train.TrainingFailedError) and failure.__cause__ else failure
