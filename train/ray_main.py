"""Train a model on Ray: on one that this process starts, on a cluster (`RAY_ADDRESS`), or as a Ray job.

    python -m train.ray_main --preset demo --workers 2 --backend ray_deepep
    RAY_ADDRESS=HOST:6379 python -m train.ray_main --preset small --workers 8
    ray job submit -- python -m train.ray_main --preset demo --out /shared/runs/demo
    ray-deepep submit train.ray_main --preset demo --out /shared/runs/demo
    RAY_ADDRESS=HOST:6379 python -m train.ray_main --preset small --workers 4:8

A worker that dies, hangs or raises is named in the log, and training continues from the last checkpoint, with the same
losses as an undisturbed run. `--inject kill:rank=1,step=7` shows it. With `--workers MIN:MAX` it goes on smaller when a
node is lost, and grows back. SIGTERM, which is how Ray stops a job, ends the
run after the step that is being done, with a checkpoint.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import os
import signal
import socket
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from train.cli import add_config_arguments, config_from_args
from train.config import TrainConfig
from train.errors import CheckpointError, ConfigError, DataError, TrainingDivergedError
from train.inject import injected_file
from train.ray_jobs import RESULT_PREFIX
from train.ray_options import RayOptions, add_ray_arguments, ep_sizes_of, options_from_args, with_shares
from train.timeline import RecoveryTimes, StartTimes, process_started

_logger = logging.getLogger("train")
_KNOCK_S = 10.0
# Ray's own defaults poll every 2 s, print every line twice and keep the run out of the dashboard.
TRAIN_SETTINGS: Mapping[str, str] = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",
}


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, 1 when training failed, 2 after an error the user can do something about, 143 when
    it was stopped by SIGTERM."""
    args = _parser().parse_args(argv)
    logging.basicConfig(format="%(message)s")
    try:
        return run_on_ray(config_from_args(args), options=options_from_args(args))
    except (ConfigError, DataError, CheckpointError, TrainingDivergedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def describe_job(argv: list[str]) -> dict[str, str]:
    """What a job with these arguments is, for `ray-deepep submit`. Raises ConfigError (a ValueError) as `main` does."""
    args = _parser().parse_args(argv)
    return metadata_of(config_from_args(args), options_from_args(args))


def metadata_of(config: TrainConfig, options: RayOptions) -> dict[str, str]:
    """What is kept with the job of a run. Raises ConfigError when the number of workers does not fit."""
    ep_size = with_shares(config, options).resolve_ep_size(options.num_workers)
    return {
        "preset": config.name,
        "backend": config.run.backend,
        "num_workers": str(options),
        "ep_size": str(ep_size),
        "out_dir": config.run.out_dir,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train.ray_main", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_config_arguments(parser)
    add_ray_arguments(parser)
    return parser


def run_on_ray(config: TrainConfig, *, options: RayOptions | None = None) -> int:
    """Train as `config` says on Ray, print the summary, return the exit status.

    A Ray that is connected already is used and left connected. Raises ConfigError and the other errors that the user
    can do something about (`train.ray_worker.USER_ERRORS`).
    """
    options = options or RayOptions()
    config = with_shares(with_absolute_paths(config), options)
    for name, value in TRAIN_SETTINGS.items():
        os.environ.setdefault(name, value)
    import ray.train

    from ray_deepep.cluster.stop import stop_on_sigterm
    from train import ray_worker  # with torch and Ray Train's torch part

    imported = time.time()
    owned = not ray.is_initialized()
    if owned:
        connect(options)
    connected = time.time()
    if len(ray.nodes()) == 1 and not options.is_elastic:
        # Watches for the loss of nodes, of which a run on one node has none to spare; its process costs seconds.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    try:
        use_gpu = check_resources(config, options, ray.cluster_resources())
        token = uuid.uuid4().hex[:8]
        trainer = make_trainer(config, options, token, use_gpu=use_gpu)
        with stop_on_sigterm(token):
            outcome: ray_worker.WorkerOutcome = trainer.fit().return_value
    except ray.train.TrainingFailedError as error:
        print(f"error: training failed: {error}", file=sys.stderr)
        return 1
    finally:
        if owned:
            ray.shutdown()
    if outcome.error is not None:
        raise outcome.error
    _report(config, options, outcome, imported=imported, connected=connected)
    return 128 + signal.SIGTERM if outcome.summary.stopped else 0


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """Paths as seen from here: workers have other working directories."""
    absolute = {"run.out_dir": str(Path(config.run.out_dir).absolute())}
    for name in ("run.resume_from", "run.deepspeed_config", "data.tokenizer_file"):
        section, _, field = name.partition(".")
        path = getattr(getattr(config, section), field)
        if path:
            absolute[name] = str(Path(path).absolute())
    paths = [str(Path(path).absolute()) for path in config.data.paths]
    return config.replace(**absolute, **{"data.paths": paths})


def connect(options: RayOptions) -> None:
    """Connect to the cluster of `options.address`, or start a Ray that ends with this process.

    Raises ConfigError when there is no cluster at that address.
    """
    import ray

    if options.address:
        try:
            _knock(options.address)
            ray.init(address=options.address)
        except (OSError, ValueError) as error:
            raise ConfigError(
                "--address", options.address, f"must be that of a running Ray cluster ({error})"
            ) from error
        return
    num_cpus = max(4, math.ceil(options.num_workers * options.cpus_per_worker) + 2, os.cpu_count() or 1)
    # Workers of Ray Train have an environment of their own, so spare ones without it would start in vain.
    ray.init(address="local", num_cpus=num_cpus, _system_config={"prestart_worker_first_driver": False})


def _knock(address: str) -> None:
    """Raise OSError at once if nothing listens at HOST:PORT, where Ray itself would try for many minutes."""
    host, _, port = address.rpartition(":")
    if "://" not in address and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_S).close()


def check_resources(config: TrainConfig, options: RayOptions, cluster: Mapping[str, float]) -> bool:
    """Whether workers train on GPUs. Raises ConfigError where the cluster is too small, instead of waiting for ever.

    An elastic run needs room for its least number of workers. cluster: what the whole cluster has, by resource.
    """
    least = options.least_workers
    cpus = least * options.cpus_per_worker
    if cluster.get("CPU", 0) < cpus:
        rule = (
            f"needs {cpus:g} CPUs and the cluster has {cluster.get('CPU', 0):g}; use fewer, or lower --cpus-per-worker"
        )
        raise ConfigError("--workers", least, rule)
    gpus, wanted = cluster.get("GPU", 0), least * options.gpus_per_worker
    if config.run.device == "cuda" and gpus < wanted:
        rule = (
            f"needs {wanted:g} GPUs and the cluster has {gpus:g}; use fewer, or let them share with --gpus-per-worker"
        )
        raise ConfigError("--workers", least, rule)
    if config.run.device != "cpu" and 0 < gpus < wanted:
        rule = "--gpus-per-worker lets workers share them"
        _logger.warning("training on CPUs: %d workers want %g GPUs of %g; %s", least, wanted, gpus, rule)
    return config.run.device != "cpu" and gpus >= wanted


def make_trainer(config: TrainConfig, options: RayOptions, token: str, *, use_gpu: bool) -> Any:
    """A Ray Train trainer whose `fit().return_value` is a `WorkerOutcome`. Ray must be connected.

    `token` names the run to who asks it to stop.
    """
    from ray.train import FailureConfig, RunConfig

    from ray_deepep.cluster import ElasticTrainer, ExpertParallelTrainer
    from train.ray_worker import WorkerJob, train_worker

    out_dir = Path(config.run.out_dir)
    env = {} if use_gpu else {"DS_ACCELERATOR": "cpu"}
    # Progress bars redraw one line, which a log cannot; the reporter prints lines instead.
    config = config.replace(**{"run.progress": False})
    for attempt in range(1, len(options.inject) + 1):
        injected_file(out_dir, attempt).unlink(missing_ok=True)
    ep_sizes = ep_sizes_of(config, options)
    trainer = ExpertParallelTrainer
    if ep_sizes is not None:
        trainer = partial(ElasticTrainer, ep_sizes=ep_sizes, run_key=token)
    job = WorkerJob(config=config.to_dict(), token=token, inject=options.inject, is_elastic=options.is_elastic)
    return trainer(
        train_worker,
        train_loop_config={"job": job},
        torch_config=_torch_config(config, options),
        scaling_config=_scaling_config(options, use_gpu=use_gpu),
        run_config=RunConfig(
            name=f"{config.name}-{config.run.backend}-{token}",
            storage_path=str(out_dir / "ray"),
            failure_config=FailureConfig(
                max_failures=options.max_failures, controller_failure_limit=options.max_failures
            ),
            worker_runtime_env={"env_vars": env},
        ),
    )


def _scaling_config(options: RayOptions, *, use_gpu: bool) -> Any:
    from ray.train import ScalingConfig

    workers = (options.least_workers, options.num_workers) if options.is_elastic else options.num_workers
    return ScalingConfig(
        num_workers=workers,
        elastic_resize_monitor_interval_s=options.resize_check_s,
        use_gpu=use_gpu,
        resources_per_worker={"CPU": options.cpus_per_worker} | ({"GPU": options.gpus_per_worker} if use_gpu else {}),
    )


def _torch_config(config: TrainConfig, options: RayOptions) -> Any:
    timeout_s = math.ceil(config.run.dist_timeout_s)
    # NCCL refuses ranks that share a GPU.
    backend = "gloo" if options.shares_gpus else None
    if config.run.backend == "stock":
        from ray.train.torch import TorchConfig

        return TorchConfig(timeout_s=timeout_s, backend=backend)
    from ray_deepep import CommConfig, run_files
    from ray_deepep.cluster import ExpertParallelConfig

    # Beyond the deadline of every collective nothing moves any more. A deadline of the user's own comes first.
    hang_deadline_s = ExpertParallelConfig().hang_deadline_s or timeout_s
    ep_sizes = ep_sizes_of(config, options)
    comm = {} if options.num_sms is None else {"num_sms": options.num_sms}
    comm |= {"allow_shared_gpus": True} if options.shares_gpus else {}
    return ExpertParallelConfig(
        comm=CommConfig(time_gpu_calls=True, **comm),
        backend=backend,
        timeout_s=timeout_s,
        ep_size=config.resolve_ep_size(options.num_workers) if ep_sizes is None else None,
        ep_sizes=ep_sizes,
        hang_deadline_s=hang_deadline_s,
        fault_log=str(Path(config.run.out_dir) / run_files.FAULTS),
    )


def _report(config: TrainConfig, options: RayOptions, outcome: Any, *, imported: float, connected: float) -> None:
    from train.report import format_summary

    started, times = process_started(), None
    if moments := first_step_moments(outcome.attempts):
        times = StartTimes(
            submitted=options.submitted or started,
            driver_started=started,
            driver_imported=imported,
            ray_connected=connected,
            **moments,
        )
    result = {
        "backend": config.run.backend,
        "out_dir": config.run.out_dir,
        "start": times and dataclasses.asdict(times),
        "attempts": [dataclasses.asdict(attempt) for attempt in outcome.attempts],
        "recoveries": [],
        "stats": dataclasses.asdict(outcome.summary.stats),
        "checkpoint": str(outcome.summary.checkpoint_path),
        "metrics": str(outcome.summary.metrics_path),
        "plot": str(outcome.summary.plot_path),
    }
    print(format_summary(outcome.summary))
    if times is not None:
        print(f"time to first step  {times}")
    for number in range(1, len(outcome.attempts)):
        time_file = injected_file(Path(config.run.out_dir), number)
        moments = first_step_moments(outcome.attempts[number:])
        # A resize may end an attempt before its fault, or leave out the rank that was to suffer it.
        if number <= len(options.inject) and time_file.exists() and moments:
            fault = float(time_file.read_text(encoding="utf-8"))
            times = RecoveryTimes(fault=fault, **moments)
            result["recoveries"].append({"kind": options.inject[number - 1].kind} | dataclasses.asdict(times))
            print(f"{options.inject[number - 1].kind} to training again  {times}")
    print(f"{RESULT_PREFIX} {json.dumps(result)}", flush=True)


def first_step_moments(attempts: Sequence[Any]) -> dict[str, float]:
    """The last moments of a start, of the first `Attempt` that came to a step; empty if none did.

    A start may fail before, and a run that is resumed at its end has no step to do.
    """
    attempt = next((attempt for attempt in attempts if attempt.first_step_done), None)
    if attempt is None:
        return {}
    return {
        "worker_started": attempt.started,
        "worker_entered": attempt.entered,
        "first_step_began": attempt.first_step_began,
        "first_step_done": attempt.first_step_done,
    }


if __name__ == "__main__":
    sys.exit(main())
