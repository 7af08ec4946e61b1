"""When DeepSpeed's own path runs instead of the swap, and what experts see when the swap runs."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.moe.sharded_moe import MOELayer
from deepspeed_cases import HIDDEN, LayerCase, differences, make_layer, start_deepspeed, step, swap_config
from harness import RankContext, Ranks

from ray_deepep.deepspeed import enable

CASE = LayerCase()
REFERENCE = "reference"


class Log(logging.Handler):
    """Messages of ray_deepep's logger, in a ``with``."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())

    def __enter__(self) -> Log:
        logging.getLogger("ray_deepep").addHandler(self)
        return self

    def __exit__(self, *exc_info: object) -> None:
        logging.getLogger("ray_deepep").removeHandler(self)


@contextlib.contextmanager
def stock_that_doubles() -> Iterator[None]:
    """A stand-in for DeepSpeed's own forward: its tensor-parallel path does not run on gloo, and Tutel needs a GPU."""

    def forward(layer: MOELayer, *inputs: torch.Tensor) -> torch.Tensor:
        layer.l_aux, layer.exp_counts = torch.zeros(()), torch.zeros(layer.num_local_experts)
        return inputs[0] * 2

    stock, MOELayer.forward = MOELayer.forward, forward
    try:
        yield
    finally:
        MOELayer.forward = stock


class ModelParallelUnit:
    """The part of Megatron's ``mpu`` that the MoE layer asks."""

    def get_tensor_model_parallel_world_size(self) -> int:
        return 2


def check_runs_stock(context: RankContext, why: str, message: str) -> None:
    """DeepSpeed's own path, said once however many layers and steps; then the swap's again."""
    start_deepspeed()
    layers = [make_layer(LayerCase(seed=seed)) for seed in (0, 1)]
    x = torch.ones(8, HIDDEN, dtype=torch.float64 if why == "rows" else torch.float32)
    groups = deepspeed.utils.groups
    with (
        stock_that_doubles(),
        Log() as log,
        enable(swap_config(REFERENCE)) as swap,
        pytest.MonkeyPatch.context() as patch,
    ):
        if why == "tensor parallel":
            patch.setattr(groups, "mpu", ModelParallelUnit())
        elif why == "expert tensor parallel":
            patch.setattr(groups, "expert_tensor_parallel_world_size", 2)
        for layer in layers:
            if why == "tutel":
                layer.deepspeed_moe.use_tutel = True
            elif why == "k":
                layer.deepspeed_moe.gate.k = 33
            elif why == "no group":
                layer.deepspeed_moe.ep_group = None
        for layer in layers * 2:
            assert torch.equal(layer(x)[0], x * 2)
        assert swap.comm_stats()["num_calls"] == 0 and swap.buffers == ()
        assert log.messages == [f"MoE layers run as DeepSpeed's own: {message}"]
        patch.undo()
        make_layer(CASE)(torch.ones(8, HIDDEN))
        assert swap.comm_stats()["num_calls"] == 2


STOCK_REASONS = {
    "tensor parallel": "tensor parallelism of 2 ranks",
    "expert tensor parallel": "tensor parallelism of experts over 2 ranks",
    "tutel": "the layer uses Tutel",
    "rows": "rows are float64",
    "k": "top-33 is more than 32 experts per token",
    "no group": "the layer has no expert-parallel group (set_deepspeed_parallelism was not called)",
}


@pytest.mark.parametrize("why", STOCK_REASONS)
def test_stock_runs_and_says_why(ranks: Ranks, why: str) -> None:
    ranks.run(2, check_runs_stock, why, STOCK_REASONS[why])


def check_float64(context: RankContext) -> None:
    start_deepspeed()
    case = LayerCase(dtype=torch.float64)
    layer = make_layer(case)
    expected = step(case, layer)
    with enable(swap_config(REFERENCE)):
        assert not differences(expected, step(case, layer))


def test_float64_runs_as_stock(ranks: Ranks) -> None:
    ranks.run(2, check_float64)


def check_expert_container(context: RankContext) -> None:
    """Experts in a container of the user's own get the stock shape, also with ``layout="compact"``."""
    start_deepspeed()
    layer = make_layer(CASE)
    expected = step(CASE, layer)
    shapes = []

    class Fused(deepspeed.moe.experts.Experts):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            shapes.append(tuple(inputs.shape))
            return super().forward(inputs)

    layer.deepspeed_moe.experts.__class__ = Fused
    with enable(swap_config(REFERENCE, "compact")):
        assert not differences(expected, step(CASE, layer))
    assert shapes == [(2, 4, 16, HIDDEN)]


def test_own_expert_container_is_padded(ranks: Ranks) -> None:
    ranks.run(2, check_expert_container)


def check_expert_shapes(context: RankContext) -> None:
    """What experts see: ``[ep_size, 1, C, M]`` padded; compact, their real rows and each expert once."""
    start_deepspeed()
    case = LayerCase(k=1, shape=(5,), moe={"min_capacity": 1})
    layer = make_layer(case)
    shapes: list[tuple[int, ...]] = []
    for expert in layer.deepspeed_moe.experts.deepspeed_experts:
        expert.register_forward_pre_hook(lambda module, inputs: shapes.append(tuple(inputs[0].shape)))
    with enable(swap_config(REFERENCE)):
        step(case, layer)
    assert shapes == [(2, 1, 1, HIDDEN)] * 4
    shapes.clear()
    with enable(swap_config(REFERENCE, "compact")):
        exp_counts = step(dataclasses.replace(case, drop_tokens=False), layer)["0.exp_counts"]
    capacity = 1
    mine = exp_counts.clamp(max=capacity)
    dist.all_reduce(mine)
    assert shapes == [(1, 1, int(n), HIDDEN) for n in mine.view(2, 4)[context.rank]]


def test_shapes_that_experts_see(ranks: Ranks) -> None:
    ranks.run(2, check_expert_shapes)


def check_autocast(context: RankContext, layout: str) -> None:
    """Under autocast experts answer in bfloat16 to float32 rows."""
    start_deepspeed()
    layer = make_layer(CASE)

    def run() -> dict[str, torch.Tensor]:
        torch.manual_seed(context.rank)
        x = torch.randn(20, HIDDEN, generator=torch.Generator().manual_seed(context.rank)).requires_grad_()
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            y, *_ = layer(x)
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
        return {"y": y.detach(), "x.grad": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}

    expected = run()
    with enable(swap_config(REFERENCE, layout)):
        assert not differences(expected, run(), atol=0.0 if layout == "padded" else 1.5e-2)


@pytest.mark.parametrize("layout", ("padded", "compact"))
def test_autocast(ranks: Ranks, layout: str) -> None:
    ranks.run(2, check_autocast, layout)
