"""Operations beside the caller's own work: ``async_op``, ``Work``, ``after``, memory that is freed early, ``num_sms``.

tests/gpu/run.sh tests/gpu/test_cuda_overlap.py

Where memory must outlive a call, an event that comes late holds the operation back, so that a block given back too
early has been taken and overwritten before the operation reads it.
"""

from __future__ import annotations

import dataclasses

import device_cases
import device_oracle
import pytest
import torch
from cases import FLOAT8, Case
from device_cases import make_buffer, worlds_of
from device_oracle import World
from harness import RankContext, Ranks, error_of

from ray_deepep import ExpertMajor, InvalidArgumentError, TokenMajor
from ray_deepep.cuda import cuda_problem

pytestmark = pytest.mark.skipif(bool(cuda_problem()), reason=f"transport cuda: {cuda_problem()}")
SEED = 777
CYCLES_PER_MS = 2_000_000
LAYOUTS = (TokenMajor(), ExpertMajor(8))
NUM_ROUNDS = 12


def make_case(num_ranks: int, layout: object, **more: object) -> Case:
    sizes = {"num_tokens": tuple(200 - 61 * rank for rank in range(num_ranks)), "num_experts": 4 * num_ranks}
    return Case(**{"seed": SEED, "hidden": 512, "dtype": torch.bfloat16, "layout": layout, **sizes, **more})


def room_for(worlds: list[World]) -> int:
    return max(device_cases.rows_needed(world) for world in worlds)


def late_event(ms: float) -> torch.cuda.Event:
    """An event that comes ``ms`` after all that the current stream has queued."""
    side, event = torch.cuda.Stream(), torch.cuda.Event()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(int(ms * CYCLES_PER_MS))
        event.record()
    return event


