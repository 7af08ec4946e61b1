"""Tensors of ``Buffer.symm_empty`` on transport ``shm``: peers read them in place, and the bits are the same."""

from __future__ import annotations

import dataclasses
import time

import pytest
import torch
from cases import (
    DTYPES,
    PADDED,
    Case,
    all_modes,
    assert_dispatched,
    assert_same,
    dispatch,
    dtype_id,
    layout_id,
    make_world,
    random_rows,
    with_rows,
)
from harness import RankContext, RankPool, Ranks, error_of, shm_problem

from ray_deepep import Buffer, CommFaultError, ExpertMajor, HeapFullError, MismatchError, TokenMajor
from ray_deepep.handle import Padded

pytestmark = pytest.mark.skipif(bool(shm_problem()), reason=shm_problem())
LAYOUTS = (TokenMajor(), ExpertMajor(8), PADDED)


def in_heap(buffer: Buffer, rows: torch.Tensor) -> torch.Tensor:
    """A copy of ``rows`` in the heap."""
    copy = buffer.symm_empty(len(rows), rows.dtype)
    return copy.copy_(rows)


def spoil(rows: torch.Tensor) -> None:
    """What a caller may do as soon as a call returns."""
    rows.view(torch.uint8).fill_(0x55)


def check_same_bits(context: RankContext, case: Case) -> None:
    """New dispatch, cached dispatch and every combine; rank 1 of each call has its rows elsewhere."""
    world, rank = make_world(case), context.rank
    geometry = {
        "num_experts": case.num_experts,
        "hidden": case.hidden,
        "num_topk": case.num_topk,
        "max_tokens": max(case.num_tokens),
        "max_capacity": world.layout.capacity if isinstance(world.layout, Padded) else 0,
    }
    with context.buffer("shm", symm_bytes=1 << 20, **geometry) as buffer:
        place = in_heap if rank != 1 else lambda buffer, rows: rows.clone()
        mine = dataclasses.replace(world, x=[place(buffer, x) if r == rank else x for r, x in enumerate(world.x)])
        result = dispatch(buffer, mine, rank)
        spoil(mine.x[rank])
        assert_dispatched(result, world, rank)

        generator = torch.Generator().manual_seed(case.seed + 1)
        others = with_rows(world, [random_rows(len(x), case.hidden, x.dtype, generator) for x in world.x])
        x = place(buffer, others.x[rank])
        scales = None if others.x_scales is None else others.x_scales[rank]
        cached = buffer.dispatch(x, x_scales=scales, handle=result.handle)
        spoil(x)
        assert_dispatched(cached, others, rank, cached=True)

        if case.dtype != torch.float8_e4m3fn:
            check_combines(buffer, result.handle, case, place)


def check_combines(buffer: Buffer, handle: object, case: Case, place: object) -> None:
    rows = random_rows(handle.num_rows, case.hidden, case.dtype, torch.Generator().manual_seed(case.seed + 2))
    for mode in all_modes(isinstance(handle.layout, TokenMajor)):
        if mode.bias or mode.carry:
            continue
        options = {"weighted": mode.weighted, "reduce": mode.reduce, "keep_routes": mode.keep_routes}
        want = buffer.combine(rows, handle, **options)
        placed = place(buffer, rows)
        got = buffer.combine(placed, handle, **options)
        spoil(placed)
        assert_same(f"{mode} x", got.x, want.x)
        assert_same(f"{mode} routes", got.routes, want.routes)


@pytest.mark.parametrize("num_ranks", (1, 2, 4))
@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_id)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_same_bits(ranks: Ranks, dtype: torch.dtype, layout: object, num_ranks: int) -> None:
    case = Case(
        seed=41,
        num_tokens=(9, 6, 0, 3)[:num_ranks],
        num_experts=num_ranks * 2,
        hidden=128,
        layout=layout,
        dtype=dtype,
        routing="sparse",
    )
    ranks.run(num_ranks, check_same_bits, case)


