"""What the tests of whole training runs share: the smallest run, and functions that run on the ranks."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from harness import error_of

from train.config import TrainConfig
from train.metrics import read_metrics
from train.presets import get_preset

STEPS = 8
HALF = 4


def tiny(out: Path, **fields) -> TrainConfig:
    return get_preset("tiny").replace(**({"run.out_dir": str(out), "run.device": "cpu"} | fields))


def losses(out: Path) -> list[tuple]:
    """What must be equal between two runs; times are not."""
    return [(m.step, m.loss, m.aux_loss, m.lr, m.val_loss) for m in read_metrics(out / "metrics.jsonl")]


def flip_a_byte(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


# Run on the ranks


class Recorder:
    """Callback that notes what it hears."""

    def __init__(self):
        self.heard = []

    def on_step(self, metrics):
        self.heard.append(("step", metrics.step))

    def on_checkpoint(self, info):
        assert (info.folder / "trainer_state.json").is_file()
        self.heard.append(("checkpoint", info.step, info.folder.name))

    def on_end(self, summary):
        assert summary.plot_path.is_file()
        self.heard.append(("end", summary.stats.num_steps))


class SilentComm:
    """A backend without times: with it the trainer leaves DeepSpeed's all-to-all alone."""

    def comm_stats(self, reset=True):
        return {"dispatch_ms": 0.0, "combine_ms": 0.0, "num_calls": 0}


def train(_, config_json: str, swap=None):
    """Train on this rank; returns the summary as a dict and what a callback heard."""
    import torch.distributed as dist
    from deepspeed.moe import sharded_moe

    from train.trainer import run

    before = sharded_moe._AllToAll, dist.is_initialized()
    recorder = Recorder()
    summary = run(TrainConfig.from_json(config_json), swap=swap, callbacks=[recorder])
    assert (sharded_moe._AllToAll, dist.is_initialized()) == before
    return dataclasses.asdict(summary), recorder.heard


def train_error(_, config_json: str):
    """Type and text of the error that a run ends with on this rank."""
    from train.trainer import run

    error = error_of(Exception, lambda: run(TrainConfig.from_json(config_json)))
    return type(error).__name__, str(error)


def train_with_broken_gradients(context, config_json: str, step: int):
    """The error of a run in which one gradient of the last rank's is NaN in this step, while all losses are numbers."""
    from unittest import mock

    from train import trainer

    def build(*args, **kwargs):
        engine = build_engine(*args, **kwargs)
        calls = iter(range(1, 100))

        def spoil(grad):
            return grad * float("nan") if next(calls) == step and context.rank == context.num_ranks - 1 else grad

        next(iter(engine.module.parameters())).register_hook(spoil)
        return engine

    build_engine = trainer.build_engine
    with mock.patch.object(trainer, "build_engine", build):
        return train_error(context, config_json)


def choose(_, root: Path):
    """Name of the checkpoint a resuming run picks and what it passed over, or the error."""
    import torch

    from train.checkpoint import choose_checkpoint
    from train.distributed import World
    from train.errors import CheckpointError

    try:
        choice = choose_checkpoint(root, World(rank=0, world_size=1, device=torch.device("cpu")))
    except CheckpointError as error:
        return "error", (str(error),)
    return choice and (choice.folder.name, choice.skipped)


def initial_weights(_, ep_size: int, ep_rank: int):
    """Initial weights by global name, as [sum, first element]."""
    from train.model import EXPERT_NAME, MoELanguageModel, init_weights

    config = get_preset("tiny").model
    model = MoELanguageModel(config, vocab_size=264, ep_size=ep_size)
    init_weights(model, seed=3, ep_rank=ep_rank)
    local = config.num_experts // ep_size
    return {
        EXPERT_NAME.sub(lambda m: str(ep_rank * local + int(m.group())), name): (float(p.sum()), float(p.view(-1)[0]))
        for name, p in model.named_parameters()
    }


def clipped_gradients(_, config_json: str):
    """Norms of gradients by name, after clipping; before it each had one of its own, decided by its name."""
    import torch

    from train.api import Progress
    from train.distributed import join_world
    from train.optimizer_files import _named_params
    from train.trainer import Trainer

    config = TrainConfig.from_json(config_json)
    with join_world(config.run) as world:
        trainer = Trainer(config, world=world, comm=SilentComm(), callbacks=[], progress=Progress())
        try:
            named = list(_named_params(trainer._engine))
            for each in named:
                _, _, expert = each.name.partition(".deepspeed_experts.")
                each.param.grad = torch.full_like(each.param, 1.0 + int(expert[0]) if expert else 0.01)
            trainer._engine.clip_fp32_gradients()
            return {each.name: float(each.param.grad.double().norm()) for each in named}
        finally:
            trainer.close()


def gradient_norms(_, config_json: str):
    """Norms of all partitions of gradients in a run: as the engine takes them, and as DeepSpeed's optimizer does."""
    from unittest import mock

    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    from train import clipping
    from train.trainer import run

    pairs: list[tuple[float, float]] = []

    def both(optimizer, gradients, params, norm_type=2):
        deepspeeds = DeepSpeedZeroOptimizer.get_grad_norm_direct(optimizer, gradients, params, norm_type)
        norm = partition_norm(optimizer, gradients, params, norm_type)
        assert norm.shape == deepspeeds.shape and norm.dtype == deepspeeds.dtype
        pairs.append((float(norm), float(deepspeeds)))
        return norm

    partition_norm = clipping._partition_norm
    with mock.patch.object(clipping, "_partition_norm", both):
        run(TrainConfig.from_json(config_json))
    return pairs


def convert_optimizer(_, config_json: str, folder: Path):
    """Resume, and write the optimizer's state to `folder` at once; returns experts of a layer here, and the rate."""
    import torch
    from deepspeed.moe.layer import MoE

    from train.api import Progress
    from train.distributed import join_world
    from train.optimizer_files import write_optimizer
    from train.trainer import Trainer

    config = TrainConfig.from_json(config_json)
    torch.set_num_threads(1)
    with join_world(config.run) as world:
        trainer = Trainer(config, world=world, comm=SilentComm(), callbacks=[], progress=Progress())
        try:
            write_optimizer(trainer._engine, folder)
            layers = [module for module in trainer._engine.module.modules() if isinstance(module, MoE)]
            return layers[0].num_local_experts, trainer._engine.get_lr()[0]
        finally:
            trainer.close()


def train_until(context, config_json: str, rank: int, step: int):
    """Train until `rank`, after its step `step`, is asked to stop; returns (last step, stopped, sample)."""
    from train.trainer import run

    recorder = Recorder()
    asked = context.rank == rank
    config = TrainConfig.from_json(config_json)
    # Asked in the middle of a step, so after `step` records the next one is the last.
    summary = run(config, callbacks=[recorder], stop=lambda: asked and len(recorder.heard) >= step - 1)
    return summary.stats.num_steps, summary.stopped, summary.sample, recorder.heard[-2:]


class Replaced(Exception):
    """In place of the end of a process."""


def train_handover(context, config_json: str, rank: int, step: int):
    """Train until `rank` is asked in step `step` to make room; returns the step that was handed over, 0 if none was."""
    from train.trainer import run

    recorder = Recorder()

    class Handover:
        step = 0

        def asked(self):
            return context.rank == rank and len(recorder.heard) == step - 1

        def hand_over(self, step):
            self.step = step
            raise Replaced

    handover = Handover()
    try:
        run(TrainConfig.from_json(config_json), callbacks=[recorder], handover=handover)
    except Replaced:
        assert recorder.heard[-1][:2] == ("checkpoint", step)
    return handover.step
