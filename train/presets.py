"""Ready-made configs, from a test of seconds to a cluster. Override fields with `--set section.field=value`."""

from __future__ import annotations

from types import MappingProxyType

from train.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from train.errors import ConfigError

TINY = TrainConfig(
    name="tiny",
    model=ModelConfig(hidden=32, num_layers=2, num_heads=2, num_experts=4, num_topk=2, expert_hidden=32),
    data=DataConfig(seq_len=32, max_bytes=64 * 2**10),
    optim=OptimConfig(micro_batch=4, lr=5e-3, warmup_steps=2),
    run=RunConfig(
        out_dir="runs/tiny", steps=8, eval_every=4, eval_batches=2, checkpoint_every=4, sample_tokens=16, progress=False
    ),
)
"""Tests: some seconds on one core."""

DEMO = TrainConfig(
    name="demo",
    model=ModelConfig(hidden=192, num_layers=2, num_heads=6, num_experts=8, num_topk=2, expert_hidden=256),
    data=DataConfig(seq_len=128, max_bytes=4 * 2**20),
    optim=OptimConfig(micro_batch=8, lr=4e-3, warmup_steps=20),
    run=RunConfig(out_dir="runs/demo", steps=120, eval_every=40, checkpoint_every=60, sample_tokens=120),
)
"""The README's demo: about a minute with 2 workers on 2 cores."""

SMALL = TrainConfig(
    name="small",
    model=ModelConfig(hidden=384, num_layers=6, num_heads=6, num_experts=16, num_topk=2, expert_hidden=768),
    data=DataConfig(seq_len=256, max_bytes=32 * 2**20),
    optim=OptimConfig(micro_batch=16, lr=1e-3, warmup_steps=100, zero_stage=1),
    run=RunConfig(out_dir="runs/small", steps=2000, eval_every=200, checkpoint_every=500, sample_tokens=256),
)
"""A workstation, with or without a GPU: hours on CPU cores, minutes on one GPU."""

PAIR = TrainConfig(
    name="pair",
    model=ModelConfig(
        hidden=2048, num_layers=4, num_heads=16, num_experts=64, num_topk=8, expert_hidden=512, dtype="bf16"
    ),
    data=DataConfig(seq_len=1024, max_bytes=32 * 2**20),
    optim=OptimConfig(micro_batch=4, lr=3e-4, warmup_steps=50, zero_stage=1),
    run=RunConfig(out_dir="runs/pair", steps=300, eval_every=100, eval_batches=4, checkpoint_every=0),
)
"""Two GPUs of one host, a minute or two: to compare backends. Its one checkpoint takes 11 GB."""

NODE = TrainConfig(
    name="node",
    model=ModelConfig(
        hidden=2048,
        num_layers=16,
        num_heads=16,
        num_experts=64,
        num_topk=8,
        expert_hidden=1024,
        dtype="bf16",
        activation_checkpointing=True,
    ),
    data=DataConfig(seq_len=2048, max_bytes=0, tokenizer="bpe", bpe_vocab=32768),
    optim=OptimConfig(micro_batch=2, grad_accum=8, lr=4e-4, warmup_steps=500, zero_stage=1),
    run=RunConfig(out_dir="runs/node", steps=20000, eval_every=500, eval_batches=16, checkpoint_every=1000),
)
"""One node of 8 GPUs. Pass `--data`: the default corpus is far too small for it."""

CLUSTER = TrainConfig(
    name="cluster",
    model=ModelConfig(
        hidden=4096,
        num_layers=32,
        num_heads=32,
        num_experts=128,
        num_topk=8,
        expert_hidden=1536,
        ep_size=32,
        dtype="bf16",
        activation_checkpointing=True,
    ),
    data=DataConfig(seq_len=4096, max_bytes=0, tokenizer="bpe", bpe_vocab=65536),
    optim=OptimConfig(micro_batch=1, grad_accum=8, lr=2.5e-4, warmup_steps=2000, zero_stage=2),
    run=RunConfig(out_dir="runs/cluster", steps=100000, eval_every=1000, eval_batches=16, checkpoint_every=1000),
)
"""Nodes of 8 GPUs, 4 of them to an EP group. Pass `--data` and an `--out` folder that all nodes share."""

PRESETS = MappingProxyType({config.name: config for config in (TINY, DEMO, SMALL, PAIR, NODE, CLUSTER)})
"""Every preset by name."""


def get_preset(name: str) -> TrainConfig:
    """The preset called `name`. Raises ConfigError naming the known ones."""
    if name not in PRESETS:
        raise ConfigError("preset", name, f"must be one of {', '.join(PRESETS)}")
    return PRESETS[name]
