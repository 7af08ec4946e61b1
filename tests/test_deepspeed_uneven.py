"""Ranks with different token counts, which DeepSpeed's own layer cannot have: against a dense computation per token."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed_cases import (
    HIDDEN,
    Expert,
    LayerCase,
    Results,
    differences,
    make_layer,
    seeded_weights,
    start_deepspeed,
    step,
    swap_config,
)
from harness import RankContext, Ranks, error_of

from ray_deepep import Buffer, InvalidArgumentError, MismatchError, cuda
from ray_deepep.deepspeed import enable
from ray_deepep.deepspeed.forward import CAPACITY_FIELDS
from ray_deepep.deepspeed.gating import route


def dense_step(case: LayerCase, layer: MoE) -> Results:
    """What ``step`` gives, computed with all experts on every rank: the gate is the layer's own."""
    experts = [Expert().to(case.dtype) for _ in range(case.num_experts)]
    for index, expert in enumerate(experts):
        seeded_weights(expert, 1000 + case.seed + index)
    moe = layer.deepspeed_moe
    stock = type(moe).forward
    try:
        type(moe).forward = lambda moe, x, used: _dense_forward(moe, experts, x, used)
        results = step(case, layer)
    finally:
        type(moe).forward = stock
    first = dist.get_rank(moe.ep_group) * layer.num_local_experts
    for index, expert in enumerate(experts):
        for name, parameter in expert.named_parameters():
            # An expert's gradient comes from the tokens of its whole EP group.
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            dist.all_reduce(grad, group=moe.ep_group)
            if first <= index < first + layer.num_local_experts:
                local = f"0.deepspeed_moe.experts.deepspeed_experts.{index - first}.{name}.grad"
                results[local] = grad
    return results


def _dense_forward(moe, experts: list[Expert], x: torch.Tensor, used_token: torch.Tensor | None) -> torch.Tensor:
    tokens = x.reshape(-1, HIDDEN)
    if len(tokens):
        moe.l_aux, _, _, indices, _, gates, moe.exp_counts = moe.gate(tokens, used_token, True, False)
    else:
        # The gate itself refuses no tokens (k = 1) or gives NaN; what it then means is checked by the caller.
        routes = route(moe, tokens, used_token)
        indices, gates = routes.topk_idx.t(), routes.gates
    y = torch.zeros_like(tokens)
    for k in range(len(indices)):
        for expert in range(len(experts)):
            chosen = (indices[k] == expert).nonzero().flatten()
            y = y.index_add(0, chosen, experts[expert](tokens[chosen]) * gates[k, chosen].unsqueeze(1))
    for parameter in moe.experts.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return y.reshape(x.shape)


def shape_of(rank: int, turn: int) -> tuple[int, ...]:
    """Token counts that differ between ranks and calls."""
    return ((3, 16), (29,), (2, 2), (11, 5))[(rank + turn) % 4]


def check_uneven(context: RankContext, transport: str, case: LayerCase, layout: str, combine: str) -> None:
    start_deepspeed()
    layer = make_layer(case)
    cases = [dataclasses.replace(case, shape=shape_of(context.rank, turn), seed=0) for turn in range(3)]
    expected = [dense_step(case, layer) for case in cases]
    with enable(swap_config(transport, layout, combine)) as swap:
        seen = [step(case, layer) for case in cases]
        assert len(swap.buffers) == 1
    for want, got in zip(expected, seen):
        assert want["0.exp_counts"].sum() > 0
        assert not differences(want, got, atol=5e-6)


@pytest.mark.parametrize("layout,combine", (("padded", "exact"), ("compact", "fast")))
@pytest.mark.parametrize("drop_tokens", (True, False), ids=("drop", "keep"))
@pytest.mark.parametrize("k", (1, 2, 4))
def test_uneven(ranks: Ranks, transport: str, k: int, drop_tokens: bool, layout: str, combine: str) -> None:
    case = LayerCase(k=k, drop_tokens=drop_tokens, moe={"min_capacity": 2})
    ranks.run(2, check_uneven, transport, case, layout, combine)


def test_uneven_four_ranks(ranks: Ranks, transport: str) -> None:
    ranks.run(4, check_uneven, transport, LayerCase(k=2, ep_size=4), "padded", "fast")


