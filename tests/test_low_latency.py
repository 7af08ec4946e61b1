"""Low-latency dispatch and combine against the oracle, bit by bit; hooks and micro-batches; statistics.

    python tests/test_low_latency.py                                   # on the CPU core
    python tests/test_low_latency.py --ranks 2 --tokens 128 --hidden 7168 --experts 288

prints a table: what a call, its send and its receive cost. As a pytest it judges results; never times.
"""

from __future__ import annotations

import dataclasses
import random

import low_latency_timing
import pytest
import torch
from harness import RankContext, Ranks, error_of, shm_problem
from low_latency_cases import (
    DTYPES,
    FLOAT8,
    LAYOUTS,
    REDUCES,
    Case,
    World,
    assert_same,
    check_case,
    check_combined,
    check_dispatch,
    combine,
    dispatch,
    fuzz_case,
    make_buffer,
    step,
    wrapped,
)

from ray_deepep import (
    ClosedError,
    ExpertBlocks,
    ExpertMajor,
    Float8Cast,
    HookError,
    InvalidArgumentError,
    LowLatencyStats,
    ReceiveOverflowError,
    Work,
    float8,
)

SEED = 50_500
NUM_FUZZ_CASES = {"shm": 40, "reference": 8, "cuda": 60}
NUM_SOAK_STEPS = {("shm", 2): 150, ("shm", 4): 40, ("reference", 2): 8, ("reference", 4): 3, ("cuda", 2): 300}
BASE = Case(seed=SEED, num_tokens=(9, 0), num_experts=6)


def tokens_of(num_ranks: int) -> tuple[int, ...]:
    """Different numbers of tokens per rank, 0 among them."""
    return (11, 5, 0, 12, 1, 7, 2, 3)[:num_ranks]


@pytest.mark.parametrize("num_ranks", (1, 2, 4))
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_layouts_and_dtypes(ranks: Ranks, transport: str, layout: object, num_ranks: int) -> None:
    for dtype in DTYPES:
        combine_dtype = torch.bfloat16 if dtype == FLOAT8 else dtype
        case = Case(
            seed=SEED,
            num_tokens=tokens_of(num_ranks),
            num_experts=num_ranks * 3,
            hidden=256,
            layout=layout,
            dtype=dtype,
            combine_dtype=combine_dtype,
        )
        ranks.run(num_ranks, check_case, transport, case)


def test_eight_ranks(ranks: Ranks, transport: str) -> None:
    case = Case(seed=SEED, num_tokens=tokens_of(8), num_experts=16, num_topk=4, reduce="exact")
    ranks.run(8, check_case, transport, case)


@pytest.mark.parametrize("reduce", REDUCES)
@pytest.mark.parametrize("num_topk", (1, 32))
def test_num_topk(ranks: Ranks, transport: str, num_topk: int, reduce: str) -> None:
    case = Case(seed=SEED, num_tokens=(7, 3), num_experts=66, num_topk=num_topk, reduce=reduce, layout=ExpertMajor(4))
    ranks.run(2, check_case, transport, case)


def check_fuzz(context: RankContext, transport: str, seed: int) -> None:
    generator = random.Random(seed)
    for number in range(NUM_FUZZ_CASES[transport]):
        case = fuzz_case(generator, context.num_ranks)
        try:
            check_case(context, transport, case, with_hooks=number % 2 == 1)
        except AssertionError as error:
            raise AssertionError(f"fuzz seed {seed}, case {number}, {case}: {error}") from error


@pytest.mark.parametrize("num_ranks", (1, 2, 4))
def test_fuzz(ranks: Ranks, transport: str, num_ranks: int) -> None:
    ranks.run(num_ranks, check_fuzz, transport, SEED + num_ranks, deadline_s=120.0)