def spoil(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Take the memory that tensors of these sizes were in, if it is free, and overwrite it."""
    taken = []
    for like in tensors:
        for _ in range(3):
            taken.append(torch.empty_like(like))
            taken[-1].view(torch.uint8).fill_(0x55)
    return taken


def beside_other_work(context: RankContext, case: Case) -> None:
    device, rank = device_cases.use_gpu(context.rank), context.rank
    side = torch.ones(1024, 1024, device=device, dtype=torch.bfloat16)
    weighted = not isinstance(case.layout, TokenMajor)
    with make_buffer(context, case) as buffer:
        for world in worlds_of(case, device, NUM_ROUNDS):
            dtype = torch.bfloat16 if case.dtype == FLOAT8 else case.dtype
            rows = device_cases.make_rows(world, dtype, SEED)
            work = device_cases.dispatch(buffer, world, rank, async_op=True)
            products = [side @ side for _ in range(4)]
            result = work.wait()
            combining = buffer.combine(rows[rank], result.handle, weighted=weighted, async_op=True)
            products += [side @ side for _ in range(4)]
            home = combining.wait()
            torch.cuda.synchronize()
            buffer.check()
            device_cases.assert_dispatched(result, world, rank)
            want = device_oracle.combine(world, rank, rows, weighted=weighted)
            device_cases.assert_same("combine x", home.x, want)
            assert all(bool((product == 1024).all()) for product in products)


@pytest.mark.parametrize("dtype", (torch.bfloat16, FLOAT8), ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("num_ranks", (1, 2, 4))
def test_results_beside_other_work(ranks: Ranks, num_ranks: int, layout: object, dtype: torch.dtype) -> None:
    ranks.run(num_ranks, beside_other_work, make_case(num_ranks, layout, dtype=dtype), deadline_s=120.0)


def inputs_freed(context: RankContext, case: Case) -> None:
    """All that a call read is dropped before the operation starts, plan included."""
    device, rank = device_cases.use_gpu(context.rank), context.rank
    worlds = worlds_of(case, device, NUM_ROUNDS)
    room, weighted = room_for(worlds), not isinstance(case.layout, TokenMajor)
    fixed = {"layout": case.layout, "max_recv_tokens": room}
    with make_buffer(context, case) as buffer:
        for world in worlds:
            x, topk_idx, weights = (each[rank].clone() for each in (world.x, world.topk_idx, world.topk_weights))
            sizes = [torch.empty_like(tensor) for tensor in (x, topk_idx, weights)]
            gate = late_event(3.0)
            work = buffer.dispatch(x, topk_idx, weights, async_op=True, after=gate, **fixed)
            del x, topk_idx, weights
            taken = spoil(*sizes)
            result = work.wait()
            torch.cuda.synchronize()
            device_cases.assert_dispatched(result, world, rank, max_recv_tokens=room)
            del taken, work

            rows = device_cases.make_rows(world, case.dtype, SEED, num_rows=room)
            own, bias = rows[rank].clone(), rows[rank][:1].expand_as(world.x[rank]).clone()
            carried = result.topk_weights.clone()
            want = device_oracle.combine(world, rank, rows, weighted=weighted, bias=bias)
            home = device_oracle.weights_home(world, rank, device_cases.gather_rows(carried))
            plan = [value for value in vars(result.handle.plan).values() if isinstance(value, torch.Tensor)]
            sizes = [torch.empty_like(tensor) for tensor in (own, bias, carried, *plan)]
            del plan
            gate = late_event(3.0)
            more = {"weighted": weighted, "bias": bias, "topk_weights": carried}
            work = buffer.combine(own, result.handle, async_op=True, after=gate, **more)
            del own, bias, carried, more, result
            taken = spoil(*sizes)
            combined = work.wait()
            torch.cuda.synchronize()
            device_cases.assert_same("combine x", combined.x, want)
            device_cases.assert_same("combine topk_weights", combined.topk_weights, home)
            del taken
        buffer.check()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("num_ranks", (1, 2))
def test_inputs_may_be_freed_at_once(ranks: Ranks, num_ranks: int, layout: object) -> None:
    ranks.run(num_ranks, inputs_freed, make_case(num_ranks, layout), deadline_s=120.0)


def outputs_dropped(context: RankContext, case: Case, early: bool) -> None:
    """Results that the current stream still reads, or that nobody waited for, when they are dropped."""
    device, rank = device_cases.use_gpu(context.rank), context.rank
    worlds = worlds_of(case, device, NUM_ROUNDS)
    room = room_for(worlds)
    with make_buffer(context, case) as buffer:
        ready, kept = torch.cuda.Event(), []
        torch.cuda.synchronize()
        ready.record()
        more = {"max_recv_tokens": room, "async_op": True, **({"after": ready} if early else {})}
        for world in worlds:
            result = device_cases.dispatch(buffer, world, rank, **more).wait()
            torch.cuda._sleep(CYCLES_PER_MS)
            kept.append(result.x.clone())
            del result
        for world, x in zip(worlds, kept):
            want = device_oracle.dispatch(world, rank, num_rows=room)
            device_cases.assert_same("x read before it was dropped", x, want.x)

        torch.cuda.synchronize()
        work = device_cases.dispatch(buffer, worlds[0], rank, **{**more, "after": late_event(5.0)})
        del work
        mine = [torch.full_like(kept[0], 7.0) for _ in range(4)]
        torch.cuda.synchronize()
        buffer.check()
        assert all(bool((tensor == 7).all()) for tensor in mine)


@pytest.mark.parametrize("early", (False, True), ids=("after_stream", "after_event"))
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("num_ranks", (1, 2))
def test_outputs_may_be_dropped_at_once(ranks: Ranks, num_ranks: int, layout: object, early: bool) -> None:
    ranks.run(num_ranks, outputs_dropped, make_case(num_ranks, layout), early, deadline_s=120.0)


def in_flight(context: RankContext, case: Case) -> None:
    """Two buffers with several operations each, waited for in another order than they were started in."""
    device, rank = device_cases.use_gpu(context.rank), context.rank
    other = dataclasses.replace(case, layout=ExpertMajor(4), seed=SEED + 99)
    with make_buffer(context, case) as first, make_buffer(context, other) as second:
        for seed in range(4):
            jobs = [
                (buffer, world, device_cases.make_rows(world, case.dtype, seed))
                for i in range(3)
                for buffer, some in ((first, case), (second, other))
                for world in worlds_of(dataclasses.replace(some, seed=some.seed + 10 * seed + i), device, 1)
            ]
            dispatching = [device_cases.dispatch(b, world, rank, async_op=True) for b, world, _ in jobs]
            results = [work.wait() for work in reversed(dispatching)][::-1]
            combining = [
                b.combine(rows[rank], result.handle, async_op=True) for (b, _, rows), result in zip(jobs, results)
            ]
            # More dispatches along old plans before the combines are waited for.
            cached = [
                device_cases.dispatch_along(b, world, rank, result.handle, async_op=True)
                for (b, world, _), result in zip(jobs, results)
            ]
            homes = [work.wait() for work in reversed(combining)][::-1]
            again = [work.wait() for work in cached]
            for (_, world, rows), result, home, repeated in zip(jobs, results, homes, again):
                device_cases.assert_dispatched(result, world, rank)
                device_cases.assert_dispatched(repeated, world, rank, cached=True)
                device_cases.assert_same("combine x", home.x, device_oracle.combine(world, rank, rows))
        first.check()
        second.check()


@pytest.mark.parametrize("num_ranks", (1, 2, 4))
def test_several_in_flight(ranks: Ranks, num_ranks: int) -> None:
    ranks.run(num_ranks, in_flight, make_case(num_ranks, TokenMajor()), deadline_s=120.0)


def work_and_after(context: RankContext, case: Case) -> None:
    device, rank = device_cases.use_gpu(context.rank), context.rank
    (world,) = worlds_of(case, device, 1)
    with make_buffer(context, case) as buffer:
        handle = device_cases.dispatch(buffer, world, rank).handle
        torch.cuda.synchronize()
        work = device_cases.dispatch_along(buffer, world, rank, handle, async_op=True, after=late_event(300.0))
        assert not work.done() and isinstance(work.event, torch.cuda.Event)
        torch.cuda.synchronize()
        assert work.done() and work.wait() is work.wait()
        device_cases.assert_dispatched(work.wait(), world, rank, cached=True)
        for async_op in (False, True):
            # Rows that another stream writes late: the event, not the current stream, says when they are there.
            x, side, written = torch.zeros_like(world.x[rank]), torch.cuda.Stream(), torch.cuda.Event()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                torch.cuda._sleep(5 * CYCLES_PER_MS)
                x.copy_(world.x[rank])
                written.record()
            result = buffer.dispatch(x, handle=handle, after=written, async_op=async_op)
            result = result.wait() if async_op else result
            device_cases.assert_dispatched(result, world, rank, cached=True)


@pytest.mark.parametrize("num_ranks", (1, 2))
def test_work_and_after(ranks: Ranks, num_ranks: int) -> None:
    ranks.run(num_ranks, work_and_after, make_case(num_ranks, ExpertMajor(8)), deadline_s=120.0)


def async_then_not(context: RankContext, case: Case) -> None:
    """An operation on the current stream right after one that is held back on the other, with no wait between."""
    device, rank = device_cases.use_gpu(context.rank), context.rank
    first, second = worlds_of(case, device, 2)
    with make_buffer(context, case) as buffer:
        handles = [device_cases.dispatch(buffer, world, rank).handle for world in (first, second)]
        for _ in range(5):
            gate = late_event(3.0)
            work = device_cases.dispatch_along(buffer, first, rank, handles[0], async_op=True, after=gate)
            plain = device_cases.dispatch_along(buffer, second, rank, handles[1])
            device_cases.assert_dispatched(plain, second, rank, cached=True)
            device_cases.assert_dispatched(work.wait(), first, rank, cached=True)


@pytest.mark.parametrize("num_ranks", (1, 2))
def test_async_then_not(ranks: Ranks, num_ranks: int) -> None:
    ranks.run(num_ranks, async_then_not, make_case(num_ranks, ExpertMajor(8)), deadline_s=120.0)


def streams_of_the_caller(context: RankContext, case: Case) -> None:
    """Calls from several current streams, each of which waits for the one before."""
    device, rank = device_cases.use_gpu(context.rank), context.rank
    streams = [torch.cuda.Stream() for _ in range(3)]
    with make_buffer(context, case) as buffer:
        for i, world in enumerate(worlds_of(case, device, NUM_ROUNDS)):
            rows = device_cases.make_rows(world, case.dtype, SEED)
            before, stream = streams[i % 3 - 1], streams[i % 3]
            stream.wait_stream(torch.cuda.current_stream())
            stream.wait_stream(before)
            with torch.cuda.stream(stream):
                result = device_cases.dispatch(buffer, world, rank)
                home = buffer.combine(rows[rank], result.handle)
                device_cases.assert_dispatched(result, world, rank)
                device_cases.assert_same("combine x", home.x, device_oracle.combine(world, rank, rows))


def test_streams_of_the_caller(ranks: Ranks) -> None:
    ranks.run(2, streams_of_the_caller, make_case(2, ExpertMajor(8)), deadline_s=120.0)


def any_num_sms(context: RankContext, case: Case) -> None:
    device, rank = device_cases.use_gpu(context.rank), context.rank
    modes = ({},) if isinstance(case.layout, TokenMajor) else ({"weighted": True}, {"weighted": True, "reduce": "fast"})
    dtype = torch.bfloat16 if case.dtype == FLOAT8 else case.dtype
    with make_buffer(context, case) as buffer:
        for world in worlds_of(case, device, 3):
            rows = device_cases.make_rows(world, dtype, SEED)
            for num_sms in (1, 2, 24):
                result = device_cases.dispatch(buffer, world, rank, num_sms=num_sms)
                device_cases.assert_dispatched(result, world, rank)
                again = device_cases.dispatch_along(buffer, world, rank, result.handle, num_sms=num_sms)
                device_cases.assert_dispatched(again, world, rank, cached=True)
                for mode in modes:
                    got = buffer.combine(rows[rank], result.handle, num_sms=num_sms, **mode)
                    device_cases.assert_same(f"{mode}", got.x, device_oracle.combine(world, rank, rows, **mode))
                carried = result.topk_weights.clone()
                home = buffer.combine_weights(carried, result.handle, num_sms=num_sms)
                want = torch.where(world.topk_idx[rank] >= 0, world.topk_weights[rank], 0.0)
                device_cases.assert_same("combine_weights", home, want)
        error = error_of(InvalidArgumentError, lambda: device_cases.dispatch(buffer, world, rank, num_sms=0))
        assert error.argument == "num_sms"


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, FLOAT8), ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("num_ranks", (1, 2, 4))
def test_any_num_sms_gives_the_same_bits(ranks: Ranks, num_ranks: int, layout: object, dtype: torch.dtype) -> None:
    ranks.run(num_ranks, any_num_sms, make_case(num_ranks, layout, dtype=dtype), deadline_s=120.0)