def check_zero_tokens(context: RankContext, transport: str, case: LayerCase, layout: str, combine: str) -> None:
    """One rank without a token: its loss is finite, its experts serve the others, and all gradients exist."""
    start_deepspeed()
    layer = make_layer(case)
    case = dataclasses.replace(case, shape=(6, 4) if context.rank else (0,))
    expected = dense_step(case, layer)
    with enable(swap_config(transport, layout, combine)):
        seen = step(case, layer)
    assert all(value.isfinite().all() for value in seen.values())
    assert not differences(expected, seen, atol=5e-6)
    if context.rank == 0:
        assert seen["0.l_aux"] == 0 and seen["0.exp_counts"].sum() == 0 and seen["y"].shape == (0, HIDDEN)
        assert not seen["0.deepspeed_moe.gate.wg.weight.grad"].any()
    grads = {name: value for name, value in seen.items() if "deepspeed_experts" in name}
    assert sum(int(value.any()) for value in grads.values()) > 0


@pytest.mark.parametrize("layout,combine", (("padded", "exact"), ("padded", "fast"), ("compact", "exact")))
@pytest.mark.parametrize("drop_tokens", (True, False), ids=("drop", "keep"))
@pytest.mark.parametrize("k", (1, 2, 4))
def test_zero_tokens_on_a_rank(
    ranks: Ranks, transport: str, k: int, drop_tokens: bool, layout: str, combine: str
) -> None:
    ranks.run(2, check_zero_tokens, transport, LayerCase(k=k, drop_tokens=drop_tokens), layout, combine)


def check_nobody_has_tokens(context: RankContext, transport: str, layout: str) -> None:
    start_deepspeed()
    case = LayerCase(k=2, drop_tokens=False, shape=(0,))
    layer = make_layer(case)
    with enable(swap_config(transport, layout)):
        seen = step(case, layer)
    assert all(not value.any() for value in seen.values())


@pytest.mark.parametrize("layout", ("padded", "compact"))
def test_nobody_has_tokens(ranks: Ranks, transport: str, layout: str) -> None:
    ranks.run(2, check_nobody_has_tokens, transport, layout)


def check_agrees_once(context: RankContext, transport: str) -> None:
    """Equal capacities cost no extra call; the first difference is found by a failed dispatch, later ones before it."""
    start_deepspeed()
    case = LayerCase(k=2)
    layer = make_layer(case)
    failed = []

    class CountingBuffer:
        def __init__(self, dispatch) -> None:
            self._dispatch = dispatch

        def __call__(self, *args, **kwargs):
            try:
                return self._dispatch(*args, **kwargs)
            except MismatchError as error:
                failed.append(error.field)
                raise

    with enable(swap_config(transport)) as swap:
        step(case, layer)
        (buffer,) = swap.buffers
        buffer.dispatch = CountingBuffer(buffer.dispatch)
        assert swap.comm_stats(reset=True)["num_calls"] == 4
        step(case, layer)
        assert swap.comm_stats(reset=True)["num_calls"] == 4 and not failed
        uneven = dataclasses.replace(case, shape=shape_of(context.rank, 0))
        for _ in range(2):
            step(uneven, layer)
            assert swap.comm_stats(reset=True)["num_calls"] == 5 and len(failed) == 1


def test_agrees_on_the_capacity_only_where_needed(ranks: Ranks, transport: str) -> None:
    ranks.run(2, check_agrees_once, transport)


def check_too_many_tokens(context: RankContext) -> None:
    """More than the heap has room for: an error that names the setting, before anything is sent."""
    start_deepspeed()
    config = swap_config("reference")
    config = dataclasses.replace(config, comm=dataclasses.replace(config.comm, heap_gib=1e-4))
    case = LayerCase(k=2)
    layer = make_layer(case)
    with enable(config) as swap:
        step(dataclasses.replace(case, shape=(4,)), layer)
        geometry = swap.buffers[0].geometry
        assert 4 < geometry.max_tokens < 4096 and 4 < geometry.max_capacity < 4096
        big = dataclasses.replace(case, shape=(4096,))
        error = error_of(InvalidArgumentError, lambda: step(big, layer))
        assert error.argument == "hidden_states" and "RAY_DEEPEP_HEAP_GIB" in str(error)
        wide = dataclasses.replace(case, moe={"min_capacity": 4096})
        error = error_of(InvalidArgumentError, lambda: step(wide, make_layer(wide)))
        assert error.argument == "capacity" and "compact" in str(error)
        assert isinstance(swap.buffers[0], Buffer)


def test_too_many_tokens(ranks: Ranks) -> None:
    ranks.run(2, check_too_many_tokens)


@pytest.mark.skipif(not cuda.core_version()[0], reason=f"no CUDA core: {cuda.core_version()[1]}")
def test_the_word_of_the_cuda_core_for_a_capacity_is_known() -> None:
    """An unknown name would be raised to the user."""
    padded = [1, 0, 2, 2, 1, 6, 0, 0]
    field, _, _ = cuda.load_core().find_difference(padded, [*padded[:5], 7, *padded[6:]])
    assert field in CAPACITY_FIELDS
