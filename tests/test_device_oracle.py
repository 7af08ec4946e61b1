"""The whole-tensor oracle against the one of plain loops, bit by bit."""

from __future__ import annotations

import random

import cases
import device_cases
import device_oracle
import oracle
import pytest
import torch
from cases import DTYPES, FLOAT8, LAYOUTS, ROUTINGS, Case, assert_same, dtype_id, layout_id
from device_oracle import World, as_bytes

from ray_deepep import TokenMajor

SEED = 404
CPU = torch.device("cpu")


def twin(world: World) -> oracle.World:
    """The same inputs for the other oracle."""
    names = ("num_experts", "hidden", "layout", "x", "topk_idx", "topk_weights", "x_scales", "locations")
    return oracle.World(**{name: getattr(world, name) for name in names})


def check_rank(world: World, other: oracle.World, rank: int) -> None:
    here, there = world.arrivals[rank], other.arrivals[rank]
    assert (here.num_rows, tuple(here.num_per_expert.tolist())) == (there.num_rows, there.num_per_expert)
    assert there.expert_offsets == () or tuple(here.expert_offsets.tolist()) == there.expert_offsets
    token_major = isinstance(world.layout, TokenMajor)
    float8 = world.x[0].dtype == FLOAT8
    for scaled in (False,) if token_major or float8 else (False, True):
        got = device_oracle.dispatch(world, rank, scale_by_weights=scaled)
        want = oracle.dispatch(other, rank, scale_by_weights=scaled)
        assert_same("x", as_bytes(got.x), as_bytes(want.x))
        for name in ("x_scales", "topk_idx", "topk_weights"):
            assert_same(name, getattr(got, name), getattr(want, name))
    dtype = torch.bfloat16 if float8 else world.x[0].dtype
    rows = device_cases.make_rows(world, dtype, SEED)
    bias = device_cases.random_rows(tuple(world.x[rank].shape), dtype, torch.Generator().manual_seed(SEED))
    for mode in cases.some_modes(token_major):
        arguments = {"weighted": mode.weighted, "reduce": mode.reduce, "bias": bias if mode.bias else None}
        got = device_oracle.combine(world, rank, rows, **arguments)
        assert_same(f"{mode} x", got, oracle.combine(other, rank, rows, **arguments))
    if not token_major:
        got = device_oracle.routes_home(world, rank, rows)
        assert_same("routes", got, oracle.routes_home(other, rank, rows))
    width = (world.topk_idx[0].shape[1],) if token_major else ()
    carried = [torch.rand(len(r), *width, generator=torch.Generator().manual_seed(SEED)) for r in rows]
    home = device_oracle.weights_home(world, rank, carried)
    assert_same("weights", home, oracle.weights_home(other, rank, carried))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_id)
def test_oracles_agree(layout: object, dtype: torch.dtype) -> None:
    generator = random.Random(SEED)
    for routing in ROUTINGS:
        num_ranks = generator.choice((1, 2, 4))
        case = Case(
            seed=generator.getrandbits(32),
            num_tokens=tuple(generator.choice((0, 1, 13)) for _ in range(num_ranks)),
            num_experts=num_ranks * generator.randint(3, 4),
            num_topk=generator.randint(1, 3),
            hidden=128 if dtype == FLOAT8 else 8,
            layout=layout,
            dtype=dtype,
            routing=routing,
        )
        world = device_cases.make_world(case, CPU)
        for rank in range(num_ranks):
            check_rank(world, twin(world), rank)


def test_tails_of_fixed_shapes() -> None:
    world = device_cases.make_world(Case(seed=SEED, num_tokens=(5, 4)), CPU)
    most = device_cases.rows_needed(world) + 3
    for rank in range(2):
        exact, fixed = (device_oracle.dispatch(world, rank, num_rows=n) for n in (None, most))
        count = len(exact.x)
        assert_same("x", fixed.x[:count], exact.x)
        assert fixed.x.shape[0] == most and not fixed.x[count:].any() and not fixed.topk_weights[count:].any()
        assert (fixed.topk_idx[count:] == -1).all()
