"""Several nodes: rows hop once per (token, node). Logical nodes on one machine, against the oracle of one domain."""

from __future__ import annotations

import itertools
import random
import time

import low_latency_cases
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
    assert_same,
    check_case,
    dispatch,
    dtype_id,
    layout_id,
    make_buffer,
    make_world,
    some_modes,
)
from harness import RankContext, Ranks, shm_problem
from test_autograd import check_gradients
from test_combine_experts import check_same_bits
from test_communicator import check_close, check_several_communicators, check_subgroups
from test_dispatch_combine import fuzz_case
from test_dispatch_properties import check_plan_keeps_its_own

from ray_deepep import Buffer, ExpertMajor, Float8Cast, HeapFullError, TokenMajor

pytestmark = pytest.mark.skipif(bool(shm_problem()), reason=shm_problem())

SEED = 404
WORLDS = ((4, 2), (4, 1), (6, 2), (6, 3))
"""Ranks, and ranks of a node."""


def world_id(world: tuple[int, int]) -> str:
    num_ranks, size = world
    return f"{num_ranks // size}x{size}"


# Six ranks for the widest and for rows with scales beside them; how many nodes there are is nothing to a dtype.
WORLDS_AND_DTYPES = [(w, d) for w, d in itertools.product(WORLDS, DTYPES) if w[0] == 4 or d in (torch.float32, FLOAT8)]


@pytest.mark.parametrize(
    ("world", "dtype"), WORLDS_AND_DTYPES, ids=[f"{dtype_id(d)}-{world_id(w)}" for w, d in WORLDS_AND_DTYPES]
)
@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_id)
def test_layouts_and_dtypes(ranks: Ranks, layout: object, dtype: torch.dtype, world: tuple[int, int]) -> None:
    num_ranks, size = world
    case = Case(
        seed=SEED,
        num_tokens=(9, 4, 0, 7, 1, 5)[:num_ranks],
        num_experts=num_ranks * 2,
        hidden=256 if dtype == FLOAT8 else 24,
        layout=layout,
        dtype=dtype,
        routing="sparse",
    )
    ranks.run(num_ranks, check_case, f"shm/{size}", case)


@pytest.mark.parametrize("layout", (TokenMajor(), ExpertMajor(8), PADDED), ids=layout_id)
@pytest.mark.parametrize("num_topk", (1, 2, 8, 32))
def test_num_topk(ranks: Ranks, num_topk: int, layout: object) -> None:
    case = Case(seed=SEED, num_tokens=(7, 0, 3, 5), num_experts=36, num_topk=num_topk, layout=layout)
    ranks.run(4, check_case, "shm/2", case)


@pytest.mark.parametrize("layout", (TokenMajor(), ExpertMajor(4), PADDED), ids=layout_id)
def test_plan_keeps_its_own(ranks: Ranks, layout: object) -> None:
    ranks.run(2, check_plan_keeps_its_own, "shm/1", layout)


@pytest.mark.parametrize("layout", (TokenMajor(), ExpertMajor(8), PADDED), ids=layout_id)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_routings(ranks: Ranks, routing: str, layout: object) -> None:
    case = Case(seed=SEED, num_tokens=(9, 7, 5, 3), layout=layout, routing=routing)
    ranks.run(4, check_case, "shm/2", case)


@pytest.mark.parametrize("layout", (TokenMajor(), ExpertMajor(8), PADDED), ids=layout_id)
@pytest.mark.parametrize("num_tokens", ((0, 0, 0, 0), (5, 0, 0, 0), (0, 0, 0, 7), (1, 0, 40, 0)), ids=str)
@pytest.mark.parametrize("size", (1, 2))
def test_ranks_without_tokens(ranks: Ranks, size: int, num_tokens: tuple[int, ...], layout: object) -> None:
    case = Case(seed=SEED, num_tokens=num_tokens, num_experts=12, layout=layout, dtype=torch.bfloat16)
    ranks.run(4, check_case, f"shm/{size}", case)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=dtype_id)
@pytest.mark.parametrize("layout", (TokenMajor(), ExpertMajor(16), PADDED), ids=layout_id)
def test_all_combine_modes(ranks: Ranks, layout: object, dtype: torch.dtype) -> None:
    case = Case(
        seed=SEED, num_tokens=(7, 0, 4, 2), num_experts=12, num_topk=4, layout=layout, dtype=dtype, routing="sparse"
    )
    ranks.run(4, check_case, "shm/2", case, all_modes(layout == TokenMajor()))