def casts_as_quantize(context: RankContext, transport: str) -> None:
    """A cast inside gives the bits of ``float8.quantize``: many sizes, zeros of both signs, largest values, ties."""
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(64, 256, generator=generator)
    x *= torch.exp2(torch.randint(-14, 12, (64, 1), generator=generator))
    x[0], x[1, ::2], x[4], x[6] = 0.0, -0.0, 448.0, 1e-4
    x[5] = torch.arange(256) % 65 * 0.125
    x[7] = torch.exp2(torch.arange(256) % 14 - 7.0)
    topk_idx = torch.zeros(64, 1, dtype=torch.int32)
    sizes = {"num_experts": 1, "hidden": 256, "num_topk": 1, "max_tokens": 0, "low_latency_max_tokens": 64}
    with wrapped(context, transport)(transport, **sizes) as buffer:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for scale_format in ("float32", "power_of_two"):
                cast = Float8Cast(scale_format=scale_format)
                rows = x.to(dtype)
                rows[2], rows[3] = torch.finfo(dtype).max, torch.finfo(dtype).tiny
                expected, got = float8.quantize(rows, cast), buffer.low_latency_dispatch(rows, topk_idx, cast=cast)
                assert_same(got.x[0], expected.data, f"{dtype} {scale_format}")
                assert_same(got.x_scales[0], expected.scales, f"scales, {dtype} {scale_format}")


def test_cast_inside_is_quantize_before(ranks: Ranks, transport: str) -> None:
    ranks.run(1, casts_as_quantize, transport)


def overlaps_micro_batches(context: RankContext, transport: str) -> None:
    """Two micro-batches in flight by turns; what was sent may be overwritten at once."""
    a, b = (World(dataclasses.replace(BASE, seed=seed, num_topk=4)) for seed in (1, 2))
    scratch = {id(w): World(w.case) for w in (a, b)}
    rank = context.rank
    with make_buffer(context, transport, a.case) as buffer:

        def send_dispatch(world: World):
            copy = scratch[id(world)]
            copy.x[rank].copy_(world.x[rank])
            copy.topk_idx[rank].copy_(world.topk_idx[rank])
            copy.weights[rank].copy_(world.weights[rank])
            sent = dispatch(buffer, copy, rank, return_recv_hook=True)
            for tensor in (copy.x[rank], copy.topk_idx[rank], copy.weights[rank]):
                tensor.fill_(77)
            return sent

        for _ in range(6):
            got_a, got_b = send_dispatch(a), send_dispatch(b)
            got_a.hook()
            check_dispatch(a, rank, got_a)
            home_a = combine(buffer, a, rank, got_a, return_recv_hook=True)
            got_b.hook()
            check_dispatch(b, rank, got_b)
            home_b = combine(buffer, b, rank, got_b, return_recv_hook=True)
            home_a.hook()
            home_b.hook()
            check_combined(a, rank, home_a)
            check_combined(b, rank, home_b)


def test_two_micro_batches(ranks: Ranks, transport: str) -> None:
    ranks.run(2, overlaps_micro_batches, transport)


def breaks_the_order(context: RankContext, transport: str) -> None:
    """Every wrong order is named, does no harm, and the right one goes on."""
    world, rank = World(BASE), context.rank
    buffer = make_buffer(context, transport, BASE)

    def wrong(call, text: str) -> None:
        assert text == str(error_of(HookError, call)), text

    first = dispatch(buffer, world, rank, return_recv_hook=True)
    d1, d2 = "low_latency_dispatch #1", "low_latency_dispatch #2"
    at_once = "without return_recv_hook it receives at once"
    wrong(
        lambda: dispatch(buffer, world, rank),
        f"low_latency_dispatch: {at_once}; call the hook of {d1} first",
    )
    wrong(
        lambda: combine(buffer, world, rank, first),
        f"low_latency_combine: {d1} was not received yet; call the hook of {d1} first",
    )
    second = dispatch(buffer, world, rank, return_recv_hook=True)
    wrong(
        lambda: dispatch(buffer, world, rank, return_recv_hook=True),
        f"low_latency_dispatch: {d1} and {d2} are in flight, as many as can be; call the hook of {d1} first",
    )
    wrong(second.hook, f"the hook of {d2}: {d1} was sent before; call the hook of {d1} first")
    first.hook()
    check_dispatch(world, rank, first)
    wrong(first.hook, f"the hook of {d1}: it was called before")
    second.hook()
    check_dispatch(world, rank, second)
    check_combined(world, rank, combine(buffer, world, rank, second))
    never = combine(buffer, world, rank, first, return_recv_hook=True)
    buffer.close()
    error_of(ClosedError, never.hook)


def test_hooks_in_the_wrong_order(ranks: Ranks, transport: str) -> None:
    ranks.run(2, breaks_the_order, transport)


