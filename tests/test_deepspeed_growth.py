"""Buffers whose heap takes its memory at once, as on GPUs: they have the room that forwards needed so far, on any rank.

Without a GPU the same is shown over the CPU transports, told to be such a heap.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from deepspeed_cases import HIDDEN, LayerCase, differences, make_layer, start_deepspeed, step, swap_config
from harness import RankContext, Ranks, error_of
from test_deepspeed_uneven import dense_step

from ray_deepep import MismatchError
from ray_deepep.deepspeed import Swap, enable, registry
from ray_deepep.deepspeed.room import GROWTH, Need, fits, geometry_of_need, grown

SHAPE = {"num_ranks": 8, "num_experts": 256, "hidden": 7168, "num_topk": 8, "heap_gib": 4.0}
SMALL, LARGE = (2, 8), (11, 5)


@contextlib.contextmanager
def growing(transport: str, layout: str = "compact", combine: str = "fast") -> Iterator[Swap]:
    """A swap whose buffers have the room that was needed."""
    with (
        mock.patch.object(registry, "_uses_memory_at_once", lambda _: True),
        enable(swap_config(transport, layout, combine)) as swap,
    ):
        yield swap


def test_as_much_as_gates_let_through() -> None:
    """4,096 tokens of 7168 on 8 ranks: a gigabyte for a gate that drops, and not more than was allowed for others."""
    dropping = geometry_of_need(Need(num_tokens=4096, capacity=128), padded=False, **SHAPE)
    assert (dropping.max_tokens, dropping.max_rows, dropping.max_capacity) == (4096, 256 * 128, 0)
    padded = geometry_of_need(Need(num_tokens=4096, capacity=128), padded=True, **SHAPE)
    assert (padded.max_tokens, padded.max_rows, padded.max_capacity) == (4096, None, 128)
    keeping = geometry_of_need(Need(num_tokens=4096), padded=False, **SHAPE)
    assert 256 * 128 < keeping.max_rows < 8 * 4096 * 8 and keeping.max_rows * 7168 * 4 * 2 <= 4 * 2**30
    few = geometry_of_need(Need(num_tokens=16), padded=False, **SHAPE)
    assert few.max_rows == 8 * 16 * 8, "the worst case, where that is less"


def test_tokens_can_name_all_rows() -> None:
    """The core has no more rows than tokens times K; a gate may let more through than there are."""
    need = Need(num_tokens=3, capacity=40)
    geometry = geometry_of_need(need, num_ranks=1, num_experts=4, hidden=64, num_topk=2, padded=False, heap_gib=4.0)
    assert geometry.max_rows == 160 <= geometry.max_tokens * 2


@pytest.mark.parametrize("padded", (True, False))
def test_a_need_fits_what_was_made_for_it(padded: bool) -> None:
    needs = [Need(num_tokens=t, capacity=c) for t in (0, 100, 101) for c in (8, 64, 65)]
    for need in needs:
        given = geometry_of_need(need, padded=padded, **SHAPE)
        for other in needs:
            wanted = geometry_of_need(other, padded=padded, **SHAPE)
            larger = grown(given, wanted)
            assert fits(wanted, larger) and fits(given, larger)
            assert (larger == given) is fits(wanted, given)
            if other.capacity > need.capacity:
                assert not fits(wanted, given)
                name = "max_capacity" if padded else "max_rows"
                assert getattr(larger, name) >= GROWTH * getattr(given, name)


def test_what_fits_all_ranks() -> None:
    assert Need.of_all([Need(num_tokens=3, capacity=2), Need(num_tokens=1, capacity=5)]) == Need(
        num_tokens=3, capacity=5
    )
    assert Need.of_all([Need(num_tokens=3, capacity=2), Need(num_tokens=9)]) == Need(num_tokens=9), "one does not know"


def check_growth(
    context: RankContext, transport: str, case: LayerCase, layout: str, combine: str, shapes: list[dict[int, tuple]]
) -> None:
    """shapes: of each step, by rank."""
    start_deepspeed()
    layer = make_layer(case)
    cases = [dataclasses.replace(case, shape=shape[context.rank]) for shape in shapes]
    expected = [dense_step(case, layer) for case in cases]
    with growing(transport, layout, combine) as swap:
        for want, case in zip(expected, cases):
            assert not differences(want, step(case, layer), atol=5e-6)
        first, *larger = swap.buffers
        assert larger, "the first was large enough"
        given = [first.geometry, *(buffer.geometry for buffer in larger)]
        assert all(fits(a, b) and not fits(b, a) for a, b in itertools.pairwise(given))
        dist.barrier()
        calls = swap.comm_stats(reset=True)["num_calls"]
        assert not differences(expected[-1], step(cases[-1], layer), atol=5e-6)
        assert len(swap.buffers) == len(given), "what fitted once fits again"
        # Two each way; one more tells capacities that differ.
        assert 4 <= swap.comm_stats()["num_calls"] <= 5 < calls
    assert all(buffer.closed for buffer in (first, *larger))


EVEN = [dict.fromkeys(range(4), shape) for shape in (SMALL, LARGE, SMALL, LARGE)]
ONE_GROWS = [{0: SMALL, 1: SMALL}, {0: SMALL, 1: LARGE}, {0: LARGE, 1: SMALL}, {0: SMALL, 1: LARGE}]
IN_TURN = [{0: (3,), 1: (17,)}, {0: (40,), 1: (2,)}, {0: (1,), 1: (90,)}, {0: (0,), 1: (200,)}]


@pytest.mark.parametrize("layout,combine", (("padded", "exact"), ("compact", "fast"), ("compact", "exact")))
@pytest.mark.parametrize("drop_tokens", (True, False), ids=("drop", "keep"))
@pytest.mark.parametrize("shapes", (EVEN, ONE_GROWS, IN_TURN), ids=("even", "one_grows", "in_turn"))
def test_growth(ranks: Ranks, transport: str, shapes: list[dict], drop_tokens: bool, layout: str, combine: str) -> None:
    case = LayerCase(k=2, drop_tokens=drop_tokens, moe={"min_capacity": 2})
    ranks.run(2, check_growth, transport, case, layout, combine, shapes)


def test_growth_on_four_ranks_and_one(ranks: Ranks, transport: str) -> None:
    three_small = [{0: SMALL, 1: SMALL, 2: SMALL, 3: SMALL}, {0: SMALL, 1: SMALL, 2: LARGE, 3: SMALL}]
    ranks.run(4, check_growth, transport, LayerCase(k=2, ep_size=4), "padded", "fast", three_small)
    ranks.run(1, check_growth, transport, LayerCase(k=2, ep_size=1), "compact", "fast", EVEN)


def check_backward_after_growth(context: RankContext, transport: str, layout: str) -> None:
    """A forward over the first buffer, one over a larger one, and then both backwards."""
    start_deepspeed()
    case = LayerCase(k=2)
    layer = make_layer(case)

    def both() -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(dist.get_rank())
        torch.manual_seed(31 + dist.get_rank())  # the gate draws
        layer.zero_grad()
        inputs = [torch.randn(*shape, HIDDEN, generator=generator).requires_grad_() for shape in (SMALL, LARGE)]
        loss = sum((layer(x)[0] ** 2).sum() for x in inputs)
        loss.backward()
        return [x.grad for x in inputs] + [p.grad.clone() for p in layer.parameters()]

    stock = both()
    with growing(transport, layout, "exact") as swap:
        for _ in range(2):
            for want, got in zip(stock, both(), strict=True):
                torch.testing.assert_close(got, want)
        assert len(swap.buffers) == 2


@pytest.mark.parametrize("layout", ("padded", "compact"))
def test_backward_after_growth(ranks: Ranks, transport: str, layout: str) -> None:
    ranks.run(2, check_backward_after_growth, transport, layout)


def check_evaluation(context: RankContext, transport: str, layout: str) -> None:
    """Gates let more through in evaluation: the buffer of the first step has room for both."""
    start_deepspeed()
    case = LayerCase(k=2, moe={"capacity_factor": 1.0, "eval_capacity_factor": 3.0})
    layer = make_layer(case)
    expected = [step(case, layer, train=train) for train in (True, False)]
    with growing(transport, layout, "exact") as swap:
        for want, train in zip(expected, (True, False)):
            assert not differences(want, step(case, layer, train=train), atol=5e-6)
        (buffer,) = swap.buffers
        assert max(buffer.geometry.max_capacity, (buffer.geometry.max_rows or 0) // 8) == 3 * 64 * 2 // 8


@pytest.mark.parametrize("layout", ("padded", "compact"))
def test_evaluation_is_no_reason_to_grow(ranks: Ranks, transport: str, layout: str) -> None:
    ranks.run(2, check_evaluation, transport, layout)


def check_true_mismatch(context: RankContext, transport: str) -> None:
    """Where nobody needs room, what ranks disagree on is the user's error, on every rank; the buffer serves on."""
    start_deepspeed()
    case = LayerCase(k=2)
    layer = make_layer(case)
    with growing(transport) as swap:
        before = step(case, layer)
        moe = layer.deepspeed_moe
        known = swap._registry._layers[moe][0]

        def call() -> None:
            x = torch.zeros(1, HIDDEN, dtype=torch.bfloat16 if context.rank else torch.float32)
            swap.buffers[0].dispatch(x, torch.zeros(1, 1).long())

        need = Need(num_tokens=1, capacity=1)
        error = error_of(
            MismatchError,
            lambda: swap._registry.with_room(known, moe.ep_group, need, torch.device("cpu"), call),
        )
        assert error.field and len(swap.buffers) == 1
        assert not differences(before, step(case, layer))


def test_a_true_mismatch_is_an_error(ranks: Ranks, transport: str) -> None:
    ranks.run(2, check_true_mismatch, transport)
