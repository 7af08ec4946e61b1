"""Tensors that live in the heap (``Buffer.symm_empty``): read in place by peers, and safe to overwrite on the stream.

tests/gpu/run.sh tests/gpu/test_cuda_heap.py
"""

from __future__ import annotations

import dataclasses
import gc
import pickle

import device_cases
import device_oracle
import pytest
import torch
from cases import FLOAT8, LAYOUTS, PADDED, ROUTINGS, Case, check_case
from device_oracle import World, as_bytes
from harness import RankContext, Ranks, error_of

from ray_deepep import Buffer, ExpertMajor, HeapFullError, Padded, TokenMajor
from ray_deepep.cuda import cuda_problem

pytestmark = pytest.mark.skipif(bool(cuda_problem()), reason=f"transport cuda: {cuda_problem()}")
SEED = 3131
SYMM_BYTES = 32 << 20
NUM_OVERWRITES = 200


def make_case(num_ranks: int, layout: object, **more: object) -> Case:
    sizes = {"num_tokens": tuple(110 - 35 * rank for rank in range(num_ranks)), "num_experts": 4 * num_ranks}
    return Case(**{"seed": SEED, "hidden": 256, "dtype": torch.bfloat16, "layout": layout, **sizes, **more})


def make_buffer(context: RankContext, case: Case, capacity: int = 0, symm_bytes: int = SYMM_BYTES) -> Buffer:
    return context.buffer(
        "cuda",
        num_experts=case.num_experts,
        hidden=case.hidden,
        num_topk=case.num_topk,
        max_tokens=max(case.num_tokens),
        max_capacity=capacity,
        symm_bytes=symm_bytes,
    )


def in_heap(buffer: Buffer, rows: torch.Tensor) -> torch.Tensor:
    """A copy of ``rows`` in the buffer's heap."""
    copy = buffer.symm_empty(rows.shape[0], rows.dtype)
    assert copy.shape == rows.shape and copy.dtype == rows.dtype and copy.is_contiguous()
    as_bytes(copy).copy_(as_bytes(rows))
    return copy


def combine_modes(layout: object) -> tuple[dict, ...]:
    if isinstance(layout, TokenMajor):
        return ({}, {"bias": True})
    reduces = ("exact", "fast", "expert_order")
    return tuple({"weighted": weighted, "reduce": reduce} for reduce in reduces for weighted in (False, True))


def residents(context: RankContext, case: Case, mixed: bool) -> None:
    """Fresh and cached dispatches and combines; with ``mixed`` some ranks' tensors are resident, others' not."""
    device, rank = device_cases.use_gpu(context.rank), context.rank
    for i, routing in enumerate(ROUTINGS):
        world = device_cases.make_world(dataclasses.replace(case, routing=routing, seed=case.seed + i), device)
        capacity = world.layout.capacity if isinstance(world.layout, Padded) else 0
        with make_buffer(context, case, capacity) as buffer:

            def place(rows: torch.Tensor, turn: int, buffer: Buffer = buffer) -> torch.Tensor:
                return in_heap(buffer, rows) if not mixed or (rank + turn) % 2 else rows.clone()

            own = dataclasses.replace(world, x=[place(x, 0) if r == rank else x for r, x in enumerate(world.x)])
            result = device_cases.dispatch(buffer, own, rank)
            device_cases.assert_dispatched(result, world, rank)
            again = dataclasses.replace(world, x=[place(x, 1) if r == rank else x for r, x in enumerate(world.x)])
            cached = device_cases.dispatch_along(buffer, again, rank, result.handle)
            device_cases.assert_dispatched(cached, world, rank, cached=True)
            if not isinstance(world.layout, TokenMajor) and case.dtype != FLOAT8:
                scaled = device_cases.dispatch(buffer, own, rank, scale_by_weights=True)
                device_cases.assert_dispatched(scaled, world, rank, scaled=True)
            dtype = torch.bfloat16 if case.dtype == FLOAT8 else case.dtype
            rows = device_cases.make_rows(world, dtype, SEED)
            bias = device_cases.random_rows(
                tuple(world.x[rank].shape), dtype, torch.Generator(device).manual_seed(SEED + rank)
            )
            for turn, mode in enumerate(combine_modes(world.layout)):
                more = {**mode, "bias": bias if mode.get("bias") else None}
                got = buffer.combine(place(rows[rank], turn), result.handle, **more)
                device_cases.assert_same(f"{mode}", got.x, device_oracle.combine(world, rank, rows, **more))
            buffer.check()


