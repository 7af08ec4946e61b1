"""The DeepSpeed engine of a run: its JSON config, its parameter groups, its model with deterministic weights."""

from __future__ import annotations

import argparse
import functools
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.utils import groups, logger

from train.clipping import clip_as_deepspeed, clip_whole_gradient, take_norms_at_once
from train.config import TrainConfig
from train.distributed import World
from train.errors import ConfigError
from train.model import MoELanguageModel, init_weights, split_for_weight_decay
from train.optimizer_files import check_optimizer

_VOCAB_MULTIPLE = 8
_NEVER = 10**9


def deepspeed_config(config: TrainConfig, *, num_micro_steps: int | None = None) -> dict[str, Any]:
    """DeepSpeed's JSON config for this run; the keys of `run.deepspeed_config`, if given, replace generated ones.

    num_micro_steps: passes of a rank for one step; None: `optim.grad_accum`.

    Raises ConfigError when that file cannot be read, contradicts the batch size or asks for what MoE cannot do.
    """
    generated = _generated_config(config)
    if config.run.deepspeed_config:
        user = _read_json(config.run.deepspeed_config)
        for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
            given = user.get(key, "auto")
            if given not in ("auto", generated[key]):
                rule = f"contradicts this run's {generated[key]}; leave it out or set it to auto"
                raise ConfigError(f"{config.run.deepspeed_config}: {key}", given, rule)
            user[key] = generated[key]
        if config.run.is_elastic and "train_batch_size" in user:
            rule = "must be left out of an elastic run: DeepSpeed's count of it changes with the number of ranks"
            raise ConfigError(f"{config.run.deepspeed_config}: train_batch_size", user["train_batch_size"], rule)
        for key, section in user.items():
            if isinstance(generated.get(key), dict) and not isinstance(section, dict):
                raise ConfigError(f"{config.run.deepspeed_config}: {key}", section, "must be a JSON object")
        generated |= user
    stage = generated.get("zero_optimization", {}).get("stage", 0)
    if stage not in (0, 1, 2):
        raise ConfigError("zero_optimization.stage", stage, "DeepSpeed's MoE layer supports 0, 1 and 2")
    if num_micro_steps is not None:
        generated["gradient_accumulation_steps"] = num_micro_steps
    return generated


def _generated_config(config: TrainConfig) -> dict[str, Any]:
    optim = config.optim
    betas = [optim.beta1, optim.beta2]
    # torch_adam: DeepSpeed's own fused Adam would be compiled on first use, and is no faster on the CPU.
    adam = {"lr": optim.lr, "betas": betas, "weight_decay": optim.weight_decay, "torch_adam": True}
    schedule = {
        "total_num_steps": max(config.run.steps, optim.warmup_steps + 1),
        "warmup_num_steps": optim.warmup_steps,
        "warmup_min_ratio": 1.0 / optim.warmup_steps,
        "warmup_type": "linear",
        "cos_min_ratio": optim.min_lr_ratio,
    }
    generated = {
        "train_micro_batch_size_per_gpu": optim.micro_batch,
        "gradient_accumulation_steps": optim.grad_accum,
        "gradient_clipping": optim.grad_clip,
        "optimizer": {"type": "AdamW", "params": adam},
        "scheduler": {"type": "WarmupCosineLR", "params": schedule},
        "zero_optimization": {"stage": optim.zero_stage},
        "steps_per_print": _NEVER,
    }
    if config.model.dtype == "bf16":
        # With clipping, the norm that it takes shows an overflow: no need for eight operations per parameter and step.
        generated["bf16"] = {"enabled": True, "check_grad_overflow": optim.grad_clip == 0}
    return generated


def has_broken_gradients(engine: deepspeed.DeepSpeedEngine) -> bool:
    """Whether weights were just changed by gradients that are no finite numbers.

    Waits for the step. False where no norm is taken, and where DeepSpeed left such a step out.
    """
    norm = engine.get_global_grad_norm()
    return norm is not None and not getattr(engine.optimizer, "overflow", False) and not 0 <= float(norm) < math.inf