@pytest.mark.parametrize("hidden", (1, 7, 4097))
def test_odd_hidden(ranks: Ranks, hidden: int) -> None:
    for layout in (TokenMajor(), ExpertMajor(8)):
        case = Case(seed=SEED, num_tokens=(5, 3, 1, 0), hidden=hidden, layout=layout, dtype=torch.bfloat16)
        ranks.run(4, check_case, "shm/2", case)


@pytest.mark.parametrize("layout", (TokenMajor(), ExpertMajor(8)), ids=layout_id)
def test_float8_cast(ranks: Ranks, layout: object) -> None:
    case = Case(seed=SEED, num_tokens=(5, 3, 1, 4), hidden=256, layout=layout, cast=Float8Cast())
    ranks.run(4, check_case, "shm/2", case)


@pytest.mark.parametrize("spare_rows", (0, 5))
@pytest.mark.parametrize("layout", (TokenMajor(), ExpertMajor(8)), ids=layout_id)
def test_fixed_shapes(ranks: Ranks, layout: object, spare_rows: int) -> None:
    case = Case(
        seed=SEED,
        num_tokens=(6, 3, 0, 5),
        layout=layout,
        routing="sparse",
        dtype=FLOAT8,
        hidden=128,
        spare_rows=spare_rows,
    )
    ranks.run(4, check_case, "shm/2", case)


@pytest.mark.parametrize("layout", (TokenMajor(), ExpertMajor(8), PADDED), ids=layout_id)
@pytest.mark.parametrize("size", (2, 4))
def test_eight_ranks(ranks: Ranks, size: int, layout: object) -> None:
    case = Case(
        seed=SEED, num_tokens=(11, 9, 7, 5, 3, 1, 0, 0), num_experts=16, num_topk=4, layout=layout, routing="sparse"
    )
    ranks.run(8, check_case, f"shm/{size}", case)


def check_fuzz(context: RankContext, transport: str, seed: int) -> None:
    generator = random.Random(seed)
    for number in range(16):
        case = fuzz_case(generator, context.num_ranks)
        modes = generator.sample(all_modes(case.layout == TokenMajor()), k=2)
        try:
            check_case(context, transport, case, modes)
        except AssertionError as error:
            raise AssertionError(f"fuzz seed {seed}, case {number}: {error}") from error


@pytest.mark.parametrize("world", WORLDS, ids=world_id)
def test_fuzz(ranks: Ranks, world: tuple[int, int]) -> None:
    num_ranks, size = world
    ranks.run(num_ranks, check_fuzz, f"shm/{size}", SEED + num_ranks + size, deadline_s=120.0)


@pytest.mark.parametrize("layout", (ExpertMajor(8), PADDED), ids=layout_id)
def test_combine_experts(ranks: Ranks, layout: object) -> None:
    case = Case(seed=SEED, num_tokens=(9, 0, 7, 2), num_experts=12, layout=layout, dtype=torch.bfloat16)
    ranks.run(4, check_same_bits, "shm/2", case, some_modes(token_major=False))


