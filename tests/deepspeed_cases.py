"""What the DeepSpeed tests share: layers with known weights on every rank, and one step whose every result is compared.

Functions here run on the ranks of ``harness.RankPool``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from harness import CASE_CONFIG, RankContext

from ray_deepep import CommConfig
from ray_deepep.deepspeed import SwapConfig

HIDDEN = 16
NUM_EXPERTS = 8

Results = dict[str, torch.Tensor]


def start_deepspeed() -> None:
    """DeepSpeed on the harness's process group."""
    # Compiles for a minute otherwise; it serves tensor-parallel inference only.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ.setdefault("LOCAL_RANK", "0")
    deepspeed.init_distributed("gloo", verbose=False)


def swap_config(transport: str, layout: str = "padded", combine: str = "exact", experts: str = "auto") -> SwapConfig:
    """Settings of a swap under test."""
    return SwapConfig(
        layout=layout, combine=combine, experts=experts, comm=CommConfig(**{**CASE_CONFIG, "transport": transport})
    )


class Expert(torch.nn.Module):
    """Two linear layers, as DeepSpeed's examples have them."""

    def __init__(self, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.up = torch.nn.Linear(hidden, 24)
        self.down = torch.nn.Linear(24, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.nn.functional.gelu(self.up(x)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerCase:
    """One MoE layer and its inputs."""

    k: int = 2
    ep_size: int = 2
    num_experts: int = NUM_EXPERTS
    drop_tokens: bool = True
    dtype: torch.dtype = torch.float32
    shape: tuple[int, ...] = (4, 16)
    """Leading dimensions of the input."""
    moe: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """More arguments of ``MoE``."""
    used_token: bool = False
    expert: type[torch.nn.Module] = Expert
    seed: int = 0


def seeded_weights(module: torch.nn.Module, seed: int) -> None:
    """Weights that depend on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def make_layer(case: LayerCase, *, groups: bool = True) -> MoE:
    """The layer of this rank: experts have the weights of their global id, the rest is the same on all ranks."""
    layer = MoE(
        HIDDEN,
        case.expert(),
        num_experts=case.num_experts,
        ep_size=case.ep_size,
        k=case.k,
        drop_tokens=case.drop_tokens,
        **{"capacity_factor": 1.0, "eval_capacity_factor": 1.0, **case.moe},
    ).to(case.dtype)
    seeded_weights(layer, case.seed)
    first = dist.get_rank() % case.ep_size * layer.num_local_experts
    for index, expert in enumerate(layer.deepspeed_moe.experts.deepspeed_experts):
        seeded_weights(expert, 1000 + case.seed + first + index)
    if groups:
        with contextlib.redirect_stdout(None):
            layer.set_deepspeed_parallelism()
    return layer


def step(case: LayerCase, layers: MoE | list[MoE], *, train: bool = True) -> Results:
    """Forward and backward of layers one after the other on this rank's inputs: all outputs and gradients, by name.

    The random numbers of gates are the same for the same case.
    """
    layers = layers if isinstance(layers, list) else [layers]
    generator = torch.Generator().manual_seed(17 * case.seed + dist.get_rank())
    x = torch.randn(*case.shape, HIDDEN, generator=generator).to(case.dtype).requires_grad_()
    weight = torch.randn(*case.shape, HIDDEN, generator=generator).to(case.dtype)
    num_tokens = x.numel() // HIDDEN
    used_token = torch.randint(0, 2, (num_tokens,), generator=generator) if case.used_token else None
    torch.manual_seed(31 + dist.get_rank())
    results: Results = {}
    hidden = x
    loss = x.new_zeros((), dtype=torch.float32)
    for index, layer in enumerate(layers):
        layer.zero_grad()
        hidden, l_aux, exp_counts = layer.train(train)(hidden, used_token)
        loss = loss + l_aux
        results |= {f"{index}.l_aux": l_aux.detach(), f"{index}.exp_counts": exp_counts}
    (loss + (hidden * weight).float().sum()).backward()
    results |= {"y": hidden.detach(), "x.grad": x.grad}
    for index, layer in enumerate(layers):
        results |= {f"{index}.{name}.grad": p.grad.clone() for name, p in layer.named_parameters()}
    return results


def differences(expected: Results, seen: Results, *, atol: float = 0.0) -> list[str]:
    """What differs: bit for bit with ``atol`` 0, else by more than ``atol`` of the largest expected value."""
    assert expected.keys() == seen.keys()
    found = []
    for name, want in expected.items():
        got = seen[name]
        if got.shape != want.shape or got.dtype != want.dtype:
            found.append(f"{name}: {got.dtype} {tuple(got.shape)}, not {want.dtype} {tuple(want.shape)}")
        elif atol == 0.0 and not torch.equal(got, want):
            found.append(f"{name}: differs by up to {(got.double() - want.double()).abs().max():g}")
        elif atol and want.numel():
            scale = max(1.0, want.abs().max().item())
            error = (got.double() - want.double()).abs().max().item() / scale
            if not error <= atol:
                found.append(f"{name}: relative error {error:g}")
    return found


def stock_and_swapped(context: RankContext, case: LayerCase, config: SwapConfig) -> tuple[Results, Results]:
    """Results of one step of a layer, as DeepSpeed runs it and swapped; two steps each, the second is returned."""
    from ray_deepep.deepspeed import enable

    start_deepspeed()
    layer = make_layer(case)
    step(case, layer)
    expected = step(case, layer)
    with enable(config):
        step(case, layer)
        return expected, step(case, layer)
