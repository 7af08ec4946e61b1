"""A small model in a real DeepSpeed engine: swapped, it has the losses of stock bit for bit, and its checkpoints."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed_cases import HIDDEN, Expert, seeded_weights, start_deepspeed, swap_config
from harness import RankContext, Ranks

from ray_deepep.deepspeed import SwapConfig, enable
from ray_deepep.deepspeed.grouped import stacked

NUM_STEPS = 3
NUM_CLASSES = 11


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineCase:
    """One way to train."""

    stage: int = 0
    """ZeRO stage."""
    bf16: bool = False
    accumulate: int = 1
    """Gradient accumulation steps."""
    k: int = 2
    ep_size: int = 2
    recompute: bool = False
    """Activation checkpointing."""

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in vars(self).items() if value != getattr(EngineCase, name))


class Model(torch.nn.Module):
    """Three blocks with a MoE layer each, of two geometries, one of them residual."""

    def __init__(self, case: EngineCase) -> None:
        super().__init__()
        self.recompute = case.recompute
        self.inlet = torch.nn.Linear(HIDDEN, HIDDEN)
        self.blocks = torch.nn.ModuleList(
            MoE(HIDDEN, Expert(), num_experts=8, ep_size=case.ep_size, k=k, capacity_factor=1.25, use_residual=residual)
            for k, residual in ((case.k, False), (1, True), (case.k, False))
        )
        self.outlet = torch.nn.Linear(HIDDEN, NUM_CLASSES)

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        hidden, loss = self.inlet(x), torch.zeros((), dtype=torch.float32)
        for block in self.blocks:
            if self.recompute:
                out, l_aux, _ = torch.utils.checkpoint.checkpoint(block, hidden, use_reentrant=False)
            else:
                out, l_aux, _ = block(hidden)
            hidden, loss = hidden + out, loss + 0.01 * l_aux
        logits = self.outlet(hidden).float()
        return loss + torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())


def make_engine(case: EngineCase) -> deepspeed.DeepSpeedEngine:
    model = Model(case)
    seeded_weights(model, 3)
    for index, block in enumerate(model.blocks):
        first = dist.get_rank() % case.ep_size * block.num_local_experts
        for local, expert in enumerate(block.deepspeed_moe.experts.deepspeed_experts):
            seeded_weights(expert, 100 * index + first + local)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": case.accumulate,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": case.stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": case.bf16},
    }
    parameters = {"params": list(model.parameters()), "name": "all"}
    groups = split_params_into_different_moe_groups_for_optimizer(parameters)
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def train(engine: deepspeed.DeepSpeedEngine, steps: range) -> list[float]:
    """Losses of this rank; data and random numbers depend on the step and the rank alone."""
    losses = []
    for index in steps:
        for micro in range(engine.gradient_accumulation_steps()):
            seed = (index * 10 + micro) * 100 + dist.get_rank()
            generator = torch.Generator().manual_seed(seed)
            x = torch.randn(2, 12, HIDDEN, generator=generator)
            target = torch.randint(0, NUM_CLASSES, (2, 12), generator=generator)
            torch.manual_seed(seed)
            loss = engine(x.bfloat16() if engine.bfloat16_enabled() else x, target)
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    return losses


def weights(engine: deepspeed.DeepSpeedEngine) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in engine.module.state_dict().items()}


def check_training(context: RankContext, case: EngineCase, config: SwapConfig, bit_equal: bool) -> None:
    start_deepspeed()
    stock = make_engine(case)
    expected, expected_weights = train(stock, range(NUM_STEPS)), weights(stock)
    stock.destroy()
    engine = make_engine(case)
    with enable(config) as swap:
        losses = train(engine, range(NUM_STEPS))
        assert len(swap.buffers) == 2 and swap.comm_stats()["num_calls"] > 0
        buffers = swap.buffers
        engine.destroy()
        assert swap.buffers == () and all(buffer.closed for buffer in buffers)
    assert losses[-1] != losses[0]
    if bit_equal:
        assert losses == expected
        assert all(torch.equal(value, expected_weights[name]) for name, value in weights(engine).items())
    else:
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "case",
    (
        EngineCase(),
        EngineCase(accumulate=2, k=4),
        EngineCase(stage=1),
        EngineCase(stage=2, accumulate=2),
        EngineCase(stage=1, bf16=True, accumulate=2, k=4),
        EngineCase(stage=2, bf16=True),
        EngineCase(recompute=True),
    ),
    ids=str,
)
def test_losses_are_bit_equal(ranks: Ranks, transport: str, case: EngineCase) -> None:
    ranks.run(2, check_training, case, swap_config(transport), True)


def test_losses_with_expert_data_parallelism(ranks: Ranks, transport: str) -> None:
    """Four ranks, two EP groups of two, whose expert gradients ZeRO-2 reduces between groups."""
    ranks.run(4, check_training, EngineCase(stage=2), swap_config(transport), True)


@pytest.mark.parametrize("stage", (0, 2))
def test_losses_compact_and_fast_are_close(ranks: Ranks, transport: str, stage: int) -> None:
    ranks.run(2, check_training, EngineCase(stage=stage), swap_config(transport, "compact", "fast"), False)


def check_checkpoint(context: RankContext, folder: str, case: EngineCase, transport: str, writer_swaps: bool) -> None:
    """Two steps, a checkpoint, two steps: the other backend continues from it with the same losses and weights."""
    start_deepspeed()

    def run(swaps: bool, save: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
        engine = make_engine(case)
        swap = enable(swap_config(transport)) if swaps else None
        try:
            if save:
                train(engine, range(2))
                engine.save_checkpoint(folder)
            else:
                path, _ = engine.load_checkpoint(folder)
                assert path is not None
            return train(engine, range(2, 4)), weights(engine)
        finally:
            if swap is not None:
                swap.close()

    losses, final = run(writer_swaps, save=True)
    continued, continued_final = run(not writer_swaps, save=False)
    assert continued == losses and continued_final.keys() == final.keys()
    assert all(torch.equal(value, final[name]) for name, value in continued_final.items())
    if context.rank == 0:
        names = {path.name for path in pathlib.Path(folder).rglob("layer_*")}
        assert {f"layer_0_expert_{expert}_mp_rank_00_model_states.pt" for expert in range(8)} <= names


@pytest.mark.parametrize("writer_swaps", (False, True), ids=("stock writes", "swap writes"))
@pytest.mark.parametrize("stage", (0, 1, 2))
def test_checkpoints_are_exchangeable(ranks: Ranks, tmp_path: pathlib.Path, stage: int, writer_swaps: bool) -> None:
    ranks.run(2, check_checkpoint, str(tmp_path), EngineCase(stage=stage), "reference", writer_swaps)


def grouped_losses(context: RankContext, case: EngineCase) -> bool:
    """Whether the weights of experts lie so that they are used without a copy; losses are those of the loop, nearly."""
    start_deepspeed()
    expected = train(make_engine(case), range(NUM_STEPS))
    with enable(swap_config("reference", experts="grouped")):
        engine = make_engine(case)
        losses = train(engine, range(NUM_STEPS))
        assert losses == pytest.approx(expected, abs=1e-4), (losses, expected)
        experts = engine.module.blocks[0].deepspeed_moe.experts.deepspeed_experts
        weights = [expert.up.weight for expert in experts]
        return stacked(weights).data_ptr() == weights[0].data_ptr()


@pytest.mark.parametrize(
    ("case", "flat"),
    (
        (EngineCase(), False),
        (EngineCase(stage=1), True),
        (EngineCase(stage=2, accumulate=2), True),
        (EngineCase(recompute=True), False),
    ),
    ids=str,
)
def test_losses_with_grouped_experts(ranks: Ranks, case: EngineCase, flat: bool) -> None:
    assert ranks.run(2, grouped_losses, case) == [flat] * 2
