"""What a Ray Train worker runs: the trainer, told which attempt this is, with callbacks that speak to Ray.

A restarted attempt continues from the newest checkpoint of the run's folder. Errors that a retry cannot mend (a config,
data or checkpoint that is wrong, a diverged loss) are returned rather than raised, so that Ray does not try again.
"""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import ray.train
import torch.distributed as dist

from ray_deepep import job_log
from ray_deepep.cluster.metrics import RayMetricsSink
from ray_deepep.cluster.resize import ResizeHandover
from ray_deepep.cluster.stop import StopWatch
from ray_deepep.step_telemetry import Sink
from train.api import CheckpointInfo, TrainSummary, never
from train.config import TrainConfig
from train.errors import CheckpointError, ConfigError, DataError, TrainingDivergedError
from train.files import write_text_atomic
from train.inject import FaultInjector, Injection, injected_file
from train.metrics import StepMetrics
from train.telemetry import TelemetryOptions
from train.timeline import process_started

USER_ERRORS = (ConfigError, DataError, CheckpointError, TrainingDivergedError)
_ATTEMPTS_FILE = "attempts.json"
_PROGRESS_EVERY_S = 2.0
_AGREE_S = 5.0


@dataclass(frozen=True, kw_only=True)
class WorkerJob:
    """What every worker of a run gets."""

    config: dict[str, Any]
    """`TrainConfig.to_dict`, all paths absolute."""
    token: str
    """Unique to this run: tells its attempts from those of an earlier run in the same folder."""
    inject: tuple[Injection, ...]
    """Faults, one for each attempt from the first on."""
    is_elastic: bool = False
    """Whether Ray may ask the workers to make room for more of them."""


@dataclass(kw_only=True)
class Attempt:
    """One start of the workers, as rank 0 saw it; times in seconds since the epoch."""

    started: float
    """Its process began."""
    entered: float
    """The training function began."""
    first_step_began: float = 0.0
    first_step_done: float = 0.0


@dataclass(frozen=True, kw_only=True)
class WorkerOutcome:
    """What rank 0 returns."""

    summary: TrainSummary | None
    error: Exception | None
    """An error for the user, in place of a summary."""
    attempts: list[Attempt]


@dataclass(kw_only=True)
class AttemptLog:
    """All attempts of a run, kept in its folder so that the next one finds them."""

    path: Path
    token: str
    attempts: list[Attempt] = field(default_factory=list)

    @classmethod
    def begin_attempt(cls, out_dir: Path, token: str) -> AttemptLog:
        """The log with one more attempt; for one rank."""
        log = cls(path=out_dir / _ATTEMPTS_FILE, token=token)
        if log.path.is_file():
            stored = json.loads(log.path.read_text(encoding="utf-8"))
            if stored["token"] == token:
                log.attempts = [Attempt(**attempt) for attempt in stored["attempts"]]
        log.attempts.append(Attempt(started=process_started(), entered=time.time()))
        out_dir.mkdir(parents=True, exist_ok=True)
        log.save()
        return log

    def save(self) -> None:
        stored = {"token": self.token, "attempts": [asdict(attempt) for attempt in self.attempts]}
        write_text_atomic(self.path, json.dumps(stored, indent=2))


class RayReporter:
    """Trainer callback: progress lines in the job's log, metrics to Ray at checkpoints, the time of the first step."""

    def __init__(self, config: TrainConfig, log: AttemptLog | None) -> None:
        self._num_steps = config.run.steps
        self._log = log  # rank 0 alone has one
        self._last_print = 0.0
        self._last_metrics: StepMetrics | None = None

    def on_step(self, metrics: StepMetrics) -> None:
        if self._log is None:
            return
        now = time.time()
        self._last_metrics = metrics
        attempt = self._log.attempts[-1]
        if not attempt.first_step_done:
            attempt.first_step_began, attempt.first_step_done = now - metrics.step_ms / 1e3, now
            self._log.save()
        if now - self._last_print >= _PROGRESS_EVERY_S or metrics.step == self._num_steps:
            self._last_print = now
            self._print()

    def on_checkpoint(self, info: CheckpointInfo) -> None:
        if self._log is not None:
            print(job_log.checkpoint_line(info.step, info.folder), flush=True)
        # Blocks until the controller polls, so not for every step.
        metrics = {name: value for name, value in asdict(info.metrics).items() if isinstance(value, int | float)}
        ray.train.report(metrics | {"checkpoint": str(info.folder)})

    def on_end(self, summary: TrainSummary) -> None:
        if summary.stopped and self._log is not None:
            self._print()

    def _print(self) -> None:
        print(step_line(self._last_metrics, self._num_steps), flush=True)


