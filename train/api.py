"""What the trainer and its surroundings agree on: callbacks in, times of the all-to-all backend in, a summary out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from train.metrics import RunStats, StepMetrics


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """A checkpoint that has just been sealed."""

    step: int
    """Optimizer steps it holds."""
    folder: Path
    """Where it is; all ranks' files are in it."""
    metrics: StepMetrics
    """Numbers of that step."""


@dataclass(frozen=True, kw_only=True)
class TrainSummary:
    """The end of a run, the same on every rank."""

    preset: str
    """Name of the config."""
    backend: str
    """Who moved tokens between experts."""
    world_size: int
    """Ranks."""
    ep_size: int
    """Ranks of one EP group."""
    device: str
    """cpu or cuda."""
    num_params: int
    """Parameters of the whole model, all experts counted."""
    resumed_from_step: int
    """Step this process continued from; 0 for a fresh run."""
    stats: RunStats
    """Losses, throughput and the share of communication, over the whole run."""
    out_dir: Path
    """The run's folder."""
    metrics_path: Path
    """One JSON line a step."""
    plot_path: Path
    """Training and validation loss, PNG."""
    checkpoint_path: Path | None
    """The newest checkpoint."""
    stopped: bool
    """Whether it ended before its last step, because it was asked to."""
    sample: str
    """Prompt, an arrow, and the model's continuation; empty if none was asked for."""


@dataclass
class Progress:
    """Where a run is: set by the trainer, read by who supervises the run (`ray_deepep.Progress` is one that tells)."""

    step: int = 0
    """Optimizer step that is being done, from 1."""
    phase: str = ""
    """What the rank is at, in a word."""


class TrainerCallback(Protocol):
    """Told about a run while it goes. Every method is called on every rank, in the same order, between collectives."""

    def on_step(self, metrics: StepMetrics) -> None:
        """A step is done and written to the metrics file (losses are equal on all ranks, times are this rank's)."""

    def on_checkpoint(self, info: CheckpointInfo) -> None:
        """A checkpoint is complete on disk. May block or be collective."""

    def on_end(self, summary: TrainSummary) -> None:
        """The run is over and every file is written."""


class Handover(Protocol):
    """Who replaces the workers by more or fewer ones, once they have saved what they have."""

    def asked(self) -> bool:
        """Whether it wants to; asked on every rank in every step. Never waits."""

    def hand_over(self, step: int) -> None:
        """The checkpoint of `step` is complete. Called on every rank; does not return: the process is ended, or an
        error is raised at a deadline."""


def never() -> bool:
    """Nobody asks the run to stop."""
    return False


class CommStats(Protocol):
    """An all-to-all backend that knows how long it took."""

    def comm_stats(self, reset: bool = True) -> dict[str, float]:
        """`dispatch_ms`, `combine_ms` and `num_calls` since the last reset, forward and backward passes together."""
