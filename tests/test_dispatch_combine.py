"""Dispatch and combine against the oracle, on every transport, bit by bit."""

from __future__ import annotations

import random

import pytest
import torch
from cases import (
    DTYPES,
    FLOAT8,
    LAYOUTS,
    PADDED,
    ROUTINGS,
    Case,
    all_modes,
    check_case,
    dtype_id,
    layout_id,
)
from harness import RankContext, Ranks

from ray_deepep import ExpertMajor, TokenMajor

WORLD_SIZES = (1, 2, 3, 4)
SEED = 20_260
NUM_FUZZ_CASES = {"shm": 60, "reference": 20}
"""The reference's are the first of the same, and take several times as long."""


def tokens_of(num_ranks: int, most: int = 9) -> tuple[int, ...]:
    """Different numbers of tokens per rank."""
    return tuple(most - 2 * rank if most > 2 * rank else 0 for rank in range(num_ranks))


@pytest.mark.parametrize("num_ranks", WORLD_SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_id)
def test_layouts_and_dtypes(ranks: Ranks, transport: str, layout: object, dtype: torch.dtype, num_ranks: int) -> None:
    hidden = 256 if dtype == FLOAT8 else 24
    case = Case(
        seed=SEED,
        num_tokens=tokens_of(num_ranks),
        num_experts=num_ranks * 3,
        hidden=hidden,
        layout=layout,
        dtype=dtype,
        routing="sparse",
    )
    ranks.run(num_ranks, check_case, transport, case)


@pytest.mark.parametrize("layout", (TokenMajor(), ExpertMajor(8), PADDED), ids=layout_id)
@pytest.mark.parametrize("num_topk", (1, 2, 3, 4, 5, 6, 7, 8, 32))
def test_num_topk(ranks: Ranks, transport: str, num_topk: int, layout: object) -> None:
    case = Case(seed=SEED, num_tokens=(7, 0, 3), num_experts=36, num_topk=num_topk, layout=layout)
    ranks.run(3, check_case, transport, case)


@pytest.mark.parametrize("layout", (TokenMajor(), ExpertMajor(8), PADDED), ids=layout_id)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_routings(ranks: Ranks, transport: str, routing: str, layout: object) -> None:
    case = Case(seed=SEED, num_tokens=tokens_of(4), layout=layout, routing=routing)
    ranks.run(4, check_case, transport, case)


@pytest.mark.parametrize("layout", (TokenMajor(), ExpertMajor(8), PADDED), ids=layout_id)
@pytest.mark.parametrize(
    "num_tokens",
    ((0,), (0, 0), (0, 5), (5, 0), (0, 0, 7), (0, 0, 0, 0), (1, 0, 40, 0)),
    ids=lambda t: "_".join(map(str, t)),
)
def test_ranks_without_tokens(ranks: Ranks, transport: str, num_tokens: tuple[int, ...], layout: object) -> None:
    case = Case(seed=SEED, num_tokens=num_tokens, num_experts=12, layout=layout, dtype=torch.bfloat16)
    ranks.run(len(num_tokens), check_case, transport, case)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=dtype_id)
@pytest.mark.parametrize("hidden", (1, 7, 1000, 4097))
def test_odd_hidden(ranks: Ranks, transport: str, hidden: int, dtype: torch.dtype) -> None:
    for layout in (TokenMajor(), ExpertMajor(8), PADDED):
        case = Case(seed=SEED, num_tokens=(5, 3), hidden=hidden, layout=layout, dtype=dtype)
        ranks.run(2, check_case, transport, case)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=dtype_id)
@pytest.mark.parametrize("layout", (TokenMajor(), ExpertMajor(16), PADDED), ids=layout_id)
def test_all_combine_modes(ranks: Ranks, transport: str, layout: object, dtype: torch.dtype) -> None:
    case = Case(
        seed=SEED, num_tokens=(7, 0, 4), num_experts=6, num_topk=4, layout=layout, dtype=dtype, routing="sparse"
    )
    ranks.run(3, check_case, transport, case, all_modes(layout == TokenMajor()))


@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_id)
def test_eight_ranks(ranks: Ranks, transport: str, layout: object) -> None:
    case = Case(
        seed=SEED, num_tokens=tokens_of(8, most=11), num_experts=16, num_topk=4, layout=layout, routing="sparse"
    )
    ranks.run(8, check_case, transport, case)


def fuzz_case(generator: random.Random, num_ranks: int) -> Case:
    """A random case; small, because what goes wrong goes wrong with few tokens."""
    dtype = generator.choice(DTYPES)
    num_experts = num_ranks * generator.randint(1, 5)
    return Case(
        seed=generator.randrange(1 << 30),
        num_tokens=tuple(generator.choice((0, 1, 2, 5, 11)) for _ in range(num_ranks)),
        num_experts=num_experts,
        hidden=128 * generator.randint(1, 2) if dtype == FLOAT8 else generator.randint(1, 70),
        num_topk=generator.randint(1, min(num_experts, 8)),
        layout=generator.choice((TokenMajor(), PADDED, ExpertMajor(generator.randint(1, 20)))),
        dtype=dtype,
        routing=generator.choice(ROUTINGS),
    )


def check_fuzz(context: RankContext, transport: str, seed: int) -> None:
    generator = random.Random(seed)
    for number in range(NUM_FUZZ_CASES[transport]):
        case = fuzz_case(generator, context.num_ranks)
        modes = all_modes(case.layout == TokenMajor())
        modes = generator.sample(modes, k=2)
        try:
            check_case(context, transport, case, modes)
        except AssertionError as error:
            raise AssertionError(f"fuzz seed {seed}, case {number}: {error}") from error


@pytest.mark.parametrize("num_ranks", WORLD_SIZES)
def test_fuzz(ranks: Ranks, transport: str, num_ranks: int) -> None:
    ranks.run(num_ranks, check_fuzz, transport, SEED + num_ranks, deadline_s=120.0)
