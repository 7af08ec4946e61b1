"""What decoding takes from a training run: config, newest good checkpoint, tokenizer, and the weights of one rank.

A checkpoint has a file for every expert, named by the expert's global id, and one for all that is not an expert. So
the ranks that decode need not be as many as those that trained; their number only has to divide the experts.
"""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ray_deepep import run_files
from train.checkpoint import choose_checkpoint
from train.config import TrainConfig
from train.convert import require
from train.distributed import World
from train.engine import padded_vocab_size
from train.errors import CheckpointError, ConfigError
from train.model import EXPERT_NAME, MoELanguageModel
from train.tokenizer import Tokenizer, load_tokenizer

_HOW_TO_GET_ONE = "`make demo` makes runs/demo/ray_deepep, and `python -m train.main --preset demo` makes runs/demo"


@dataclass(frozen=True, kw_only=True)
class DecodeRun:
    """A run that can be decoded with; made by `open_run`."""

    folder: Path
    """The run's folder. All ranks must see it."""
    checkpoint: Path
    """Its newest good checkpoint."""
    step: int
    """Optimizer steps done there."""
    config: TrainConfig
    """What the run was made of."""
    vocab_size: int
    """Ids that the tokenizer can give."""

    @property
    def context(self) -> int:
        """Most ids C of a sequence, prompt and drawn ones: as many as the model saw in training."""
        return self.config.data.seq_len

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the run's text."""
        text = (self.folder / "data" / "tokenizer.json").read_text(encoding="utf-8")
        return load_tokenizer(self.config.data.tokenizer, text)


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A text to continue."""

    index: int
    """Its number among the prompts of all ranks; with the seed it decides the draws."""
    ids: tuple[int, ...]
    """Its tokens, at least one, fewer than the context."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to continue. Raises ConfigError for a value that breaks a rule."""

    num_tokens: int = 64
    """Most ids to draw for a prompt."""
    temperature: float = 0.0
    """0: always the most likely id. Else scores are divided by it, and ids drawn."""
    seed: int = 0
    """Decides the draws, with a prompt's index: neither its rank nor the prompts beside it do."""
    stop_id: int | None = None
    """An id that ends a sequence, for instance the tokenizer's `end_id`. None: no id does."""

    def __post_init__(self) -> None:
        require(self.num_tokens >= 1, "--num-tokens", self.num_tokens, "must be at least 1")
        ok = math.isfinite(self.temperature) and self.temperature >= 0
        require(ok, "--temperature", self.temperature, "must be a finite number, at least 0")
        require(self.seed >= 0, "--seed", self.seed, "must be at least 0")


def open_run(folder: Path, *, num_ranks: int) -> DecodeRun:
    """Look at a run's folder and verify its newest good checkpoint. Not collective: for whoever starts the ranks.

    Raises ConfigError if this is no run's folder or `num_ranks` does not divide its experts, CheckpointError if the
    run has no good checkpoint.
    """
    settings = folder / run_files.CONFIG
    rule = f"must be the folder of a training run (it has no {settings.name}); {_HOW_TO_GET_ONE}"
    require(settings.is_file(), "--run", str(folder), rule)
    config = TrainConfig.from_file(settings)
    num_experts = config.model.num_experts
    fits = num_ranks >= 1 and num_experts % num_ranks == 0
    require(fits, "--ranks", num_ranks, f"must divide the model's {num_experts} experts")
    root = folder / run_files.CHECKPOINTS
    choice = choose_checkpoint(root, World(rank=0, world_size=1, device=torch.device("cpu")))
    if choice is None:
        raise CheckpointError(str(root), "holds no complete checkpoint: let the run come to its first one")
    meta = folder / "data" / "meta.json"
    try:
        vocab_size = int(json.loads(meta.read_text(encoding="utf-8"))["vocab_size"])
    except (OSError, ValueError, KeyError) as error:
        rule = f"must hold the tokens of its text ({meta}: {error})"
        raise ConfigError("--run", str(folder), rule) from error
    return DecodeRun(
        folder=folder.resolve(),  # ranks may work elsewhere
        checkpoint=choice.folder.resolve(),
        step=choice.state.step,
        config=config,
        vocab_size=vocab_size,
    )


def encode_prompts(run: DecodeRun, texts: Sequence[str]) -> list[Prompt]:
    """Prompts of `texts`. Raises ConfigError for one that is empty or leaves no room in the context."""
    tokenizer = run.tokenizer()
    prompts = [Prompt(index=i, ids=tuple(int(t) for t in tokenizer.encode(text))) for i, text in enumerate(texts)]
    for text, prompt in zip(texts, prompts, strict=True):
        shown = text if len(text) <= 40 else f"{text[:40]}…"
        require(len(prompt.ids) >= 1, "--prompt", shown, "must not be empty")
        rule = f"must be shorter than the context of {run.context} tokens; it has {len(prompt.ids)}"
        require(len(prompt.ids) < run.context, "--prompt", shown, rule)
    return prompts


def share_prompts(prompts: Sequence[Prompt], num_ranks: int, *, max_tokens: int) -> list[list[Prompt]]:
    """The prompts of each rank, in turns; a rank may get none. Raises ConfigError if one gets over `max_tokens`."""
    room = num_ranks * max_tokens
    require(len(prompts) <= room, "--prompt", f"{len(prompts)} prompts", f"must be at most {room}")
    return [list(prompts[rank::num_ranks]) for rank in range(num_ranks)]


def load_model(run: DecodeRun, *, rank: int, num_ranks: int, device: torch.device) -> MoELanguageModel:
    """The model with all dense weights and this rank's own experts, in evaluation mode. Not collective.

    Rank r of N has the experts r·E/N to (r+1)·E/N − 1. Raises CheckpointError naming a file that cannot be read or
    does not fit the run's config.
    """
    config = run.config.model
    with torch.device("meta"):  # no memory for weights that are replaced at once
        model = MoELanguageModel(config, vocab_size=padded_vocab_size(run.vocab_size), ep_size=num_ranks)
    num_local = config.num_experts // num_ranks
    weights = _read(run.checkpoint / "mp_rank_00_model_states.pt")["module"]
    for layer in range(sum(config.is_moe_layer(block) for block in range(config.num_layers))):
        for local in range(num_local):
            file = f"layer_{layer}_expert_{rank * num_local + local}_mp_rank_00_model_states.pt"
            expert = _read(run.checkpoint / file)
            weights |= {EXPERT_NAME.sub(str(local), name): weight for name, weight in expert.items()}
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        problem = f"does not fit the run's config ({' '.join(str(error).split())})"
        raise CheckpointError(str(run.checkpoint), problem) from error
    return model.to(device).eval().requires_grad_(False)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        # Mapped: of the dense file only weights are wanted, not the rest of what DeepSpeed keeps there.
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(str(path), f"cannot be read ({error})") from error
