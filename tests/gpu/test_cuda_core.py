"""The CUDA core against the oracle, bit by bit: 1 to 8 ranks on the GPUs there are (several ranks on one GPU need MPS).

tests/gpu/run.sh        # starts MPS, builds, runs these tests
"""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from cases import (
    FLOAT8,
    LAYOUTS,
    PADDED,
    ROUTINGS,
    Case,
    all_modes,
    assert_dispatched,
    check_case,
    check_combine,
    dispatch,
    make_buffer,
    make_world,
    some_modes,
)
from harness import RankContext, Ranks, error_of

from ray_deepep import ExpertMajor, Float8Cast, InvalidArgumentError, Padded, TokenMajor
from ray_deepep.cuda import cuda_problem

pytestmark = pytest.mark.skipif(bool(cuda_problem()), reason=f"transport cuda: {cuda_problem()}")
SEED = 71


def check_cases(context: RankContext, cases: list[Case], modes: list | None = None) -> None:
    torch.cuda.set_device(context.rank % torch.cuda.device_count())
    for case in cases:
        check_case(context, "cuda", case, modes)


def tokens_of(num_ranks: int, most: int) -> tuple[int, ...]:
    return tuple(max(most - 37 * rank, 0) for rank in range(num_ranks))


@pytest.mark.parametrize("num_ranks", (1, 2, 4, 8))
def test_layouts_and_dtypes(ranks: Ranks, num_ranks: int) -> None:
    cases = [
        Case(
            seed=SEED,
            num_tokens=tokens_of(num_ranks, 150),
            num_experts=num_ranks * 3,
            hidden=256,
            layout=layout,
            dtype=dtype,
            routing="sparse",
        )
        for layout in LAYOUTS
        for dtype in (torch.float32, torch.bfloat16, torch.float16, FLOAT8)
    ]
    ranks.run(num_ranks, check_cases, cases, deadline_s=120.0)


@pytest.mark.parametrize("num_ranks", (2, 4))
def test_routings_and_empty_ranks(ranks: Ranks, num_ranks: int) -> None:
    shapes = [
        tokens_of(num_ranks, 70),
        (0,) * num_ranks,
        (0,) * (num_ranks - 1) + (65,),
        (64,) + (0,) * (num_ranks - 1),
    ]
    cases = [
        Case(seed=SEED, num_tokens=shape, num_experts=num_ranks * 4, hidden=64, layout=layout, routing=routing)
        for shape in shapes
        for layout in (TokenMajor(), ExpertMajor(8), PADDED)
        for routing in ROUTINGS
    ]
    ranks.run(num_ranks, check_cases, cases, deadline_s=200.0)


def test_num_topk(ranks: Ranks) -> None:
    cases = [
        Case(seed=SEED, num_tokens=(130, 0, 3, 64), num_experts=64, num_topk=num_topk, layout=layout)
        for num_topk in (1, 2, 3, 4, 5, 6, 7, 8, 31, 32)
        for layout in (TokenMajor(), ExpertMajor(8), PADDED)
    ]
    ranks.run(4, check_cases, cases, deadline_s=120.0)


def test_row_sizes(ranks: Ranks) -> None:
    """From one vector to rows of several pieces."""
    cases = [
        Case(seed=SEED, num_tokens=(33, 70), num_experts=8, hidden=hidden, layout=layout, dtype=dtype)
        for dtype, sizes in ((torch.float32, (4, 60, 3588, 16384)), (torch.bfloat16, (8, 1000, 7168, 7176, 16384)))
        for hidden in sizes
        for layout in (TokenMajor(), ExpertMajor(8))
    ]
    ranks.run(2, check_cases, cases, deadline_s=120.0)


def test_all_combine_modes(ranks: Ranks) -> None:
    for layout in (TokenMajor(), ExpertMajor(16), PADDED):
        case = Case(seed=SEED, num_tokens=(7, 0, 4, 80), num_experts=8, num_topk=4, layout=layout, dtype=torch.bfloat16)
        ranks.run(4, check_cases, [case], all_modes(layout == TokenMajor()), deadline_s=120.0)


def fuzz_case(generator: random.Random, num_ranks: int) -> Case:
    dtype = generator.choice((torch.float32, torch.bfloat16, torch.float16, FLOAT8))
    hidden = 128 * generator.randint(1, 4) if dtype == FLOAT8 else 8 * generator.randint(1, 80)
    return Case(
        seed=generator.getrandbits(32),
        num_tokens=tuple(generator.choice((0, 1, generator.randint(0, 300))) for _ in range(num_ranks)),
        num_experts=num_ranks * generator.randint(1, 20),
        hidden=hidden,
        num_topk=generator.randint(1, 9),
        layout=generator.choice(LAYOUTS),
        dtype=dtype,
        routing=generator.choice([r for r in ROUTINGS if r != "distinct"]),
    )


@pytest.mark.parametrize("num_ranks", (2, 4, 8))
def test_random_cases(ranks: Ranks, num_ranks: int) -> None:
    generator = random.Random(SEED + num_ranks)
    ranks.run(num_ranks, check_cases, [fuzz_case(generator, num_ranks) for _ in range(40)], deadline_s=250.0)


