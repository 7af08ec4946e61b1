"""Fixed shapes (``max_recv_tokens``) and CUDA graphs: replays with changing routing, and overflow that is never silent.

tests/gpu/run.sh tests/gpu/test_cuda_graphs.py
"""

from __future__ import annotations

import dataclasses

import device_cases
import device_oracle
import pytest
import torch
from captured import CapturedLayer, new_graph
from cases import FLOAT8, LAYOUTS, PADDED, ROUTINGS, Case
from device_cases import make_buffer, worlds_of
from device_oracle import World
from harness import RankContext, Ranks, error_of

from ray_deepep import (
    Buffer,
    DispatchResult,
    ExpertMajor,
    InvalidArgumentError,
    ReceiveOverflowError,
    TokenMajor,
    autograd,
)
from ray_deepep.cuda import cuda_problem

pytestmark = pytest.mark.skipif(bool(cuda_problem()), reason=f"transport cuda: {cuda_problem()}")
SEED = 1234
NUM_REPLAYS = 50
FIXED_LAYOUTS = tuple(layout for layout in LAYOUTS if layout != PADDED)
SHAPES = [TokenMajor(), ExpertMajor(1), ExpertMajor(16)]


def make_case(num_ranks: int, layout: object, **more: object) -> Case:
    sizes = {"num_tokens": tuple(90 - 29 * rank for rank in range(num_ranks)), "num_experts": 4 * num_ranks}
    return Case(**{"seed": SEED, "hidden": 128, "dtype": torch.bfloat16, "layout": layout, **sizes, **more})


def dispatch_fixed(buffer: Buffer, world: World, rank: int, max_recv_tokens: int) -> DispatchResult:
    return device_cases.dispatch(buffer, world, rank, max_recv_tokens=max_recv_tokens)


def eager_fixed(context: RankContext, case: Case) -> None:
    """Every routing with room to spare and with none, fresh and cached, combined in two ways."""
    device, rank = device_cases.use_gpu(context.rank), context.rank
    modes = ({},) if isinstance(case.layout, TokenMajor) else ({"weighted": True}, {"reduce": "fast"})
    with make_buffer(context, case) as buffer:
        for world in worlds_of(case, device, len(ROUTINGS)):
            needed = device_cases.rows_needed(world)
            # None to spare; some; more than this buffer could ever receive.
            for room in (needed or 1, needed + 37, 2 * sum(case.num_tokens) * case.num_topk + 1000):
                result = dispatch_fixed(buffer, world, rank, room)
                result.handle.check()
                device_cases.assert_dispatched(result, world, rank, max_recv_tokens=room)
                again = device_cases.dispatch_along(buffer, world, rank, result.handle)
                device_cases.assert_dispatched(again, world, rank, cached=True, max_recv_tokens=room)
                rows_dtype = torch.bfloat16 if case.dtype == FLOAT8 else case.dtype
                rows = device_cases.make_rows(world, rows_dtype, SEED, num_rows=room)
                for mode in modes:
                    got = buffer.combine(rows[rank], result.handle, **mode)
                    device_cases.assert_same(f"{mode}", got.x, device_oracle.combine(world, rank, rows, **mode))
                carried = torch.rand(result.topk_weights.shape, device=device) if rank else result.topk_weights
                home = buffer.combine_weights(carried, result.handle)
                own = device_oracle.weights_home(world, rank, device_cases.gather_rows(carried))
                device_cases.assert_same("combine_weights", home, own)
        buffer.check()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, FLOAT8), ids=str)
@pytest.mark.parametrize("layout", FIXED_LAYOUTS, ids=str)
@pytest.mark.parametrize("num_ranks", (1, 2, 4))
def test_fixed_shapes(ranks: Ranks, num_ranks: int, layout: object, dtype: torch.dtype) -> None:
    ranks.run(num_ranks, eager_fixed, make_case(num_ranks, layout, dtype=dtype), deadline_s=120.0)


