"""What holds for dispatch and combine beyond their values: independence, determinism, who owns which tensor."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cases import (
    DTYPES,
    FLOAT8,
    LAYOUTS,
    PADDED,
    Case,
    assert_dispatched,
    assert_same,
    check_cached_dispatch,
    check_combine,
    dispatch,
    dtype_id,
    layout_id,
    make_buffer,
    make_world,
    some_modes,
)
from harness import RankContext, Ranks, shm_problem

from ray_deepep import ExpertMajor, TokenMajor

SEED = 20_261


def check_interleaved_buffers(context: RankContext, transport: str) -> None:
    """Operations of three buffers in turn, with handles that outlive later dispatches."""
    worlds, buffers, results = [], [], []
    for number, layout in enumerate((TokenMajor(), ExpertMajor(8), PADDED)):
        case = Case(seed=SEED + number, num_tokens=(6, 3), hidden=8 + number, num_topk=2 + number, layout=layout)
        worlds.append(make_world(case))
        buffers.append(make_buffer(context, transport, case, worlds[-1]))
    for _ in range(2):
        results.append([dispatch(buffer, world, context.rank) for buffer, world in zip(buffers, worlds)])
    for round_results in results:
        for buffer, world, result in reversed(list(zip(buffers, worlds, round_results))):
            assert_dispatched(result, world, context.rank)
            for mode in some_modes(world.layout == TokenMajor()):
                check_combine(buffer, result.handle, world, context.rank, mode, seed=SEED)
    for buffer in buffers:
        buffer.close()


def test_interleaved_buffers(ranks: Ranks, transport: str) -> None:
    ranks.run(2, check_interleaved_buffers, transport)


def check_plan_keeps_its_own(context: RankContext, transport: str, layout: object) -> None:
    """What the caller does to its tensors after a dispatch does not change the plan."""
    case = Case(seed=SEED, num_tokens=(6, 9), layout=layout)
    world, rank = make_world(case), context.rank
    given = make_world(case)
    token_major = layout == TokenMajor()
    with make_buffer(context, transport, case, world) as buffer:
        result = dispatch(buffer, given, rank)
        touched = [given.x[rank], given.topk_idx[rank], given.topk_weights[rank], result.x]
        touched += [] if given.locations is None else [given.locations[rank]]
        touched += [result.topk_idx] if token_major else []
        for tensor in touched:
            tensor.zero_()
        for mode in some_modes(token_major):
            check_combine(buffer, result.handle, world, rank, mode, seed=SEED)
        check_cached_dispatch(buffer, result.handle, world, rank, seed=SEED)


@pytest.mark.parametrize("layout", (TokenMajor(), ExpertMajor(4), PADDED), ids=layout_id)
def test_plan_keeps_its_own(ranks: Ranks, transport: str, layout: object) -> None:
    ranks.run(2, check_plan_keeps_its_own, transport, layout)


def check_outputs_stay(context: RankContext, transport: str) -> None:
    """Outputs belong to the caller: later operations of the buffer must not touch them."""
    case = Case(seed=SEED, num_tokens=(6, 9), layout=ExpertMajor(4))
    world = make_world(case)
    with make_buffer(context, transport, case, world) as buffer:
        first = dispatch(buffer, world, context.rank)
        home = buffer.combine(first.x, first.handle, keep_routes=True)
        copies = [tensor.clone() for tensor in (first.x, first.topk_weights, home.x, home.routes)]
        for _ in range(3):
            result = buffer.dispatch(
                world.x[context.rank] * 2, world.topk_idx[context.rank].flip(1), layout=ExpertMajor(4)
            )
            buffer.combine(result.x, result.handle, keep_routes=True)
        for number, (copy, tensor) in enumerate(zip(copies, (first.x, first.topk_weights, home.x, home.routes))):
            assert_same(f"output {number}", tensor, copy)
    assert_same("output after close", first.x, copies[0])


def test_outputs_stay(ranks: Ranks, transport: str) -> None:
    ranks.run(2, check_outputs_stay, transport)


def run_once(context: RankContext, transport: str, case: Case) -> dict[str, torch.Tensor]:
    """Everything that a dispatch and its combines return on this rank."""
    world = make_world(case)
    found = {}
    with make_buffer(context, transport, case, world) as buffer:
        result = dispatch(buffer, world, context.rank)
        found["x"], found["topk_weights"] = result.x, result.topk_weights
        rows = (result.x.float() * 1.7 - 0.3).to(torch.bfloat16 if case.dtype == FLOAT8 else case.dtype)
        for number, mode in enumerate(some_modes(world.layout == TokenMajor())):
            home = buffer.combine(
                rows, result.handle, weighted=mode.weighted, reduce=mode.reduce, keep_routes=mode.keep_routes
            )
            found[f"combined {number}"] = home.x
    return found


def check_equal_runs(context: RankContext, first: str, second: str, case: Case) -> None:
    want, got = run_once(context, first, case), run_once(context, second, case)
    assert want.keys() == got.keys()
    for name in want:
        assert_same(name, got[name], want[name])


LARGE = Case(seed=SEED, num_tokens=(300, 170, 0, 411), num_experts=32, hidden=320, num_topk=6, layout=ExpertMajor(16))


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=dtype_id)
def test_two_runs_give_the_same_bits(ranks: Ranks, transport: str, dtype: torch.dtype) -> None:
    case = dataclasses.replace(LARGE, dtype=dtype)
    ranks.run(4, check_equal_runs, transport, transport, case)


@pytest.mark.skipif(bool(shm_problem()), reason=shm_problem())
@pytest.mark.parametrize("layout", (TokenMajor(), ExpertMajor(16), PADDED), ids=layout_id)
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=dtype_id)
def test_shm_equals_reference(ranks: Ranks, dtype: torch.dtype, layout: object) -> None:
    case = dataclasses.replace(LARGE, dtype=dtype, layout=layout)
    ranks.run(4, check_equal_runs, "reference", "shm", case)


def check_close_to_float64(context: RankContext, transport: str, layout: object) -> None:
    """Tokens out and home again are the weighted sum that mathematics gives."""
    case = Case(seed=SEED, num_tokens=(31, 17, 5), num_experts=6, layout=layout, routing="distinct")
    world, rank = make_world(case), context.rank
    with make_buffer(context, transport, case, world) as buffer:
        result = dispatch(buffer, world, rank)
        weighted = layout != TokenMajor()
        rows = result.x
        if not weighted:
            rows = rows * result.topk_weights.sum(1, keepdim=True)
        for reduce in ("exact", "fast", "expert_order"):
            home = buffer.combine(rows, result.handle, weighted=weighted, reduce=reduce)
            want = world.x[rank].double() * world.topk_weights[rank].double().sum(1, keepdim=True)
            torch.testing.assert_close(home.x.double(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_id)
def test_close_to_float64(ranks: Ranks, transport: str, layout: object) -> None:
    ranks.run(3, check_close_to_float64, transport, layout)


def check_special_values(context: RankContext, transport: str, layout: object) -> None:
    """NaN and infinity travel unchanged, reach their own token only, and padding stays zero."""
    case = Case(seed=SEED, num_tokens=(4, 4), layout=layout, dtype=torch.float16)
    world, rank = make_world(case), context.rank
    for x in world.x:
        x[1], x[2] = torch.nan, torch.inf
    with make_buffer(context, transport, case, world) as buffer:
        result = dispatch(buffer, world, rank)
        assert_dispatched(result, world, rank)
        home = buffer.combine(result.x, result.handle, reduce="exact").x
    assert home[1].isnan().all() and home[2].isposinf().all()
    assert home[0].isfinite().all() and home[3].isfinite().all()


@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_id)
def test_special_values(ranks: Ranks, transport: str, layout: object) -> None:
    ranks.run(2, check_special_values, transport, layout)


def check_rows_in_padding_are_ignored(context: RankContext, transport: str, layout: object, reduce: str) -> None:
    """What experts wrote into padding reaches nobody."""
    case = Case(seed=SEED, num_tokens=(5, 2), layout=layout)
    world, rank = make_world(case), context.rank
    with make_buffer(context, transport, case, world) as buffer:
        result = dispatch(buffer, world, rank)
        used = torch.zeros(result.handle.num_rows, dtype=torch.bool)
        used[list(world.arrivals[rank].slot_of.values())] = True
        assert not used.all(), "the case has no padding"
        rows = torch.where(used[:, None], result.x, torch.nan)
        home = buffer.combine(rows, result.handle, reduce=reduce, keep_routes=reduce != "fast", weighted=True)
    assert home.x.isfinite().all()
    assert home.routes is None or home.routes.isfinite().all()


@pytest.mark.parametrize("reduce", ("exact", "fast", "expert_order"))
@pytest.mark.parametrize("layout", (ExpertMajor(16), PADDED), ids=layout_id)
def test_rows_in_padding_are_ignored(ranks: Ranks, transport: str, layout: object, reduce: str) -> None:
    ranks.run(2, check_rows_in_padding_are_ignored, transport, layout, reduce)


def check_index_add(context: RankContext, transport: str, dtype: torch.dtype) -> None:
    """``expert_order`` is what torch gives on one process with all experts."""
    case = Case(seed=SEED, num_tokens=(9, 6), num_topk=4, layout=ExpertMajor(1), dtype=dtype, routing="sparse")
    world, rank = make_world(case), context.rank
    x, factors = world.x[rank], torch.arange(1.3, 9.0, 0.7)[: case.num_experts]
    with make_buffer(context, transport, case, world) as buffer:
        result = dispatch(buffer, world, rank)
        counts = torch.tensor(result.handle.num_recv_tokens_per_expert)
        local = factors.chunk(world.num_ranks)[rank].repeat_interleave(counts)
        home = buffer.combine((result.x.float() * local[:, None]).to(dtype), result.handle, reduce="expert_order").x
    routes = sorted((expert, token, k) for source, token, k, expert in world.routes if source == rank)
    experts, tokens, _ = torch.tensor(routes).T
    rows = (x[tokens].float() * factors[experts, None]).to(dtype)
    assert_same("index_add", home, torch.zeros_like(x).index_add(0, tokens, rows))


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=dtype_id)
def test_expert_order_is_index_add(ranks: Ranks, transport: str, dtype: torch.dtype) -> None:
    ranks.run(2, check_index_add, transport, dtype)


def check_defaults(context: RankContext, transport: str) -> None:
    """int32 ids, no weights, no layout: weights are ones and rows come token-major."""
    case = Case(seed=SEED, num_tokens=(5, 2), routing="sparse")
    world, rank = make_world(case), context.rank
    ones = dataclasses.replace(world, topk_weights=[torch.ones_like(w) for w in world.topk_weights])
    with make_buffer(context, transport, case, world) as buffer:
        result = buffer.dispatch(world.x[rank], world.topk_idx[rank].to(torch.int32))
        assert_dispatched(result, ones, rank)
        stats = buffer.stats(reset=True)
        assert (stats.num_dispatch, stats.num_combine) == (1, 0)
        assert stats.dispatch_bytes == result.x.numel() * 4 and stats.dispatch_ms > 0
        assert buffer.stats().num_dispatch == 0


def test_defaults(ranks: Ranks, transport: str) -> None:
    ranks.run(2, check_defaults, transport)


def check_inputs_are_kept(context: RankContext, transport: str) -> None:
    """No operation writes to what it was given."""
    case = Case(seed=SEED, num_tokens=(5, 2), layout=PADDED)
    world, rank = make_world(case), context.rank
    fresh = make_world(case)
    with make_buffer(context, transport, case, world) as buffer:
        result = dispatch(buffer, world, rank)
        rows = result.x.clone()
        buffer.combine(result.x, result.handle, weighted=True, bias=world.x[rank])
        assert_same("rows", result.x, rows)
    for name in ("x", "topk_idx", "topk_weights", "locations"):
        assert_same(name, getattr(world, name)[rank], getattr(fresh, name)[rank])


def test_inputs_are_kept(ranks: Ranks, transport: str) -> None:
    ranks.run(2, check_inputs_are_kept, transport)