@pytest.mark.parametrize("mixed", (False, True), ids=("all_resident", "mixed"))
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("num_ranks", (1, 2, 4))
def test_resident_tensors(ranks: Ranks, num_ranks: int, layout: object, mixed: bool) -> None:
    ranks.run(num_ranks, residents, make_case(num_ranks, layout), mixed, deadline_s=120.0)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, FLOAT8), ids=str)
def test_resident_dtypes(ranks: Ranks, dtype: torch.dtype) -> None:
    for layout in (TokenMajor(), ExpertMajor(16)):
        ranks.run(2, residents, make_case(2, layout, dtype=dtype), True, deadline_s=120.0)


def test_resident_large_rows(ranks: Ranks) -> None:
    for hidden in (7168, 16384):
        case = make_case(2, ExpertMajor(8), hidden=hidden, num_tokens=(65, 9), num_topk=2)
        ranks.run(2, residents, case, True, deadline_s=120.0)


def overwritten(context: RankContext, case: Case, mixed: bool) -> None:
    """The writer overwrites its rows on the stream as soon as a call has returned; peers must have read them.

    Nothing waits in between. All inputs are known before, and results are judged at the end.
    """
    device, rank = device_cases.use_gpu(context.rank), context.rank
    world = device_cases.make_world(case, device)
    count = len(world.x[rank])
    with make_buffer(context, case) as buffer:
        handle = device_cases.dispatch(buffer, world, rank).handle
        resident = not mixed or rank % 2 == 0
        x = in_heap(buffer, world.x[rank]) if resident else world.x[rank].clone()
        dispatched_like = torch.empty(handle.num_rows, case.hidden, dtype=case.dtype, device=device)
        rows = in_heap(buffer, dispatched_like) if resident else dispatched_like
        wrong = torch.zeros(2, dtype=torch.int64, device=device)
        # Row t of rank r in round i holds i + 3 r everywhere: what arrives says whose it is, and of which round.
        source = torch.cat([torch.full((len(x),), 3 * r, device=device) for r, x in enumerate(world.x)])
        expected = device_oracle.dispatch(with_values(world, source), rank).x[:, :1].float()
        filled = (device_oracle.dispatch(with_values(world, source + 1), rank).x[:, :1] != 0).float()
        all_rows = device_cases.make_rows(world, torch.float32, SEED)
        hits = [torch.full_like(each, 3.0 * r) for r, each in enumerate(all_rows)]
        ones = [torch.ones_like(each) for each in all_rows]
        base, slope = (device_oracle.combine(world, rank, each)[:, :1] for each in (hits, ones))
        reduce = "exact" if isinstance(case.layout, TokenMajor) else "fast"
        torch.cuda.synchronize()
        for i in range(NUM_OVERWRITES):
            # Small integers: exact in bfloat16, sums of them too.
            value = i % 8
            x.fill_(value + 3 * rank)
            got = buffer.dispatch(x, handle=handle).x
            x.fill_(77.0)
            wrong[0] += (got.float() != expected + filled * value).sum()
            rows.fill_(value + 3 * rank)
            home = buffer.combine(rows, handle, reduce=reduce if i % 2 else "exact").x
            rows.fill_(99.0)
            wrong[1] += (home.float() != base + slope * value).sum()
        torch.cuda.synchronize()
        buffer.check()
        assert wrong.tolist() == [0, 0], f"elements of dispatches and combines that hold later values: {wrong.tolist()}"
        assert count == handle.num_tokens


def with_values(world: World, value: torch.Tensor) -> World:
    """``world`` with rows that hold one number each, ``value [sum T]``."""
    parts = value.split([len(x) for x in world.x])
    x = [v.unsqueeze(1).expand(-1, world.hidden).to(world.x[0].dtype).contiguous() for v in parts]
    return dataclasses.replace(world, x=x)


