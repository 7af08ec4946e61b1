"""Numbers of steps on their way out of a run: which sinks a rank has, and what a step tells them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from ray_deepep import run_files
from ray_deepep.errors import MissingPackageError
from ray_deepep.step_telemetry import JsonLinesSink, Sink, StepTelemetry, TensorBoardSink
from ray_deepep.telemetry import CommStats as CommCounts
from train.api import CommStats
from train.config import RunConfig
from train.errors import ConfigError
from train.metrics import StepMetrics

# Of all ranks together, or the step's own name and time, which every record has.
_LEFT_OUT = ("step", "time_s", "expert_tokens", "dispatch_ms", "combine_ms", "comm_calls")


@dataclass(frozen=True, kw_only=True)
class TelemetryOptions:
    """What surrounds a run adds to its telemetry."""

    sinks: tuple[Sink, ...] = ()
    """Beside the files."""
    restarts: int = 0
    """Starts of the workers before this one."""


def open_telemetry(run: RunConfig, rank: int, options: TelemetryOptions) -> StepTelemetry | None:
    """The telemetry of one rank, None if the run has none.

    Raises ConfigError if TensorBoard was asked for and is not installed.
    """
    if not run.telemetry:
        return None
    folder = Path(run.out_dir) / run_files.TELEMETRY
    sinks: list[Sink] = [JsonLinesSink(folder / f"rank_{rank:05d}.jsonl")]
    if run.tensorboard:
        try:
            sinks.append(TensorBoardSink(folder / "tensorboard" / f"rank_{rank:05d}"))
        except MissingPackageError as error:
            raise ConfigError("run.tensorboard", True, str(error)) from error
    return StepTelemetry([*sinks, *options.sinks], always={"rank": rank, "restarts": options.restarts})


@runtime_checkable
class CountingComm(Protocol):
    """A backend that counts more than times (`ray_deepep.deepspeed.Swap`)."""

    def stats(self, *, reset: bool = False) -> CommCounts: ...


def take_counts(comm: CommStats) -> CommCounts:
    """What a backend has counted since it was asked last."""
    if isinstance(comm, CountingComm):
        return comm.stats(reset=True)
    times = comm.comm_stats(reset=True)
    half = int(times["num_calls"]) // 2  # each way as often as the other
    return CommCounts(
        num_dispatch=half, num_combine=half, dispatch_ms=times["dispatch_ms"], combine_ms=times["combine_ms"]
    )


def record_step(telemetry: StepTelemetry | None, metrics: StepMetrics, comm: CommCounts) -> None:
    """Hand over a step. comm: counters of this step."""
    if telemetry is not None:
        numbers = {name: value for name, value in vars(metrics).items() if value is not None and name not in _LEFT_OUT}
        telemetry.record(metrics.step, numbers, comm)