def bad_expert(context: RankContext) -> str:
    """Only the host that waits for counts can tell; the peers' dispatch is complete, without the bad routes."""
    torch.cuda.set_device(context.rank % torch.cuda.device_count())
    with context.buffer("cuda", num_experts=4, hidden=64, num_topk=2, max_tokens=8) as buffer:
        topk_idx = torch.zeros(8, 2, dtype=torch.int64, device="cuda")
        topk_idx[3, 1] = 4 if context.rank == 0 else 1
        x = torch.randn(8, 64, device="cuda")
        if context.rank == 0:
            return str(error_of(InvalidArgumentError, lambda: buffer.dispatch(x, topk_idx)))
        buffer.dispatch(x, topk_idx)
        return ""


def test_expert_out_of_range(ranks: Ranks) -> None:
    assert ranks.run(2, bad_expert) == ["topk_idx: must be in [-1, 4); got '4'", ""]


def bad_location(context: RankContext, location: int) -> str:
    """As a bad expert id: an error where it was given, and its route is nobody's: the slots of all others hold what
    they did, those that the location would have reached included."""
    torch.cuda.set_device(context.rank % torch.cuda.device_count())
    with context.buffer("cuda", num_experts=4, hidden=64, num_topk=1, max_tokens=8, max_capacity=8) as buffer:
        topk_idx = torch.zeros(4, 1, dtype=torch.int64, device="cuda")
        locations = torch.arange(4, dtype=torch.int32, device="cuda").view(4, 1)
        x = torch.randn(4, 64, device="cuda")
        padded = {"layout": Padded(8)}
        usual = buffer.dispatch(x, topk_idx, locations=locations, **padded).x.view(context.num_ranks, 2, 8, 64)
        text = ""
        if context.rank == 1:
            locations[2, 0] = location
            call = lambda: buffer.dispatch(x, topk_idx, locations=locations, **padded)  # noqa: E731
            text = str(error_of(InvalidArgumentError, call))
        else:
            want = usual.clone()
            want[1, 0, 2] = 0
            assert torch.equal(buffer.dispatch(x, topk_idx, locations=locations, **padded).x.view_as(want), want)
        locations[2, 0] = 2
        again = buffer.dispatch(x, topk_idx, locations=locations, **padded)
        assert torch.equal(again.x.view_as(usual), usual)
        home = buffer.combine(again.x, again.handle)
        torch.cuda.synchronize()
        assert torch.equal(home.x, x)
        return text


@pytest.mark.parametrize("location", (8, -1, 17, 2**31 - 1, -(2**31)))
def test_location_out_of_range(ranks: Ranks, location: int) -> None:
    """The same argument is ``locations[2, 0]`` on CPUs (``test_bad_dispatch.py``), where the host can look."""
    assert ranks.run(2, bad_location, location) == ["", f"locations: must be in [0, 8); got '{location}'"]


def sizes_in_turn(context: RankContext, layout: object, cast: bool) -> None:
    """Rows move into outputs that were made before their number was known, or again where there were too many."""
    torch.cuda.set_device(context.rank % torch.cuda.device_count())
    most = Case(seed=SEED, num_tokens=(300,) * context.num_ranks, num_experts=8, hidden=256, layout=layout)
    most = dataclasses.replace(most, dtype=torch.bfloat16, cast=Float8Cast() if cast else None)
    with make_buffer(context, "cuda", most, make_world(most)) as buffer:
        for number, first in enumerate((8, 9, 300, 290, 4, 0, 300, 300)):
            tokens = tuple(max(first - 5 * rank, 0) for rank in range(context.num_ranks))
            case = dataclasses.replace(most, seed=SEED + number, num_tokens=tokens)
            world = make_world(case)
            result = dispatch(buffer, world, context.rank)
            assert_dispatched(result, world, context.rank)
            if not cast:
                for mode in some_modes(layout == TokenMajor()):
                    check_combine(buffer, result.handle, world, context.rank, mode, seed=number)


@pytest.mark.parametrize("cast", (False, True))
@pytest.mark.parametrize("layout", (TokenMajor(), ExpertMajor(), ExpertMajor(16)), ids=str)
@pytest.mark.parametrize("num_ranks", (1, 2, 4))
def test_sizes_in_turn(ranks: Ranks, num_ranks: int, layout: object, cast: bool) -> None:
    ranks.run(num_ranks, sizes_in_turn, layout, cast)


def no_tokens_after_some(context: RankContext) -> None:
    """Counts of earlier dispatches lie in the heap still; empty tensors have null addresses."""
    torch.cuda.set_device(context.rank % torch.cuda.device_count())
    with context.buffer("cuda", num_experts=4, hidden=64, num_topk=2, max_tokens=200) as buffer:
        for num_tokens in (200, 130, 0, 0, 7, 0):
            x = torch.randn(num_tokens, 64, device="cuda")
            result = buffer.dispatch(x, torch.zeros(num_tokens, 2, dtype=torch.int64, device="cuda"))
            expected = num_tokens * context.num_ranks if context.rank == 0 else 0
            assert result.handle.num_recv_tokens == expected
            home = buffer.combine(result.x, result.handle)
            torch.cuda.synchronize()
            assert torch.equal(home.x, x)


@pytest.mark.parametrize("num_ranks", (1, 2))
def test_no_tokens_after_some(ranks: Ranks, num_ranks: int) -> None:
    ranks.run(num_ranks, no_tokens_after_some)
