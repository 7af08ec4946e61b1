"""The folder of a run: where its files are, whether it may be written, and which checkpoint it continues from."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

from ray_deepep import run_files
from train import checkpoint
from train.config import RunConfig, TrainConfig
from train.distributed import World
from train.errors import ConfigError
from train.files import write_text_atomic
from train.metrics import StepMetrics, truncate_metrics


class RunFolder:
    """Paths inside `run.out_dir`. All ranks must see the same folder; rank 0 writes what is not a checkpoint."""

    def __init__(self, run: RunConfig, world: World):
        self._run = run
        self._world = world
        self.root = Path(run.out_dir)
        self.checkpoints = self.root / run_files.CHECKPOINTS
        self.data = self.root / "data"
        self.metrics = self.root / run_files.METRICS
        self.plot = self.root / "loss.png"
        self.sample = self.root / run_files.SAMPLE
        self.starts = self.root / run_files.STARTS
        self.faults = self.root / run_files.FAULTS

    def prepare(self, config: TrainConfig) -> None:
        """Make the folder and write `config.json`; for one rank. Raises ConfigError rather than touch an older run.

        Also where the folder cannot be made or written to.
        """
        existing = checkpoint.step_folders(self.checkpoints)
        if existing and self._run.on_existing == "error":
            rule = f"holds checkpoints (newest: {existing[0].name}); resume, overwrite, or choose another folder"
            raise ConfigError("run.out_dir", self._run.out_dir, rule)
        if self._run.on_existing == "overwrite":
            shutil.rmtree(self.checkpoints, ignore_errors=True)
            self.metrics.unlink(missing_ok=True)
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            if self._run.on_existing != "resume":  # a new run; those of an earlier one tell nothing about it
                self.starts.unlink(missing_ok=True)
                self.faults.unlink(missing_ok=True)
                shutil.rmtree(self.root / run_files.TELEMETRY, ignore_errors=True)
            write_text_atomic(self.root / run_files.CONFIG, config.to_json())
        except OSError as error:
            rule = f"must be a folder that can be written to ({error.strerror})"
            raise ConfigError("run.out_dir", self._run.out_dir, rule) from error

    def note_start(self, *, step: int, environment: dict[str, str | int]) -> None:
        """Add a line to `starts.jsonl`; for one rank. step: optimizer steps done before."""
        line = json.dumps({"time_s": time.time(), "step": step, "environment": environment})
        with open(self.starts, "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def choose_checkpoint(self, config: TrainConfig, *, data_digest: str) -> checkpoint.CheckpointChoice | None:
        """The checkpoint this run continues from, None for a fresh start. Collective.

        Raises CheckpointError if there are only bad ones, or the good one belongs to another run.
        """
        choice = None
        if self._run.resume_from:
            choice = self._named(Path(self._run.resume_from))
        elif self._run.on_existing == "resume":
            choice = checkpoint.choose_checkpoint(self.checkpoints, self._world)
        if choice is not None:
            checkpoint.check_fits(
                choice.folder, choice.state, config=config, data_digest=data_digest, world=self._world
            )
        return choice

    def _named(self, path: Path) -> checkpoint.CheckpointChoice:
        """`path` is a checkpoint, or a run's folder whose newest good one is meant."""
        roots = [root for root in (path / "checkpoints", path) if checkpoint.step_folders(root)]
        choice = checkpoint.choose_checkpoint(roots[0], self._world) if roots else None
        if choice is None:
            state = checkpoint.verify_checkpoint(path, self._world)
            choice = checkpoint.CheckpointChoice(folder=path, state=state, skipped=())
        return choice

    def earlier_metrics(self, choice: checkpoint.CheckpointChoice | None) -> list[StepMetrics]:
        """Steps before the resumed one, with later ones removed from the file; for one rank.

        A checkpoint of another run's folder brings that run's metrics along.
        """
        if choice is not None and not self.metrics.exists():
            source = choice.folder.parent.parent / self.metrics.name
            if source.is_file():
                shutil.copyfile(source, self.metrics)
        return truncate_metrics(self.metrics, choice.state.step if choice is not None else 0)