@pytest.mark.parametrize("mixed", (False, True), ids=("all_resident", "mixed"))
@pytest.mark.parametrize("layout", (TokenMajor(), ExpertMajor(8)), ids=str)
@pytest.mark.parametrize("num_ranks", (1, 2, 4))
def test_overwriting_at_once(ranks: Ranks, num_ranks: int, layout: object, mixed: bool) -> None:
    case = make_case(num_ranks, layout, hidden=1024)
    ranks.run(num_ranks, overwritten, case, mixed, deadline_s=120.0)


def allocation(context: RankContext) -> None:
    """What the heap hands out: room is given back and taken again; full is an error that says by how much."""
    device, rank = device_cases.use_gpu(context.rank), context.rank
    case = make_case(context.num_ranks, TokenMajor())
    world = device_cases.make_world(case, device)
    row_bytes, symm_bytes = case.hidden * 2, 1 << 20
    fits = symm_bytes // row_bytes
    with make_buffer(context, case, symm_bytes=symm_bytes) as buffer, make_buffer(context, case) as other:
        for _ in range(50):
            whole = buffer.symm_empty(fits, torch.bfloat16)
            assert whole.shape == (fits, case.hidden) and whole.device == device
            del whole
        first = buffer.symm_empty(fits // 2, torch.bfloat16)
        error = error_of(HeapFullError, lambda: buffer.symm_empty(fits, torch.bfloat16))
        assert (error.asked, error.symm_bytes) == (fits * row_bytes, symm_bytes)
        assert error.free < error.asked and str(symm_bytes) in str(error)
        assert str(pickle.loads(pickle.dumps(error))) == str(error)
        # A view keeps its block; two blocks never overlap.
        tail = first[-3:]
        del first
        gc.collect()
        tail.fill_(5.0)
        second = buffer.symm_empty(fits // 2, torch.bfloat16)
        second.fill_(6.0)
        assert bool((tail == 5).all())
        del tail, second
        gc.collect()
        # A part of a resident tensor, and a tensor of another buffer's heap.
        count = case.num_tokens[rank]
        for rows in (buffer.symm_empty(count + 5, torch.bfloat16)[5:], other.symm_empty(count, torch.bfloat16)):
            rows.copy_(world.x[rank])
            result = buffer.dispatch(rows, world.topk_idx[rank], world.topk_weights[rank])
            device_cases.assert_dispatched(result, world, rank)
    with make_buffer(context, case, symm_bytes=0) as without:
        assert error_of(HeapFullError, lambda: without.symm_empty(1, torch.bfloat16)).free == 0


@pytest.mark.parametrize("num_ranks", (1, 2))
def test_allocation(ranks: Ranks, num_ranks: int) -> None:
    ranks.run(num_ranks, allocation)


def over_provider(context: RankContext, heap_provider: str, cases: list[Case]) -> None:
    """Ordinary cases, and tensors in the heap, on memory of this provider."""
    device_cases.use_gpu(context.rank)
    with context.new_communicator("cuda", heap_provider=heap_provider) as comm:
        alone = dataclasses.replace(context, communicators={"cuda": comm})
        for case in cases:
            check_case(alone, "cuda", case)
        residents(alone, make_case(context.num_ranks, ExpertMajor(8)), True)
        overwritten(alone, make_case(context.num_ranks, TokenMajor()), True)


def provider_cases(num_ranks: int) -> list[Case]:
    return [
        make_case(num_ranks, layout, dtype=dtype, hidden=128, routing="sparse")
        for layout in (TokenMajor(), ExpertMajor(8), PADDED)
        for dtype in (torch.float32, torch.bfloat16, FLOAT8)
    ]


@pytest.mark.parametrize("num_ranks", (1, 2, 4))
def test_ipc_provider(ranks: Ranks, num_ranks: int) -> None:
    ranks.run(num_ranks, over_provider, "ipc", provider_cases(num_ranks), deadline_s=120.0)