def replays(context: RankContext, case: Case, async_op: bool) -> None:
    device = device_cases.use_gpu(context.rank)
    worlds = worlds_of(case, device, NUM_REPLAYS)
    # As tight as it can be: the fullest run leaves no row free.
    room = max(device_cases.rows_needed(world) for world in worlds)
    with make_buffer(context, case) as buffer:
        layer = CapturedLayer(buffer, case, context.rank, max_recv_tokens=room, async_op=async_op)
        for world in worlds:
            layer.replay(world)
            layer.check(world)
        # The same inputs, eager: the graph holds what the calls do.
        from_graph = layer.combined.x.clone()
        layer.run()
        layer.check(worlds[-1])
        torch.testing.assert_close(from_graph, layer.combined.x, rtol=2e-2, atol=2e-2)
        buffer.check()


@pytest.mark.parametrize("layout", SHAPES, ids=str)
@pytest.mark.parametrize("num_ranks", (1, 2, 4))
def test_replay_with_changing_routing(ranks: Ranks, num_ranks: int, layout: object) -> None:
    ranks.run(num_ranks, replays, make_case(num_ranks, layout), False, deadline_s=120.0)


@pytest.mark.parametrize("layout", SHAPES[:2], ids=str)
def test_replay_of_async_operations(ranks: Ranks, layout: object) -> None:
    ranks.run(2, replays, make_case(2, layout), True, deadline_s=120.0)


def test_replay_without_tokens(ranks: Ranks) -> None:
    for num_tokens in ((0, 64), (64, 0)):
        case = make_case(2, ExpertMajor(8), num_tokens=num_tokens)
        ranks.run(2, replays, case, False, deadline_s=120.0)


def replays_back_to_back(context: RankContext, case: Case) -> None:
    """Many replays in flight, no synchronisation between them: results are kept on the GPU and judged at the end."""
    device = device_cases.use_gpu(context.rank)
    worlds = worlds_of(case, device, NUM_REPLAYS)
    room = max(device_cases.rows_needed(world) for world in worlds)
    with make_buffer(context, case) as buffer:
        layer = CapturedLayer(buffer, case, context.rank, max_recv_tokens=room)
        kept = []
        for world in worlds:
            layer.replay(world)
            kept.append((layer.dispatched.x.clone(), layer.rows.clone(), layer.combined.x.clone()))
        torch.cuda.synchronize()
        buffer.check()
        weighted = not isinstance(case.layout, TokenMajor)
        for world, (x, rows, combined) in zip(worlds, kept):
            want = device_oracle.dispatch(world, context.rank, num_rows=room)
            device_cases.assert_same("dispatch x", x, want.x)
            home = device_oracle.combine(world, context.rank, device_cases.gather_rows(rows), weighted=weighted)
            device_cases.assert_same("combine x", combined, home)


@pytest.mark.parametrize("layout", SHAPES[:2], ids=str)
@pytest.mark.parametrize("num_ranks", (2, 4))
def test_replays_in_flight(ranks: Ranks, num_ranks: int, layout: object) -> None:
    ranks.run(num_ranks, replays_back_to_back, make_case(num_ranks, layout), deadline_s=120.0)


def two_graphs(context: RankContext, case: Case) -> None:
    device, rank = device_cases.use_gpu(context.rank), context.rank
    cases = [case, dataclasses.replace(case, layout=ExpertMajor(8), seed=SEED + 1000)]
    worlds = [worlds_of(each, device, 12) for each in cases]
    rooms = [max(device_cases.rows_needed(world) for world in some) for some in worlds]
    with make_buffer(context, case) as buffer:
        layers = [CapturedLayer(buffer, c, rank, max_recv_tokens=room) for c, room in zip(cases, rooms)]
        for i, which in enumerate((0, 1, 0, 0, 1, 1, 0, 1, 1, 0, 0, 1)):
            layers[which].replay(worlds[which][i])
            layers[which].check(worlds[which][i])
            # An eager call between replays, with counts that the host waits for.
            eager = device_cases.dispatch(buffer, worlds[1 - which][i], rank)
            device_cases.assert_dispatched(eager, worlds[1 - which][i], rank)
        # A handle of one graph, used outside it after the other ran.
        layers[0].replay(worlds[0][0])
        layers[1].replay(worlds[1][0])
        again = device_cases.dispatch_along(buffer, worlds[0][0], rank, layers[0].dispatched.handle)
        device_cases.assert_dispatched(again, worlds[0][0], rank, cached=True, max_recv_tokens=rooms[0])
        layers[0].check(worlds[0][0])
        layers[1].check(worlds[1][0])


