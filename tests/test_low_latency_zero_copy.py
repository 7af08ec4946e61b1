"""Low-latency combines whose rows are read where the experts left them: same bits, and when rows may be overwritten."""

from __future__ import annotations

import dataclasses

import low_latency_timing
import pytest
import torch
import torch.distributed as dist
from harness import RankContext, Ranks, error_of
from low_latency_cases import (
    LAYOUTS,
    ROW_DTYPES,
    Case,
    World,
    assert_same,
    check_case,
    check_combined,
    combine,
    dispatch,
    in_heap,
    make_buffer,
    step,
)

from ray_deepep import ExpertMajor, InvalidArgumentError, InvalidTypeError, MismatchError, RankMaskedError

SEED = 61_200
BASE = Case(seed=SEED, num_tokens=(9, 4), num_experts=6, hidden=256, reduce="exact", zero_copy=True)
NUM_ROUNDS = 12


def check_both_ways(context: RankContext, transport: str, case: Case) -> None:
    """In one call, and with hooks; with the dispatch's weights, and with others."""
    for own_weights in (False, True):
        for with_hooks in (False, True):
            check_case(context, transport, dataclasses.replace(case, own_weights=own_weights), with_hooks=with_hooks)


@pytest.mark.parametrize("num_ranks", (1, 2, 4))
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_layouts_and_dtypes(ranks: Ranks, transport: str, layout: object, num_ranks: int) -> None:
    for dtype in ROW_DTYPES:
        case = dataclasses.replace(
            BASE,
            num_tokens=(11, 5, 0, 12)[:num_ranks],
            num_experts=num_ranks * 3,
            layout=layout,
            combine_dtype=dtype,
        )
        ranks.run(num_ranks, check_both_ways, transport, case)


def rows_of(world: World, rank: int, shape: torch.Size) -> torch.Tensor:
    """What this rank's experts answer, in blocks."""
    rows = torch.full(shape, float("nan"), dtype=world.case.combine_dtype)
    for expert, group in enumerate(world.groups[rank]):
        for position in range(len(group)):
            rows[expert, position] = world.output(rank, expert, position)
    return rows


def overwrites_after_the_next_dispatch(context: RankContext, transport: str) -> None:
    """One tensor for the answers of all layers, as in a decode loop; ranks are late by turns."""
    rank, held = context.rank, None
    with make_buffer(context, transport, BASE) as buffer:
        for number in range(NUM_ROUNDS):
            world = World(dataclasses.replace(BASE, seed=SEED + number))
            got = dispatch(buffer, world, rank)
            rows = rows_of(world, rank, got.x.shape)
            held = in_heap(buffer, rows) if held is None else held.copy_(rows)
            if number % 3 == rank:
                low_latency_timing.pause(0.02)
            home = buffer.low_latency_combine(held, got.handle, reduce="exact", zero_copy=True)
            check_combined(world, rank, home)


def test_rows_are_free_after_the_next_dispatch(ranks: Ranks, transport: str) -> None:
    ranks.run(2, overwrites_after_the_next_dispatch, transport)


def overlaps_micro_batches(context: RankContext, transport: str) -> None:
    """Two in flight by turns, with a tensor each."""
    rank = context.rank
    case = dataclasses.replace(BASE, num_topk=4)
    held: dict[int, torch.Tensor] = {}
    with make_buffer(context, transport, case) as buffer:

        def send_combine(world: World, got, turn: int):
            got.hook()
            rows = rows_of(world, rank, got.x.shape)
            held[turn] = in_heap(buffer, rows) if turn not in held else held[turn].copy_(rows)
            return buffer.low_latency_combine(
                held[turn], got.handle, reduce="exact", zero_copy=True, return_recv_hook=True
            )

        for number in range(NUM_ROUNDS):
            worlds = [World(dataclasses.replace(case, seed=SEED + 2 * number + turn)) for turn in range(2)]
            sent = [dispatch(buffer, world, rank, return_recv_hook=True) for world in worlds]
            if number % 3 == rank:
                low_latency_timing.pause(0.01)
            homes = [send_combine(world, got, turn) for turn, (world, got) in enumerate(zip(worlds, sent))]
            for world, home in zip(worlds, homes):
                home.hook()
                check_combined(world, rank, home)