def _read_json(path: str) -> dict[str, Any]:
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError("run.deepspeed_config", path, f"must be a readable JSON file ({error})") from error
    if not isinstance(raw, dict):
        raise ConfigError("run.deepspeed_config", path, "must hold a JSON object")
    return raw


def padded_vocab_size(vocab_size: int) -> int:
    """Rows of embedding and head: the next multiple of 8, which matrix units like."""
    return -(-vocab_size // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE


def build_engine(
    config: TrainConfig, *, vocab_size: int, world: World, num_micro_steps: int
) -> deepspeed.DeepSpeedEngine:
    """Model with weights decided by the seed, its optimizer groups, and DeepSpeed around them. Collective.

    num_micro_steps: passes of each rank for one step.
    """
    ds_config = deepspeed_config(config, num_micro_steps=num_micro_steps)
    ep_size = config.resolve_ep_size(world.world_size)
    data_before_expert = bool(ds_config.get("use_data_before_expert_parallelism", False))
    ep_rank = _ep_rank(world, ep_size, data_before_expert)
    with world.device:  # a GPU copies the experts in no time
        model = MoELanguageModel(config.model, vocab_size=padded_vocab_size(vocab_size), ep_size=ep_size)
    init_weights(model, seed=config.run.seed, ep_rank=ep_rank)
    param_groups = split_for_weight_decay(model, config.optim.weight_decay)
    engine, *_ = deepspeed.initialize(
        args=_place(world),
        model=model,
        model_parameters=split_params_into_different_moe_groups_for_optimizer(param_groups),
        config=_with_fused_adam(ds_config, world),
    )
    name = f"ep_size_{ep_size}"
    if engine.has_moe_layers and groups._get_expert_parallel_rank(name) != ep_rank:
        # Experts would carry another expert's initial weights; a DeepSpeed release with a new rank order would do it.
        raise RuntimeError(f"DeepSpeed put rank {world.rank} at another place of its EP group than {ep_rank}")
    if config.run.is_elastic:
        check_optimizer(engine)
    if not engine.zero_optimization():
        clip = clip_whole_gradient if config.run.is_elastic else clip_as_deepspeed
        engine.clip_fp32_gradients = functools.partial(_clip, engine, clip)
    take_norms_at_once(engine.optimizer)
    return engine


def _place(world: World) -> argparse.Namespace | None:
    """Tells DeepSpeed this process's GPU: it takes LOCAL_RANK for it, which is another one where ranks share a GPU."""
    return argparse.Namespace(device_rank=world.device.index) if world.device.type == "cuda" else None


def _clip(engine: deepspeed.DeepSpeedEngine, clip: Callable[[deepspeed.DeepSpeedEngine], float]) -> None:
    engine._global_grad_norm = clip(engine)  # where ZeRO's optimizers leave it


def _with_fused_adam(ds_config: dict[str, Any], world: World) -> dict[str, Any]:
    """On GPUs, torch's AdamW in one kernel instead of a pass over memory for each operation; unless the user says."""
    optimizer = ds_config.get("optimizer", {})
    params = optimizer.get("params", {})
    if world.device.type != "cuda" or not params.get("torch_adam") or {"fused", "foreach"} & params.keys():
        return ds_config
    return ds_config | {"optimizer": optimizer | {"params": params | {"fused": True}}}


def _ep_rank(world: World, ep_size: int, data_before_expert: bool) -> int:
    """Place in the EP group: DeepSpeed takes consecutive ranks, or strided ones with data before expert parallelism."""
    return world.rank // (world.world_size // ep_size) if data_before_expert else world.rank % ep_size


def quiet_deepspeed() -> None:
    """Only errors from DeepSpeed's logger: its notes on every start would drown the progress bar."""
    logger.setLevel(logging.ERROR)