@pytest.mark.parametrize("num_ranks", (1, 2, 4))
def test_two_graphs_alive(ranks: Ranks, num_ranks: int) -> None:
    ranks.run(num_ranks, two_graphs, make_case(num_ranks, TokenMajor()), deadline_s=120.0)


def assert_overflow(result: DispatchResult, world: World, room: int) -> None:
    """Every rank learns who had too little room, and how much it needed."""
    error = error_of(ReceiveOverflowError, result.handle.check)
    needed = {rank: here.num_rows for rank, here in enumerate(world.arrivals) if here.num_rows > room}
    assert error.rank in needed, (error.rank, needed)
    assert (error.needed, error.room) == (needed[error.rank], room)


def overflow(context: RankContext, case: Case, captured: bool) -> None:
    device, rank = device_cases.use_gpu(context.rank), context.rank
    # All tokens to rank 0: one rank overflows. To the last expert: another does. Random: all may.
    full = [
        device_cases.make_world(dataclasses.replace(case, routing=routing), device)
        for routing in ("one_rank", "one_expert", "random")
    ]
    fits = device_cases.make_world(dataclasses.replace(case, routing="sparse", seed=SEED + 1), device)
    for world in full:
        room = device_cases.rows_needed(world) - 1
        empty = device_cases.make_world(dataclasses.replace(case, routing="dropped"), device)
        with make_buffer(context, case) as buffer:
            if captured:
                layer = CapturedLayer(buffer, case, rank, max_recv_tokens=room)
                layer.replay(world)
                assert_overflow(layer.dispatched, world, room)
                layer.replay(empty)
                layer.check(empty)
                layer.replay(world)
                assert_overflow(layer.dispatched, world, room)
            else:
                result = dispatch_fixed(buffer, world, rank, room)
                buffer.combine(torch.zeros_like(result.x), result.handle)
                assert_overflow(result, world, room)
            # The buffer serves on, with fixed shapes and without.
            buffer.check()
            room = device_cases.rows_needed(fits)
            result = dispatch_fixed(buffer, fits, rank, room)
            result.handle.check()
            device_cases.assert_dispatched(result, fits, rank, max_recv_tokens=room)
            device_cases.assert_dispatched(device_cases.dispatch(buffer, world, rank), world, rank)


@pytest.mark.parametrize("captured", (False, True), ids=("eager", "captured"))
@pytest.mark.parametrize("layout", SHAPES, ids=str)
@pytest.mark.parametrize("num_ranks", (1, 2, 4))
def test_overflow_is_reported_on_every_rank(ranks: Ranks, num_ranks: int, layout: object, captured: bool) -> None:
    ranks.run(num_ranks, overflow, make_case(num_ranks, layout), captured, deadline_s=120.0)


