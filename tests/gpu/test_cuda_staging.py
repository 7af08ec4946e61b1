"""Rows that do not live in the heap: copied there or cast to float8 on the way, bit for bit as the oracle has them.

Small enough for compute-sanitizer (``check.sh``).
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cases import (
    Case,
    assert_dispatched,
    check_case,
    check_combine,
    dispatch,
    make_buffer,
    make_world,
    some_modes,
    with_rows,
)
from harness import RankContext, Ranks

from ray_deepep import ExpertMajor, Float8Cast, TokenMajor
from ray_deepep.cuda import cuda_problem

pytestmark = pytest.mark.skipif(bool(cuda_problem()), reason=f"transport cuda: {cuda_problem()}")
SEED = 4_300
FORMATS = ("float32", "power_of_two")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Around a piece of rows (16), a piece of a row (512 elements) and a stage of shared memory (14,336 bytes).
TOKENS = (1, 15, 16, 17, 70)
HIDDEN = (128, 384, 512, 640, 7168, 14_464)


def check_cases(context: RankContext, cases: list[Case]) -> None:
    torch.cuda.set_device(context.rank % torch.cuda.device_count())
    for case in cases:
        check_case(context, "cuda", case)


def sizes_of(num_ranks: int, num_tokens: int) -> tuple[int, ...]:
    return tuple(max(num_tokens - 3 * rank, 0) for rank in range(num_ranks))


@pytest.mark.parametrize("num_ranks", (1, 2, 4))
def test_sizes(ranks: Ranks, num_ranks: int) -> None:
    """Copies, and casts of each type."""
    more = [{"dtype": dtype, "cast": Float8Cast(scale_format=how)} for dtype in FLOATS for how in FORMATS]
    sizes = [(tokens, hidden) for tokens in TOKENS for hidden in HIDDEN]
    cases = [
        Case(
            seed=SEED + number,
            num_tokens=sizes_of(num_ranks, tokens),
            num_experts=4 * num_ranks,
            hidden=hidden,
            layout=(TokenMajor(), ExpertMajor(16))[number % 2],
            **(more[number % len(more)] if number % 3 else {"dtype": torch.bfloat16}),
        )
        for number, (tokens, hidden) in enumerate(sizes)
    ]
    ranks.run(num_ranks, check_cases, cases, deadline_s=200.0)


def odd_values(context: RankContext, dtype: torch.dtype, scale_format: str) -> None:
    """Zeros of both signs alone and beside others, numbers far apart, the largest and the smallest."""
    torch.cuda.set_device(context.rank % torch.cuda.device_count())
    case = Case(
        seed=SEED,
        num_tokens=(9,) * context.num_ranks,
        num_experts=4 * context.num_ranks,
        hidden=384,
        layout=TokenMajor(),
        dtype=dtype,
        cast=Float8Cast(scale_format=scale_format),
    )
    world = make_world(case)
    largest, tiny = torch.finfo(dtype).max, torch.finfo(dtype).tiny
    x = [rows.clone() for rows in world.x_given]
    for rows in x:
        rows[0] = 0.0
        rows[1] = -0.0
        rows[2, ::2], rows[2, 1::2] = -0.0, 3.0
        rows[3], rows[3, 5] = tiny, 448.0
        rows[4, 7] = largest
        rows[5], rows[5, 200] = -tiny, -largest
        rows[6] = 1e-5
    world = with_rows(world, x)
    with make_buffer(context, "cuda", case, world) as buffer:
        assert_dispatched(dispatch(buffer, world, context.rank), world, context.rank)


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_odd_values(ranks: Ranks, dtype: torch.dtype, scale_format: str) -> None:
    ranks.run(2, odd_values, dtype, scale_format)


def one_after_the_other(context: RankContext) -> None:
    """The same flags and rings again and again, with fewer and with more rows than before."""
    torch.cuda.set_device(context.rank % torch.cuda.device_count())
    most = Case(
        seed=SEED, num_tokens=(90,) * context.num_ranks, num_experts=8, hidden=640, layout=TokenMajor(), num_topk=2
    )
    with make_buffer(context, "cuda", most, make_world(most)) as buffer:
        for number, tokens in enumerate((90, 3, 0, 41, 90, 1)):
            case = dataclasses.replace(most, seed=SEED + number, num_tokens=sizes_of(context.num_ranks, tokens))
            world = make_world(case)
            result = dispatch(buffer, world, context.rank)
            assert_dispatched(result, world, context.rank)
            for mode in some_modes(token_major=True):
                check_combine(buffer, result.handle, world, context.rank, mode, seed=number)


@pytest.mark.parametrize("num_ranks", (2, 4))
def test_one_after_the_other(ranks: Ranks, num_ranks: int) -> None:
    ranks.run(num_ranks, one_after_the_other)
