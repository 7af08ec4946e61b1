"""How large a layer's buffer is asked for: the same on all ranks, as large as the heap allows, and truly usable."""

from __future__ import annotations

import dataclasses

import pytest
from deepspeed_cases import HIDDEN, NUM_EXPERTS, LayerCase, make_layer, start_deepspeed, step, swap_config
from harness import RankContext, Ranks, error_of

from ray_deepep import InvalidArgumentError
from ray_deepep.deepspeed import enable
from ray_deepep.deepspeed.room import MAX_ROWS, geometry_for

SHAPE = {"num_ranks": 8, "num_experts": 64, "hidden": 4096, "num_topk": 8}


def test_defaults_hold_large_batches() -> None:
    padded = geometry_for(**SHAPE, padded=True, heap_gib=64.0)
    assert padded.max_tokens >= 100_000 and padded.max_capacity >= 30_000
    compact = geometry_for(**SHAPE, padded=False, heap_gib=64.0)
    assert compact.max_tokens >= 30_000 and compact.max_capacity == 0


def test_small_rows_are_bounded() -> None:
    geometry = geometry_for(num_ranks=2, num_experts=2, hidden=1, num_topk=1, padded=True, heap_gib=64.0)
    assert geometry.max_tokens == geometry.max_capacity == MAX_ROWS


@pytest.mark.parametrize("padded", (True, False))
def test_room_grows_with_the_heap(padded: bool) -> None:
    sizes = [geometry_for(**SHAPE, padded=padded, heap_gib=gib) for gib in (0.5, 1.0, 2.0)]
    assert sizes[0].max_tokens < sizes[1].max_tokens < sizes[2].max_tokens


@pytest.mark.parametrize("padded", (True, False))
def test_too_small_a_heap(padded: bool) -> None:
    error = error_of(InvalidArgumentError, lambda: geometry_for(**SHAPE, padded=padded, heap_gib=1e-4))
    assert str(error) == "heap_gib: is too small for 64 experts of hidden size 4096 on 8 ranks; got 0.0001"


def check_full(context: RankContext, transport: str, layout: str) -> None:
    """As many tokens and as large a capacity as the buffer was asked for do fit the heap."""
    start_deepspeed()
    config = swap_config(transport, layout)
    config = dataclasses.replace(config, comm=dataclasses.replace(config.comm, heap_gib=0.002))
    room = geometry_for(
        num_ranks=2,
        num_experts=NUM_EXPERTS,
        hidden=HIDDEN,
        num_topk=2,
        padded=layout == "padded",
        heap_gib=config.comm.heap_gib,
    )
    case = LayerCase(k=2, shape=(room.max_tokens,), moe={"capacity_factor": 0.1, "min_capacity": room.max_capacity})
    if layout == "compact":
        case = dataclasses.replace(case, drop_tokens=False)
    layer = make_layer(case)
    with enable(config) as swap:
        assert step(case, layer)["y"].any()
        assert swap.buffers[0].geometry == room


@pytest.mark.parametrize("layout", ("padded", "compact"))
def test_a_full_buffer(ranks: Ranks, transport: str, layout: str) -> None:
    ranks.run(2, check_full, transport, layout)