def step_line(metrics: StepMetrics, num_steps: int) -> job_log.StepLine:
    """What a job's log says about a step."""
    return job_log.StepLine(
        step=metrics.step,
        num_steps=num_steps,
        loss=metrics.loss,
        tokens_per_s=metrics.tokens_per_s,
        val_loss=metrics.val_loss,
    )


def train_worker(loop_config: dict[str, WorkerJob]) -> WorkerOutcome | None:
    """The training function of every worker, with its job under "job"; only rank 0 returns something."""
    job = loop_config["job"]
    config = TrainConfig.from_dict(job.config)
    rank = ray.train.get_context().get_world_rank()
    out_dir = Path(config.run.out_dir)
    log = AttemptLog.begin_attempt(out_dir, job.token) if rank == 0 else None
    number = [len(log.attempts) if log else 0]
    dist.broadcast_object_list(number, src=0)
    if log is not None:
        num_workers = ray.train.get_context().get_world_size() if job.is_elastic else None
        print(job_log.attempt_line(number[0], num_workers), flush=True)
    callbacks: list[Any] = [RayReporter(config, log)]
    if number[0] <= len(job.inject):
        time_file = injected_file(out_dir, number[0])
        callbacks.append(FaultInjector(job.inject[number[0] - 1], rank=rank, time_file=time_file))
    try:
        with (
            StopWatch(job.token) if rank == 0 else nullcontext(never) as stop,
            ResizeHandover(job.token, rank) if job.is_elastic else nullcontext() as handover,
        ):
            telemetry = TelemetryOptions(sinks=_sinks(config, rank), restarts=number[0] - 1)
            wishes = {"stop": stop, "handover": handover}
            summary = _train(config_of_attempt(config, number[0]), callbacks, telemetry, wishes)
    except USER_ERRORS as error:
        _agree_or_raise(error, rank)
        return WorkerOutcome(summary=None, error=error, attempts=log.attempts) if log else None
    return WorkerOutcome(summary=summary, error=None, attempts=log.attempts) if log else None


def config_of_attempt(config: TrainConfig, number: int) -> TrainConfig:
    """The first attempt does what the user asked; later ones continue from what the run's folder holds by then."""
    if number == 1:
        return config
    values = {"run.on_existing": "resume"}
    if any((Path(config.run.out_dir) / "checkpoints").glob("step_*/trainer_state.json")):
        values["run.resume_from"] = ""
    return config.replace(**values)


def _train(
    config: TrainConfig, callbacks: list[Any], telemetry: TelemetryOptions, wishes: dict[str, Any]
) -> TrainSummary:
    """wishes: `stop` and `handover` of `train.trainer.run`."""
    # Imported here: the driver and Ray's controller load this module too, and need no DeepSpeed.
    from train.trainer import run

    if config.run.backend == "stock":
        return run(config, callbacks=callbacks, telemetry=telemetry, **wishes)
    from ray_deepep.cluster import current

    worker = current()
    return run(config, swap=worker.swap, callbacks=callbacks, progress=worker.progress, telemetry=telemetry, **wishes)


def _sinks(config: TrainConfig, rank: int) -> tuple[Sink, ...]:
    """Ray's metrics, from where the dashboard has them."""
    if not config.run.telemetry:
        return ()
    context = ray.train.get_context()
    ep_size = config.resolve_ep_size(context.get_world_size())
    first = rank - rank % ep_size
    return (RayMetricsSink(run=context.get_experiment_name(), rank=rank, ranks=range(first, first + ep_size)),)


def _agree_or_raise(error: Exception, rank: int) -> None:
    """Return if every rank ended with an error for the user; raise `error` if one did not: that is a fault to retry."""
    from ray_deepep import BootstrapError
    from ray_deepep.rendezvous import store_exchange

    try:
        store_exchange(dist.group.WORLD, rank, dist.get_world_size(), _AGREE_S)("user error", b"")
    except BootstrapError:
        raise error from None