def options(context: RankContext, transport: str) -> None:
    """``out=``, ``async_op``, statistics of the buffer and of the caller, overflow."""
    world, rank = World(BASE), context.rank
    per_expert = [len(group) for group in world.groups[rank]]
    with make_buffer(context, transport, BASE) as buffer:
        own = LowLatencyStats(
            num_tokens_per_expert=torch.zeros(BASE.num_local, dtype=torch.int64),
            wait_ns=torch.zeros(BASE.num_ranks, dtype=torch.int64),
        )
        for _ in range(2):
            got = dispatch(buffer, world, rank, stats=own)
        assert own.num_tokens_per_expert.tolist() == [2 * n for n in per_expert]
        assert buffer.low_latency_stats.num_tokens_per_expert.sum() == 0
        work = dispatch(buffer, world, rank, async_op=True)
        assert isinstance(work, Work) and work.done()
        got = work.wait()
        check_dispatch(world, rank, got)
        assert buffer.low_latency_stats.num_tokens_per_expert.tolist() == per_expert
        assert int(buffer.low_latency_stats.wait_ns.min()) >= 0
        assert buffer.low_latency_stats.wait_ns[rank] == 0
        out = torch.full((BASE.num_tokens[rank], BASE.hidden), 7.0, dtype=BASE.combine_dtype)
        home = combine(buffer, world, rank, got, out=out)
        assert home.x is out
        check_combined(world, rank, home)
        most = buffer.low_latency_dispatch(
            world.x[rank], world.topk_idx[rank], layout=ExpertMajor(4), max_recv_tokens=8
        )
        needed = sum(-(-n // 4) * 4 for n in per_expert)
        assert needed > 8 and int(most.counts.sum()) <= 8 and int(most.expert_offsets.max()) == 8
        error = error_of(ReceiveOverflowError, most.handle.check)
        assert (error.rank, error.needed, error.room) == (rank, needed, 8)
        # What has no room adds nothing, and nothing goes wrong.
        home = buffer.low_latency_combine(torch.ones(8, BASE.hidden), most.handle)
        assert home.x.isfinite().all()


def test_options(ranks: Ranks, transport: str) -> None:
    ranks.run(2, options, transport)


def waits_for_a_slow_rank(context: RankContext, transport: str) -> list[int]:
    world = World(BASE)
    with make_buffer(context, transport, BASE) as buffer:
        sent = dispatch(buffer, world, context.rank, return_recv_hook=True)
        sent.hook()
        buffer.low_latency_stats.wait_ns.zero_()
        if context.rank == 1:
            low_latency_timing.pause(0.3)
        dispatch(buffer, world, context.rank)
        return buffer.low_latency_stats.wait_ns.tolist()


def test_wait_time_per_source_rank(ranks: Ranks, transport: str) -> None:
    first, second = ranks.run(2, waits_for_a_slow_rank, transport)
    assert first[1] > 0.2e9 and first[0] == 0
    assert second[0] < 0.1e9


def soak(context: RankContext, transport: str, seed: int) -> None:
    """Many alternating calls of fresh routing on one buffer, hooks and plain by turns of a random coin."""
    generator = random.Random(seed)
    base = dataclasses.replace(BASE, num_tokens=(0,) * context.num_ranks, num_experts=4 * context.num_ranks)
    with make_buffer(context, transport, base) as buffer:
        total = torch.zeros(base.num_local, dtype=torch.int64)
        for number in range(NUM_SOAK_STEPS[transport, context.num_ranks]):
            case = dataclasses.replace(
                base,
                seed=seed + number,
                num_tokens=tuple(generator.randint(0, 12) for _ in range(context.num_ranks)),
                layout=generator.choice((ExpertBlocks(), ExpertMajor(8))),
                cast=generator.choice((None, None, None, Float8Cast())),
                reduce=generator.choice(REDUCES),
            )
            world = World(case)
            step(buffer, world, context.rank, with_hooks=generator.random() < 0.5)
            total += torch.tensor([len(group) for group in world.groups[context.rank]])
        assert torch.equal(buffer.low_latency_stats.num_tokens_per_expert.cpu(), total)


@pytest.mark.parametrize("num_ranks", (2, 4))
def test_soak(ranks: Ranks, transport: str, num_ranks: int) -> None:
    ranks.run(num_ranks, soak, transport, SEED, deadline_s=120.0)


def large(context: RankContext, transport: str) -> None:
    """1,024 tokens, and messages larger than a value of the reference's store."""
    sizes = {"num_experts": 4, "hidden": 1536, "num_topk": 2, "max_tokens": 0, "low_latency_max_tokens": 1024}
    x = torch.randn(1024, 1536, generator=torch.Generator().manual_seed(SEED))
    topk_idx = torch.tensor([[0, 3]]).repeat(1024, 1)
    weights = torch.tensor([[0.25, 0.5]]).repeat(1024, 1)
    with wrapped(context, transport)(transport, **sizes) as buffer:
        got = buffer.low_latency_dispatch(x, topk_idx, topk_weights=weights)
        # Expert 0 is rank 0's first, expert 3 rank 1's second.
        assert got.counts.tolist() == ([2048, 0] if context.rank == 0 else [0, 2048])
        assert_same(got.x[context.rank], x.repeat(2, 1), "rows")
        home = buffer.low_latency_combine(got.x.nan_to_num(), got.handle)
        assert_same(home.x, 0.25 * x + 0.5 * x, "combined rows")


def test_most_tokens(ranks: Ranks, transport: str) -> None:
    ranks.run(2, large, transport)


def heap_bytes() -> int:
    """Memory of this process's heap segments, its peers' included."""
    total, in_heap = 0, False
    with open("/proc/self/smaps") as file:
        for line in file:
            if "-" in line.split()[0] and not line.split()[0].endswith(":"):
                in_heap = "memfd:ray_deepep" in line
            elif in_heap and line.startswith("Rss:"):
                total += int(line.split()[1]) * 1024
    return total


def heap_of_a_decode_step(context: RankContext) -> None:
    """Memory that 128 tokens of 7168 in bfloat16 take, by the formula of docs/design.md."""
    max_tokens, num_topk, hidden = 128, 8, 7168
    x, topk_idx = torch.ones(max_tokens, hidden, dtype=torch.bfloat16), torch.arange(num_topk).repeat(max_tokens, 1)
    sizes = {"num_experts": 288, "hidden": hidden, "num_topk": num_topk, "max_tokens": 0}
    before = heap_bytes()
    with context.buffer("shm", **sizes, low_latency_max_tokens=max_tokens) as buffer:
        for _ in range(4):
            got = buffer.low_latency_dispatch(x, topk_idx, layout=ExpertMajor())
            buffer.low_latency_combine(got.x, got.handle)
        used = heap_bytes() - before
    rows = 4 * context.num_ranks * max_tokens * hidden * 2
    beside = 4 * max_tokens * (8 * num_topk + hidden // 32)
    assert rows / 4 < used < rows + beside + 32 * 4096
    assert 2 * used < 0.01 * 2.15e9, "at 2 ranks, a hundredth of what DeepEP takes"


@pytest.mark.skipif(bool(shm_problem()), reason=shm_problem())
def test_heap_of_a_decode_step(ranks: Ranks) -> None:
    ranks.run(1, heap_of_a_decode_step)


def too_much_heap(context: RankContext) -> None:
    sizes = {"num_experts": 64, "hidden": 8192, "num_topk": 32, "max_tokens": 0, "low_latency_max_tokens": 1024}
    error = error_of(InvalidArgumentError, lambda: context.buffer("shm", **sizes))
    assert error.argument == "heap_gib" and "RAY_DEEPEP_HEAP_GIB" in str(error)


@pytest.mark.skipif(bool(shm_problem()), reason=shm_problem())
def test_room_that_the_heap_has_not(ranks: Ranks) -> None:
    ranks.run(2, too_much_heap)


@pytest.mark.skipif(bool(shm_problem()), reason=shm_problem())
def test_table(ranks: Ranks) -> None:
    sizes = low_latency_timing.Sizes(num_tokens=8, hidden=256, num_experts=16, num_topk=4, num_rounds=3)
    table = low_latency_timing.table(ranks.run(2, low_latency_timing.measure_calls, sizes), sizes)
    assert "dispatch float8 cast inside" in table and "combine exact" in table


def main() -> None:
    args = low_latency_timing.parser(__doc__).parse_args()
    low_latency_timing.report_calls(args)


if __name__ == "__main__":
    main()
