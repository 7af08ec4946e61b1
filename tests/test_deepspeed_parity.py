"""A swapped layer against DeepSpeed's own: padded with exact is bit-equal, gradients too; the rest is close."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from deepspeed_cases import LayerCase, differences, make_layer, start_deepspeed, step, stock_and_swapped, swap_config
from harness import RankContext, RankPool, Ranks, shm_problem

from ray_deepep.deepspeed import enable

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def dtype_id(value: object) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def check_bit_equal(context: RankContext, transport: str, case: LayerCase) -> None:
    expected, seen = stock_and_swapped(context, case, swap_config(transport))
    assert not differences(expected, seen)
    # The comparison means something.
    assert expected["y"].abs().max() > 0 and expected["0.deepspeed_moe.gate.wg.weight.grad"].abs().max() > 0


@pytest.mark.parametrize("dtype", (FP32, BF16), ids=dtype_id)
@pytest.mark.parametrize("drop_tokens", (True, False), ids=("drop", "keep"))
@pytest.mark.parametrize("k", (1, 2, 4))
def test_bit_equal(ranks: Ranks, transport: str, k: int, drop_tokens: bool, dtype: torch.dtype) -> None:
    ranks.run(2, check_bit_equal, transport, LayerCase(k=k, drop_tokens=drop_tokens, dtype=dtype))


VARIANTS = {
    "fp16": LayerCase(dtype=FP16, k=4),
    "residual": LayerCase(moe={"use_residual": True}),
    "residual bf16": LayerCase(moe={"use_residual": True}, dtype=BF16, k=4),
    "used_token": LayerCase(k=1, used_token=True),
    "used_token keep": LayerCase(k=1, used_token=True, drop_tokens=False),
    "RSample": LayerCase(k=1, moe={"noisy_gate_policy": "RSample"}),
    "Jitter": LayerCase(k=2, moe={"noisy_gate_policy": "Jitter"}),
    "no random token selection": LayerCase(k=1, moe={"use_rts": False}),
    "no sampling of the second expert": LayerCase(k=2, moe={"top2_2nd_expert_sampling": False}),
    "hardly any capacity": LayerCase(k=4, moe={"capacity_factor": 0.1, "min_capacity": 1}),
    "capacity above the tokens": LayerCase(k=2, shape=(3,), moe={"min_capacity": 7}),
    "k of all experts": LayerCase(k=8, dtype=BF16),
    # torch adds more than four terms in an order that depends on the shape.
    "k above four": LayerCase(k=7, shape=(5,)),
    "one token": LayerCase(k=4, shape=(1, 1)),
    "one expert a rank": LayerCase(num_experts=2, k=2),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_bit_equal_variants(ranks: Ranks, transport: str, name: str) -> None:
    ranks.run(2, check_bit_equal, transport, VARIANTS[name])


@pytest.mark.parametrize("ep_size", (2, 4))
@pytest.mark.parametrize("k", (1, 2, 4))
def test_bit_equal_four_ranks(ranks: Ranks, transport: str, k: int, ep_size: int) -> None:
    """Also with expert-data parallelism: two EP groups of two ranks."""
    ranks.run(4, check_bit_equal, transport, LayerCase(k=k, ep_size=ep_size, dtype=BF16 if k == 4 else FP32))


@pytest.mark.skipif(bool(shm_problem()), reason=shm_problem())
@pytest.mark.parametrize("ep_size", (2, 4))
def test_bit_equal_over_nodes(ep_size: int) -> None:
    """Two logical nodes of each EP group; rows hop between them."""
    with RankPool(4, env={"RAY_DEEPEP_DOMAIN_SIZE": str(ep_size // 2)}) as pool:
        pool.run(check_bit_equal, "shm", LayerCase(k=2, ep_size=ep_size, dtype=BF16))


@pytest.mark.parametrize("ep_size", (1, 2), ids=lambda n: f"ep{n}")
def test_bit_equal_one_expert_group_per_rank(ranks: Ranks, ep_size: int) -> None:
    """``ep_size=1`` has nothing to move, in a world of one rank and of two."""
    ranks.run(ep_size, check_bit_equal, "reference", LayerCase(ep_size=1))


def check_close(context: RankContext, transport: str, case: LayerCase, layout: str, combine: str) -> None:
    expected, seen = stock_and_swapped(context, case, swap_config(transport, layout, combine))
    assert not differences(expected, seen, atol=2e-6 if case.dtype == FP32 else 1.5e-2)
    exact = {name: value for name, value in expected.items() if name.endswith(("l_aux", "exp_counts"))}
    assert not differences(exact, {name: seen[name] for name in exact})


CLOSE = {
    "k1": LayerCase(k=1),
    "k2 keep": LayerCase(k=2, drop_tokens=False),
    "k4": LayerCase(k=4),
    "k4 bf16": LayerCase(k=4, dtype=BF16),
    "residual": LayerCase(moe={"use_residual": True}),
    "used_token": LayerCase(k=1, used_token=True),
    # Few tokens: experts without a row, whose gradients are zero and not missing.
    "idle experts": LayerCase(k=1, shape=(3,), moe={"min_capacity": 1}),
}


@pytest.mark.parametrize("layout,combine", (("padded", "fast"), ("compact", "exact"), ("compact", "fast")))
@pytest.mark.parametrize("name", CLOSE)
def test_close(ranks: Ranks, transport: str, name: str, layout: str, combine: str) -> None:
    ranks.run(2, check_close, transport, CLOSE[name], layout, combine)


def test_compact_four_ranks(ranks: Ranks, transport: str) -> None:
    ranks.run(4, check_close, transport, LayerCase(ep_size=2, k=4), "compact", "fast")


def test_compact_on_one_rank(ranks: Ranks, transport: str) -> None:
    ranks.run(1, check_close, transport, LayerCase(ep_size=1), "compact", "exact")


def check_layers(context: RankContext, transport: str, dtype: torch.dtype) -> None:
    """Three layers of two geometries, one after the other, in training, in evaluation, and recomputed."""
    start_deepspeed()
    case = LayerCase(dtype=dtype)
    layers = [make_layer(dataclasses.replace(case, k=k, seed=seed)) for seed, k in enumerate((2, 1, 2))]
    expected = step(case, layers), step(case, layers, train=False)
    with enable(swap_config(transport)) as swap:
        seen = step(case, layers), step(case, layers, train=False)
        assert len(swap.buffers) == 2
    for want, got in zip(expected, seen):
        assert not differences(want, got)


@pytest.mark.parametrize("dtype", (FP32, BF16), ids=dtype_id)
def test_several_layers(ranks: Ranks, transport: str, dtype: torch.dtype) -> None:
    ranks.run(2, check_layers, transport, dtype)


def check_no_grad(context: RankContext, transport: str) -> None:
    start_deepspeed()
    layer = make_layer(LayerCase(k=4)).eval()
    x = torch.randn(5, 7, 16, generator=torch.Generator().manual_seed(context.rank))
    with torch.no_grad():
        expected, *_ = layer(x)
        for layout in ("padded", "compact"):
            with enable(swap_config(transport, layout)):
                y, *_ = layer(x)
            assert not y.requires_grad
            torch.testing.assert_close(y, expected, rtol=0, atol=0 if layout == "padded" else 1e-6)


def test_no_grad(ranks: Ranks, transport: str) -> None:
    ranks.run(2, check_no_grad, transport)


def check_checkpointing(context: RankContext, transport: str, use_reentrant: bool, layout: str) -> None:
    """A recomputed forward takes the same routes, and gradients are those without recomputation."""
    start_deepspeed()
    layers = [make_layer(LayerCase(k=2, seed=seed)) for seed in (0, 1)]
    x = torch.randn(6, 10, 16, generator=torch.Generator().manual_seed(context.rank))

    def run(recompute: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(context.rank)
        leaf = x.clone().requires_grad_()
        hidden = leaf
        for layer in layers:
            layer.zero_grad()
            if recompute:
                hidden, l_aux, _ = torch.utils.checkpoint.checkpoint(layer, hidden, use_reentrant=use_reentrant)
            else:
                hidden, l_aux, _ = layer(hidden)
            hidden = hidden * (1 + 0.0 * l_aux)
        hidden.square().sum().backward()
        grads = {f"{i}.{name}": p.grad.clone() for i, m in enumerate(layers) for name, p in m.named_parameters()}
        return {"y": hidden.detach(), "x.grad": leaf.grad, **grads}

    with enable(swap_config(transport, layout)):
        assert not differences(run(False), run(True))


@pytest.mark.parametrize("layout", ("padded", "compact"))
@pytest.mark.parametrize("use_reentrant", (True, False), ids=("reentrant", "hooks"))
def test_activation_checkpointing(ranks: Ranks, transport: str, use_reentrant: bool, layout: str) -> None:
    ranks.run(2, check_checkpointing, transport, use_reentrant, layout)


def check_container_hook(context: RankContext, transport: str) -> list[tuple[int, ...]]:
    """A hook on the expert container sees what it sees with stock, and results are stock's."""
    start_deepspeed()
    layer = make_layer(LayerCase())
    expected = step(LayerCase(), layer)
    shapes = []
    layer.deepspeed_moe.experts.register_forward_hook(lambda _, inputs, out: shapes.append(tuple(out.shape)))
    with enable(swap_config(transport)):
        assert not differences(expected, step(LayerCase(), layer))
    return shapes


