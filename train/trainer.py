"""The training loop. No Ray in here: the same code runs under torchrun, alone, or inside a Ray Train worker.

    torchrun --nproc-per-node 2 -m train.main --preset demo

`run(config)` does everything: data, DeepSpeed engine, resume, steps, validation, checkpoints, plot, sample, summary.
Who wants to hear about it passes callbacks; who brings an all-to-all backend passes `swap`. Every step reseeds torch
from (seed, step, rank), so a resumed run repeats the interrupted one bit for bit. With `run.num_shares` the number of
ranks may change from one start to the next (`shares.py`).
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from train import checkpoint
from train.api import CheckpointInfo, CommStats, Handover, Progress, TrainerCallback, TrainSummary, never
from train.clock import Clock
from train.config import TrainConfig
from train.data import TokenStore, build_token_store
from train.distributed import World, cpu_threads, join_world, mean_over_ranks, on_main
from train.engine import build_engine, has_broken_gradients, quiet_deepspeed
from train.environment import describe_environment
from train.errors import TrainingDivergedError
from train.expert_load import ExpertLoad
from train.files import write_text_atomic
from train.finish import count_params, plot, write_sample
from train.memory import memory_of_step
from train.metrics import MetricsWriter, StepMetrics, run_stats
from train.module_times import ModuleTimes
from train.run_folder import RunFolder
from train.shares import ShareBatches
from train.stock_comm import StockCommTimer
from train.telemetry import CommCounts, StepTelemetry, TelemetryOptions, open_telemetry, record_step, take_counts

logger = logging.getLogger("train")


def run(
    config: TrainConfig,
    *,
    swap: CommStats | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    progress: Progress | None = None,
    stop: Callable[[], bool] = never,
    handover: Handover | None = None,
    telemetry: TelemetryOptions | None = None,
) -> TrainSummary:
    """Train as `config` says and return the summary (the same on every rank). Collective over the job.

    swap: the all-to-all backend already in place, asked for its times; None: this function enables
    `config.run.backend` itself. progress: told where the run is. stop: asked on every rank in every step; once any rank
    says True, all end after that step, with a checkpoint. handover: as `stop`, but the ranks then wait to be replaced.
    telemetry: more places for the numbers of steps. A process
    group that exists already is used and left alive.
    Raises ConfigError, DataError, CheckpointError, TrainingDivergedError, and what the backend raises.
    """
    quiet_deepspeed()
    with cpu_threads(config.run.num_threads), join_world(config.run) as world, _comm(config, swap) as comm:
        progress = Progress() if progress is None else progress
        trainer = Trainer(
            config, world=world, comm=comm, callbacks=callbacks, progress=progress, stop=stop, handover=handover
        )
        try:
            trainer.telemetry = open_telemetry(config.run, world.rank, telemetry or TelemetryOptions())
            return trainer.run()
        finally:
            trainer.close()


def _comm(config: TrainConfig, swap: CommStats | None):
    if swap is not None:
        return nullcontext(swap)
    if config.run.backend == "stock":
        return StockCommTimer()
    from ray_deepep import CommConfig  # the stock backend needs no ray_deepep
    from ray_deepep.deepspeed import SwapConfig, enable

    return enable(SwapConfig(comm=CommConfig(time_gpu_calls=True)))


class Trainer:
    """One run on one rank: built from the config, resumed if asked, then stepped to the end by `run`."""

    def __init__(
        self,
        config: TrainConfig,
        *,
        world: World,
        comm: CommStats,
        callbacks: Sequence[TrainerCallback],
        progress: Progress,
        stop: Callable[[], bool] = never,
        handover: Handover | None = None,
    ):
        self.config = config
        self.world = world
        self._comm = comm
        self._callbacks = callbacks
        self._progress = progress
        self.telemetry: StepTelemetry | None = None
        self._stop_asked = stop
        self._comm_step = CommCounts()
        self._handover = handover
        self._stopping = self._yielding = False  # the same on all ranks
        progress.phase = "setup"
        self._engine = None
        self._writer: MetricsWriter | None = None
        self._folder = RunFolder(config.run, world)
        self._last_checkpoint: Path | None = None
        self._start_step = 0
        self._steps: list[StepMetrics] = []
        self._load = ExpertLoad(config.run, world)
        config.resolve_ep_size(world.world_size)  # refuse a degree that does not fit before anything is written
        on_main(world, lambda: self._folder.prepare(config))
        bar = config.run.progress and world.is_main
        on_main(world, lambda: build_token_store(config.data, self._folder.data, progress=bar))
        self._store = TokenStore(self._folder.data)
        self._shares = ShareBatches(config, self._store, world)
        choice = self._folder.choose_checkpoint(config, data_digest=self._store.info.content_digest)
        on_main(world, lambda: self._note_start(choice))
        self._engine = build_engine(
            config,
            vocab_size=self._store.info.vocab_size,
            world=world,
            num_micro_steps=len(self._shares.train_steps),
        )
        self._parts = ModuleTimes(self._engine.module) if config.run.split else None
        self._resume(choice)

    def close(self) -> None:
        """Close the metrics file and let DeepSpeed free what it holds. Not collective."""
        if self._writer is not None:
            self._writer.close()
        if self.telemetry is not None:
            self.telemetry.close()
        if self._engine is not None:
            self._engine.destroy()

    def _note_start(self, choice: checkpoint.CheckpointChoice | None) -> None:
        ep_size = self.config.resolve_ep_size(self.world.world_size)
        environment = describe_environment(self.world, ep_size=ep_size)
        self._folder.note_start(step=choice.state.step if choice is not None else 0, environment=environment)

    def _resume(self, choice: checkpoint.CheckpointChoice | None) -> None:
        if choice is not None:
            checkpoint.load_checkpoint(self._engine, choice)
            self._start_step = choice.state.step
            self._last_checkpoint = choice.folder
            if self.world.is_main:
                for reason in choice.skipped:
                    logger.warning("checkpoint passed over: %s", reason)
                logger.info("resumed from %s (step %d)", choice.folder, choice.state.step)
        # Given to all ranks, because the metrics file is rank 0's and every rank makes the same summary.
        self._steps = on_main(self.world, lambda: self._folder.earlier_metrics(choice))
        if self.world.is_main:
            self._writer = MetricsWriter(self._folder.metrics)

    # Steps

    def run(self) -> TrainSummary:
        """Step to `run.steps`, then plot, sample and summarise. Collective."""
        config = self.config
        self._engine.train()
        with self._progress_bar() as bar:
            for step in range(self._start_step + 1, config.run.steps + 1):
                metrics = self._step(step)
                if self._due(step, config.run.eval_every):
                    metrics = replace(metrics, val_loss=self._validate())
                self._record(metrics, bar)
                if self._stopping or self._yielding or self._due(step, config.run.checkpoint_every):
                    self._save(step)
                if self._stopping:
                    break
                if self._yielding and step < config.run.steps:
                    self._progress.phase = "handover"
                    self._handover.hand_over(step)
        return self._finish()

    def _due(self, step: int, every: int) -> bool:
        return step == self.config.run.steps or (every > 0 and step % every == 0)

    def _progress_bar(self) -> tqdm:
        run = self.config.run
        return tqdm(
            total=run.steps,
            initial=self._start_step,
            desc=f"{self.config.name} · {run.backend}",
            unit="step",
            disable=not (run.progress and self.world.is_main),
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 5.0,  # each update is a line where output is a log
        )

    def _step(self, step: int) -> StepMetrics:
        optim = self.config.optim
        self._progress.step = step
        take_counts(self._comm)
        if self._parts is not None:
            self._parts.take()  # those of a validation
        lr = self._engine.get_lr()[0]
        clock = Clock()
        local_losses = self._forward_backward_update(step, clock)
        step_ms = clock.total_ms
        self._progress.phase = "metrics"
        counts = self._comm_step = take_counts(self._comm)
        num_calls = counts.num_dispatch + counts.num_combine
        # One reduction for all; wishes to stop travel along, so that every rank hears of them in the same step.
        wishes = [float(self._stop_asked()), float(self._handover is not None and self._handover.asked())]
        broken = float(has_broken_gradients(self._engine))
        loss, aux_loss, dispatch_ms, combine_ms, comm_calls, broken, stop, handover = mean_over_ranks(
            [*local_losses, counts.dispatch_ms, counts.combine_ms, num_calls, broken, *wishes], self.world
        )
        self._stopping, self._yielding = stop > 0, handover > 0
        if not math.isfinite(loss):
            raise TrainingDivergedError(step, loss)
        if broken > 0:
            raise TrainingDivergedError(step, math.nan, "gradients' norm")
        num_tokens = self._shares.num_shares * optim.micro_batch * optim.grad_accum * self.config.data.seq_len
        return StepMetrics(
            step=step,
            loss=loss,
            aux_loss=aux_loss,
            lr=lr,
            tokens_per_s=num_tokens / (step_ms / 1e3),
            step_ms=step_ms,
            forward_ms=clock.ms["forward"],
            backward_ms=clock.ms["backward"],
            optimizer_ms=clock.ms["optimizer"],
            dispatch_ms=dispatch_ms,
            combine_ms=combine_ms,
            comm_calls=comm_calls,
            time_s=time.time(),
            world_size=self.world.world_size,
            expert_tokens=self._load.take(step),
            memory_bytes=memory_of_step(step, self.config.run.steps, self.world.device),
            **(self._parts.split(counts.dispatch_ms + counts.combine_ms) if self._parts else {}),
        )

    def _forward_backward_update(self, step: int, clock: Clock) -> list[float]:
        """One optimizer step; returns this rank's language-model and load-balancing loss."""
        num_micro_steps = len(self._shares.train_steps)
        losses = torch.zeros(2, dtype=torch.float64, device=self.world.device)
        self._progress.phase = "data"
        for micro, batch in self._shares.train(step):
            self._progress.phase = "forward"
            output = self._engine(batch.tokens_BS.to(self.world.device), batch.targets_BS.to(self.world.device))
            clock.lap("forward")
            self._progress.phase = "backward"
            self._engine.backward(output.total * micro.weight)
            clock.lap("backward")
            self._progress.phase = "optimizer"
            self._engine.step()
            clock.lap("optimizer")
            losses += torch.stack([output.lm, output.aux]).double() * micro.weight / num_micro_steps
            if micro.weight:
                self._load.add(output.expert_tokens)
            self._progress.phase = "data"
        return losses.tolist()

    @torch.no_grad()
    def _validate(self) -> float:
        self._progress.phase = "validation"
        self._engine.eval()
        total = 0.0
        for micro, batch in self._shares.validation():
            output = self._engine.module(batch.tokens_BS.to(self.world.device), batch.targets_BS.to(self.world.device))
            total += float(output.lm) * micro.weight
        self._engine.train()
        return mean_over_ranks([total / len(self._shares.val_steps)], self.world)[0]

    def _record(self, metrics: StepMetrics, bar: tqdm) -> None:
        self._progress.phase = "callbacks"
        self._steps.append(metrics)
        if self._writer is not None:
            self._writer.write(metrics)
        record_step(self.telemetry, metrics, self._comm_step)
        shown = {"loss": f"{metrics.loss:.3f}", "tok/s": f"{metrics.tokens_per_s:,.0f}"}
        validated = [m.val_loss for m in self._steps if m.val_loss is not None]
        if validated:
            shown["val"] = f"{validated[-1]:.3f}"
        bar.set_postfix(shown, refresh=False)
        bar.update()
        for callback in self._callbacks:
            callback.on_step(metrics)

    def _save(self, step: int) -> None:
        config = self.config
        self._progress.phase = "checkpoint"
        state = checkpoint.TrainerState(
            step=step,
            world_size=self.world.world_size,
            ep_size=config.resolve_ep_size(self.world.world_size),
            num_shares=self._shares.num_shares,
            by_name=config.run.is_elastic,
            backend=config.run.backend,
            config_digest=config.digest(),
            config_identity=config.identity(),
            data_digest=self._store.info.content_digest,
            files={},
        )
        folder = checkpoint.save_checkpoint(
            self._engine, self._folder.checkpoints, state=state, keep=config.run.keep_checkpoints, world=self.world
        )
        self._last_checkpoint = folder
        for callback in self._callbacks:
            callback.on_checkpoint(CheckpointInfo(step=step, folder=folder, metrics=self._steps[-1]))

    # The end

    def _finish(self) -> TrainSummary:
        config = self.config
        self._progress.phase = "summary"
        stopped = self._stopping and self._steps[-1].step < config.run.steps
        sample = ""
        if config.run.sample_tokens and not stopped:
            sample = write_sample(self._engine, config, self._store, self.world)
            on_main(self.world, lambda: write_text_atomic(self._folder.sample, sample + "\n"))
        title = f"{config.name} on {self.world.world_size} ranks"
        on_main(self.world, lambda: plot({config.run.backend: self._steps}, self._folder.plot, title=title))
        ep_size = config.resolve_ep_size(self.world.world_size)
        summary = TrainSummary(
            preset=config.name,
            backend=config.run.backend,
            world_size=self.world.world_size,
            ep_size=ep_size,
            device=self.world.device.type,
            num_params=count_params(self._engine, ep_size),
            resumed_from_step=self._start_step,
            stats=run_stats(self._steps),
            out_dir=self._folder.root,
            metrics_path=self._folder.metrics,
            plot_path=self._folder.plot,
            checkpoint_path=self._last_checkpoint,
            stopped=stopped,
            sample=sample,
        )
        # Times are each rank's own; rank 0's are the ones in the metrics file.
        summary = on_main(self.world, lambda: summary)
        for callback in self._callbacks:
            callback.on_end(summary)
        return summary
