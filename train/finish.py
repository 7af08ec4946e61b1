"""What a run leaves when it has ended, beside checkpoints: a plot, a sample of text, the count of its parameters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import deepspeed

from train.config import TrainConfig
from train.data import TokenStore
from train.distributed import World
from train.metrics import StepMetrics
from train.sample import sample_tokens
from train.shares import seed_for, seed_torch

_PROMPT_TOKENS = 64
_TEMPERATURE = 0.7


def write_sample(engine: deepspeed.DeepSpeedEngine, config: TrainConfig, store: TokenStore, world: World) -> str:
    """A prompt from the validation data and how the model goes on, the same on all ranks. Collective."""
    seed = seed_for(config.run.seed, "sample")
    seed_torch(seed)
    prompt = store.val_prompt(min(_PROMPT_TOKENS, config.data.seq_len))
    engine.eval()
    ids = sample_tokens(
        engine.module,
        prompt,
        num_tokens=config.run.sample_tokens,
        max_context=config.data.seq_len,
        vocab_size=store.tokenizer.vocab_size,
        temperature=_TEMPERATURE,
        seed=seed,
        world=world,
    )
    engine.train()
    return f"{store.tokenizer.decode(prompt)}⟶{store.tokenizer.decode(ids)}"


def count_params(engine: deepspeed.DeepSpeedEngine, ep_size: int) -> int:
    """Parameters of the whole model: this rank's share of experts counts once for each rank of the EP group."""
    return sum(p.numel() * (1 if getattr(p, "allreduce", True) else ep_size) for p in engine.module.parameters())


def plot(runs: dict[str, Sequence[StepMetrics]], path: Path, *, title: str) -> None:
    """Losses of runs by name, as a PNG."""
    from train.plots import plot_losses  # matplotlib takes most of a second: not of every rank's start

    plot_losses(runs, path, title=title)