def test_two_micro_batches(ranks: Ranks, transport: str) -> None:
    ranks.run(2, overlaps_micro_batches, transport)


def overflows(context: RankContext, transport: str) -> None:
    """A route that had no room adds nothing, as where rows are copied."""
    case = dataclasses.replace(BASE, layout=ExpertMajor(1), combine_dtype=torch.float32)
    world, rank = World(case), context.rank
    with make_buffer(context, transport, case) as buffer:
        got = buffer.low_latency_dispatch(world.x[rank], world.topk_idx[rank], layout=ExpertMajor(1), max_recv_tokens=5)
        assert int(got.handle.needed) > 5
        rows = torch.randn(5, case.hidden, generator=torch.Generator().manual_seed(rank))
        copied = buffer.low_latency_combine(rows, got.handle, reduce="exact")
        read = buffer.low_latency_combine(in_heap(buffer, rows), got.handle, reduce="exact", zero_copy=True)
        assert_same(read.x, copied.x, "combined rows")


def test_overflow(ranks: Ranks, transport: str) -> None:
    ranks.run(2, overflows, transport)


def is_left_behind(context: RankContext, transport: str) -> None:
    """Peers that went on may have overwritten what this rank read: it is told, and its output is not good."""
    world, rank = World(BASE), context.rank
    with make_buffer(context, transport, BASE) as buffer:
        got = dispatch(buffer, world, rank)
        home = combine(buffer, world, rank, got, return_recv_hook=True)
        if rank == 0:
            home.hook()
            buffer.mask_rank(1)
            alone = World(dataclasses.replace(BASE, absent=frozenset({1})))
            dispatch(buffer, alone, 0)
        dist.barrier()
        if rank == 1 and transport == "reference":
            # Its rows came as messages, which nobody overwrites.
            home.hook()
            check_combined(world, 1, home)
        elif rank == 1:
            assert error_of(RankMaskedError, home.hook).by == [0]
        dist.barrier()


def test_rank_that_is_left_behind(ranks: Ranks, transport: str) -> None:
    ranks.run(2, is_left_behind, transport)


def refuses(context: RankContext, transport: str) -> None:
    """Everything that this rank can judge, before anything is sent; then what ranks must agree on."""
    world, rank = World(BASE), context.rank
    with make_buffer(context, transport, BASE) as buffer:
        got = dispatch(buffer, world, rank)
        rows = rows_of(world, rank, got.x.shape)

        def refused(error_type: type[Exception], text: str, **more: object) -> None:
            given = {"reduce": "exact", "zero_copy": True, **more}
            assert text in str(error_of(error_type, lambda: buffer.low_latency_combine(rows, got.handle, **given)))

        refused(InvalidArgumentError, 'zero_copy: goes with reduce="exact" only', reduce="fast")
        refused(InvalidTypeError, "zero_copy: must be a bool; got 'int'", zero_copy=1)
        if transport != "reference":
            refused(InvalidArgumentError, "rows: must lie in the buffer's heap with zero_copy (Buffer.symm_empty")
        held = in_heap(buffer, rows)
        call = lambda: buffer.low_latency_combine(held, got.handle, reduce="exact", zero_copy=rank == 0)  # noqa: E731
        error = error_of(MismatchError, call)
        assert (error.field, {error.expected, error.seen}) == ("reduce", {"exact", "exact, zero_copy"})
        step(buffer, world, rank)


def test_bad_calls(ranks: Ranks, transport: str) -> None:
    ranks.run(2, refuses, transport)