def check_overwritten_at_once(context: RankContext) -> None:
    """Rows large enough that a peer still reads them when this rank has pulled its own."""
    rank, num_ranks = context.rank, context.num_ranks
    geometry = {"num_experts": num_ranks, "hidden": 1024, "num_topk": 1, "max_tokens": 256}
    with context.buffer("shm", symm_bytes=4 << 20, **geometry) as buffer:
        x = buffer.symm_empty(256, torch.float32)
        for round_ in range(20):
            x.fill_(100 * rank + round_)
            # All tokens go to one rank, another one each round: the others have nothing to pull.
            result = buffer.dispatch(x, torch.full((256, 1), round_ % num_ranks))
            x.fill_(-1)
            values = result.x[:, 0].unique().tolist()
            assert values == ([100 * r + round_ for r in range(num_ranks)] if round_ % num_ranks == rank else [])


@pytest.mark.parametrize("num_ranks", (2, 4))
def test_overwritten_at_once(ranks: Ranks, num_ranks: int) -> None:
    ranks.run(num_ranks, check_overwritten_at_once)


GEOMETRY = {"num_experts": 4, "hidden": 128, "num_topk": 1, "max_tokens": 8}


def check_room(context: RankContext) -> None:
    """Blocks come back; a full heap is an error; without room tensors are plain; rows outlive the buffer."""
    with context.buffer("shm", symm_bytes=4096, **GEOMETRY) as buffer:
        rows = [buffer.symm_empty(4, torch.float32) for _ in range(2)]
        error = error_of(HeapFullError, lambda: buffer.symm_empty(1, torch.float32))
        assert "asked for 512 bytes; 0 of symm_bytes=4096 are free" in str(error)
        del rows[0]
        rows.append(buffer.symm_empty(4, torch.float32).fill_(3))
    assert float(rows[-1].sum()) == 3 * 4 * 128
    with context.buffer("shm", **GEOMETRY) as buffer:
        assert buffer.symm_empty(1000, torch.float32).shape == (1000, 128)


def test_room(ranks: Ranks) -> None:
    ranks.run(2, check_room)


def check_sizes_differ(context: RankContext) -> str:
    return str(error_of(MismatchError, lambda: context.buffer("shm", symm_bytes=4096 << context.rank, **GEOMETRY)))


def test_sizes_differ(ranks: Ranks) -> None:
    assert all("symm_bytes" in message for message in ranks.run(2, check_sizes_differ))


DEADLINE_S = 1.5


class LatePull:
    """A core buffer that publishes in time and pulls too late."""

    def __init__(self, core: object) -> None:
        self._core = core

    def __getattr__(self, name: str) -> object:
        return getattr(self._core, name)

    def pull_dispatch(self, *args: object) -> None:
        time.sleep(2 * DEADLINE_S)
        self._core.pull_dispatch(*args)


def waits_for_a_reader(context: RankContext) -> str:
    comm = context.new_communicator("shm", deadline_s=DEADLINE_S)
    buffer = Buffer(comm, symm_bytes=1 << 16, **{**GEOMETRY, "num_experts": 2 * context.num_ranks})
    topk_idx = torch.arange(8).unsqueeze(1) % buffer.geometry.num_experts
    if context.rank == 1:
        buffer._transport._buffer = LatePull(buffer._transport._buffer)
        buffer.dispatch(torch.ones(8, 128), topk_idx)
        return ""
    x = buffer.symm_empty(8, torch.float32).fill_(1)
    return error_of(CommFaultError, lambda: buffer.dispatch(x, topk_idx)).record.to_json()


@pytest.mark.parametrize("num_ranks", (2, 3))
def test_a_late_reader_is_named(num_ranks: int) -> None:
    with RankPool(num_ranks) as pool:
        outcomes = pool.outcomes(waits_for_a_reader, deadline_s=20.0)
        for rank in (0, 2)[: num_ranks - 1]:
            assert outcomes[rank].value, outcomes[rank].error or outcomes[rank].lost
            assert '"phase": "wait_finished"' in outcomes[rank].value
            assert '"peer": 1' in outcomes[rank].value and '"cause": "timeout"' in outcomes[rank].value