def too_many_rows(context: RankContext, case: Case) -> None:
    """A buffer with room for fewer rows than the worst case: what does not fit, every rank learns, and it serves on."""
    device, rank = device_cases.use_gpu(context.rank), context.rank
    worlds = worlds_of(case, device, len(ROUTINGS))
    needs = [device_cases.rows_needed(world) for world in worlds]
    room = sorted(needs)[len(needs) // 2]
    sizes = {"num_experts": case.num_experts, "hidden": case.hidden, "num_topk": case.num_topk}
    sizes |= {"max_tokens": max(case.num_tokens), "max_rows": max(room, 1), "max_element_size": 2}
    with context.buffer("cuda", **sizes) as buffer:
        for world, needed in zip(worlds, needs):
            if needed > max(room, 1):
                error = error_of(ReceiveOverflowError, lambda: device_cases.dispatch(buffer, world, rank))  # noqa: B023
                assert (error.limit, error.room) == ("max_rows", max(room, 1))
                assert error.needed == world.arrivals[error.rank].num_rows > max(room, 1)
                continue
            result = device_cases.dispatch(buffer, world, rank)
            device_cases.assert_dispatched(result, world, rank)
            rows = device_cases.make_rows(world, torch.bfloat16, SEED)
            got = buffer.combine(rows[rank], result.handle)
            device_cases.assert_same("combine", got.x, device_oracle.combine(world, rank, rows))
        buffer.check()


@pytest.mark.parametrize("layout", SHAPES, ids=str)
@pytest.mark.parametrize("num_ranks", (1, 2, 4))
def test_more_rows_than_the_buffer_has_room_for(ranks: Ranks, num_ranks: int, layout: object) -> None:
    ranks.run(num_ranks, too_many_rows, make_case(num_ranks, layout), deadline_s=120.0)


def captured_gradients(context: RankContext, case: Case) -> None:
    """Forward and backward in one graph, against the same without fixed shapes."""
    device, rank = device_cases.use_gpu(context.rank), context.rank
    worlds = worlds_of(case, device, 8)
    room = max(device_cases.rows_needed(world) for world in worlds) + 5
    shape = tuple(worlds[0].x[rank].shape)
    x, topk_idx = torch.zeros(shape, device=device), torch.full_like(worlds[0].topk_idx[rank], -1)
    weights, direction = torch.zeros(topk_idx.shape, device=device), torch.ones(shape, device=device)
    weighted = not isinstance(case.layout, TokenMajor)
    with make_buffer(context, case) as buffer:

        def gradients(max_recv_tokens: int | None) -> tuple[torch.Tensor, ...]:
            leaves = x.detach().requires_grad_(), weights.detach().requires_grad_()
            arrived = autograd.dispatch(
                buffer, leaves[0], topk_idx, leaves[1], layout=case.layout, max_recv_tokens=max_recv_tokens
            )
            rows = torch.sin(arrived.x)
            if not weighted:
                rows = rows * arrived.topk_weights.sum(1, keepdim=True)
            out = autograd.combine(
                buffer, rows, arrived.handle, topk_weights=leaves[1] if weighted else None, weighted=weighted
            )
            return out.x, *torch.autograd.grad((out.x * direction).sum(), leaves)

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            gradients(room)
        torch.cuda.current_stream().wait_stream(side)
        graph = new_graph()
        with torch.cuda.graph(graph):
            static = gradients(room)
        for world in worlds:
            x.copy_(world.x[rank])
            topk_idx.copy_(world.topk_idx[rank])
            weights.copy_(world.topk_weights[rank].nan_to_num(0.0))
            graph.replay()
            for name, got, want in zip(("out", "x.grad", "topk_weights.grad"), static, gradients(None)):
                error = (got - want).abs().max().item() if got.numel() else 0.0
                assert got.shape == want.shape and error < 1e-5, f"{name}: off by {error}"


@pytest.mark.parametrize("layout", (TokenMajor(), ExpertMajor(8)), ids=str)
@pytest.mark.parametrize("num_ranks", (1, 2, 4))
def test_captured_gradients(ranks: Ranks, num_ranks: int, layout: object) -> None:
    case = make_case(num_ranks, layout, dtype=torch.float32)
    ranks.run(num_ranks, captured_gradients, case, deadline_s=120.0)


def refusals(context: RankContext) -> None:
    device, rank = device_cases.use_gpu(context.rank), context.rank
    case = make_case(context.num_ranks, TokenMajor())
    world = device_cases.make_world(case, device)
    with make_buffer(context, case) as buffer:
        for bad in (0, -1):
            error = error_of(InvalidArgumentError, lambda bad=bad: dispatch_fixed(buffer, world, rank, bad))
            assert error.argument == "max_recv_tokens"
        result = dispatch_fixed(buffer, world, rank, 500)
        error = error_of(
            InvalidArgumentError, lambda: buffer.dispatch(world.x[rank], handle=result.handle, max_recv_tokens=500)
        )
        assert error.argument == "max_recv_tokens"
        error = error_of(InvalidArgumentError, lambda: buffer.combine(result.x[:-1], result.handle))
        assert error.argument == "rows"
    padded = device_cases.make_world(dataclasses.replace(case, layout=PADDED), device)
    sizes = {"num_experts": case.num_experts, "hidden": case.hidden, "num_topk": case.num_topk}
    with context.buffer(
        "cuda", max_tokens=max(case.num_tokens), max_capacity=padded.layout.capacity, **sizes
    ) as buffer:
        error = error_of(InvalidArgumentError, lambda: dispatch_fixed(buffer, padded, rank, 500))
        assert error.argument == "max_recv_tokens"


def test_refusals(ranks: Ranks) -> None:
    ranks.run(2, refusals)