def test_hook_on_the_container(ranks: Ranks, transport: str) -> None:
    # 64 tokens, two experts each, of eight.
    assert ranks.run(2, check_container_hook, transport) == [[(2, 4, 16, 16)]] * 2


def check_mixed_dtypes(context: RankContext, transport: str, layout: str) -> None:
    """Experts that answer in different dtypes: put together as ``torch.cat`` does."""

    def halve(layer: torch.nn.Module) -> None:
        first = layer.deepspeed_moe.experts.deepspeed_experts[0]
        first.register_forward_hook(lambda _, inputs, out: out.bfloat16())

    start_deepspeed()
    layer = make_layer(LayerCase())
    halve(layer)
    expected = step(LayerCase(), layer)
    with enable(swap_config(transport, layout)):
        seen = step(LayerCase(), layer)
    assert not differences(expected, seen, atol=0.0 if layout == "padded" else 2e-6)


@pytest.mark.parametrize("layout", ("padded", "compact"))
def test_experts_of_mixed_dtypes(ranks: Ranks, transport: str, layout: str) -> None:
    ranks.run(2, check_mixed_dtypes, transport, layout)


def check_timers(context: RankContext, transport: str) -> None:
    start_deepspeed()
    layer = make_layer(LayerCase())
    moe = layer.deepspeed_moe
    moe.wall_clock_breakdown = moe.gate.wall_clock_breakdown = True
    with enable(swap_config(transport)):
        step(LayerCase(), layer)
        first = moe.time_moe
        step(LayerCase(), layer)
    assert 0 < moe.time_falltoall < moe.time_moe and 0 < moe.time_salltoall < moe.time_moe
    # DeepSpeed's engine reads running totals and resets them itself.
    assert moe.time_moe > first


def test_wall_clock_breakdown(ranks: Ranks, transport: str) -> None:
    ranks.run(2, check_timers, transport)