@pytest.mark.parametrize("reduce", ("exact", "fast", "expert_order"))
@pytest.mark.parametrize(
    ("layout", "weigh_at"),
    ((TokenMajor(), "experts"), (ExpertMajor(8), "experts"), (ExpertMajor(8), "combine"), (PADDED, "combine")),
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_gradients(ranks: Ranks, layout: object, weigh_at: str, reduce: str) -> None:
    case = Case(seed=SEED, num_tokens=(9, 5, 0, 2), num_experts=8, hidden=12, layout=layout, routing="sparse")
    ranks.run(4, check_gradients, "shm/2", case, weigh_at, reduce)


def test_activation_checkpointing(ranks: Ranks) -> None:
    case = Case(seed=SEED, num_tokens=(4, 6, 1, 3), num_experts=4, hidden=8, layout=ExpertMajor(1))
    ranks.run(4, check_gradients, "shm/2", case, "combine", "exact", True)


def check_bits_do_not_depend_on_nodes(context: RankContext) -> None:
    """``exact`` and dispatch: the same bits as in one domain, also for bfloat16 sums that round."""
    case = Case(seed=SEED, num_tokens=(9, 5, 3, 7), num_topk=6, hidden=64, layout=ExpertMajor(8), dtype=torch.bfloat16)
    world, rank = make_world(case), context.rank
    found = []
    for transport in ("shm", "shm/2", "shm/1"):
        with make_buffer(context, transport, case, world) as buffer:
            result = dispatch(buffer, world, rank)
            out = buffer.combine(result.x * 1.7, result.handle, weighted=True)
            found.append((result.x, result.topk_weights, out.x))
    for other in found[1:]:
        for name, got, want in zip(("x", "topk_weights", "combined"), other, found[0]):
            assert_same(name, got, want)


def test_bits_do_not_depend_on_nodes(ranks: Ranks) -> None:
    ranks.run(4, check_bits_do_not_depend_on_nodes)


def check_rows_hop_once(context: RankContext) -> tuple[int, int]:
    """Bytes of rows that leave this node: those of a dispatch and of a ``fast`` combine."""
    hidden, num_tokens = 1024, 8
    topk_idx = torch.arange(8).expand(num_tokens, 8).contiguous()
    with context.buffer("shm/2", num_experts=8, hidden=hidden, num_topk=8, max_tokens=num_tokens) as buffer:
        hop, sent = buffer._transport._hop, []
        exchange = hop.exchange

        def counting(send: list[torch.Tensor], recv: list[torch.Tensor]) -> None:
            away = [part for node, part in enumerate(send) if node != buffer.comm.domains.node_rank]
            sent.append(sum(part.numel() for part in away if part.shape[1] == hidden * 4))
            exchange(send, recv)

        hop.exchange = counting
        result = buffer.dispatch(torch.ones(num_tokens, hidden), topk_idx, layout=ExpertMajor(1))
        dispatched = sum(sent)
        buffer.combine(result.x, result.handle, reduce="fast")
        return dispatched, sum(sent) - dispatched


def test_rows_hop_once(ranks: Ranks) -> None:
    """Each token has two experts on each of four ranks; one row per (token, other node) travels, each way."""
    num_bytes = 8 * 1024 * 4
    assert ranks.run(4, check_rows_hop_once) == [(num_bytes, num_bytes)] * 4


def check_heap_tensors(context: RankContext) -> None:
    """Rows in the heap give the same bits, also when they leave no room for the landing zone."""
    hidden, num_tokens = 64, 6
    generator = torch.Generator().manual_seed(context.rank)
    x = torch.randn(num_tokens, hidden, generator=generator)
    topk_idx = torch.randint(0, 8, (num_tokens, 3), generator=generator)
    geometry = {"num_experts": 8, "hidden": hidden, "num_topk": 3, "max_tokens": num_tokens, "symm_bytes": 1 << 16}
    with context.buffer("shm/2", **geometry) as buffer:
        want = buffer.dispatch(x, topk_idx, layout=ExpertMajor(4))
        out = buffer.combine(want.x, want.handle).x
        heap_x, heap_rows = (buffer.symm_empty(len(rows), rows.dtype).copy_(rows) for rows in (x, want.x))
        held, num_rows = [], 256
        for full in (False, True):
            assert_same(f"x, full={full}", buffer.dispatch(heap_x, handle=want.handle).x, want.x)
            assert_same(f"out, full={full}", buffer.combine(heap_rows, want.handle).x, out)
            while num_rows:
                try:
                    held.append(buffer.symm_empty(num_rows, torch.float32))
                except HeapFullError:
                    num_rows //= 2


def test_heap_tensors(ranks: Ranks) -> None:
    ranks.run(4, check_heap_tensors)


def check_same_ranks_again(context: RankContext) -> None:
    """Addresses of a group that is gone must not be met, also where some ranks leave it later than others."""
    x, topk_idx = torch.ones(3, 8), torch.tensor([[0, 1, 2, 3]] * 3)
    for _ in range(4):
        comm = context.new_communicator("shm/1")
        with Buffer(comm, num_experts=4, hidden=8, num_topk=4, max_tokens=3) as buffer:
            assert buffer.dispatch(x, topk_idx).x.shape == (12, 8)
        time.sleep(0.05 * context.rank)
        comm.close()


def test_same_ranks_again(ranks: Ranks) -> None:
    ranks.run(4, check_same_ranks_again)


def test_low_latency_calls(ranks: Ranks) -> None:
    """They go over the reference."""
    case = low_latency_cases.fuzz_case(random.Random(SEED), 4)
    ranks.run(4, low_latency_cases.check_case, "shm/2", case)


def test_communicators_over_nodes(ranks: Ranks) -> None:
    ranks.run(4, check_several_communicators, "shm/2")
    ranks.run(4, check_subgroups, "shm/1")
    ranks.run(4, check_close, "shm/2")
