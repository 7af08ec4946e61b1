"""Low-latency calls on GPUs: the cases of the CPU core's tests, bit by bit; masks; CUDA graphs; a soak.

tests/gpu/run.sh tests/gpu/test_cuda_low_latency.py
"""

from __future__ import annotations

import dataclasses
import os

import low_latency_cases
import pytest
import test_low_latency
import test_low_latency_masks as masks
import torch
from captured import new_graph
from device_cases import use_gpu
from harness import RankContext, RankPool, Ranks, error_of
from low_latency_cases import DTYPES, FLOAT8, LAYOUTS, Case, World, assert_same, check_case, make_buffer
from on_device import OnDevice, Received

from ray_deepep import (
    ExpertMajor,
    Float8Cast,
    InvalidArgumentError,
    LowLatencyStats,
    ReceiveOverflowError,
    Work,
)
from ray_deepep.cuda import cuda_problem

pytestmark = pytest.mark.skipif(bool(cuda_problem()), reason=f"transport cuda: {cuda_problem()}")
UNDER_MPS = bool(os.environ.get("CUDA_MPS_PIPE_DIRECTORY"))
SEED = 7_100
NUM_REPLAYS = 400
NUM_GRAPH_SOAK = int(os.environ.get("RAY_DEEPEP_LOW_LATENCY_SOAK", "2000"))


def check_both_ways(context: RankContext, case: Case) -> None:
    """In one launch, and with hooks."""
    for with_hooks in (False, True):
        check_case(context, "cuda", case, with_hooks=with_hooks)


@pytest.mark.parametrize("num_ranks", (1, 2, 4))
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_layouts_and_dtypes(ranks: Ranks, layout: object, num_ranks: int) -> None:
    for dtype in DTYPES:
        case = Case(
            seed=SEED,
            num_tokens=test_low_latency.tokens_of(num_ranks),
            num_experts=num_ranks * 3,
            hidden=256,
            layout=layout,
            dtype=dtype,
            combine_dtype=torch.bfloat16 if dtype == FLOAT8 else dtype,
        )
        ranks.run(num_ranks, check_both_ways, case)


@pytest.mark.parametrize("reduce", ("fast", "exact"))
@pytest.mark.parametrize("num_topk", (1, 32))
def test_num_topk(ranks: Ranks, num_topk: int, reduce: str) -> None:
    case = Case(seed=SEED, num_tokens=(7, 3), num_experts=66, num_topk=num_topk, reduce=reduce, layout=ExpertMajor(4))
    ranks.run(2, check_case, "cuda", case)


def test_eight_ranks(ranks: Ranks) -> None:
    case = Case(seed=SEED, num_tokens=test_low_latency.tokens_of(8), num_experts=16, num_topk=4, reduce="exact")
    ranks.run(8, check_case, "cuda", case)


def test_decode_step(ranks: Ranks) -> None:
    """Sizes of a real model, whose rows are several pieces."""
    case = Case(seed=SEED, num_tokens=(16, 9), max_tokens=16, num_experts=32, hidden=7168, num_topk=8)
    for more in ({"dtype": torch.bfloat16}, {"dtype": torch.bfloat16, "cast": Float8Cast(), "reduce": "exact"}):
        ranks.run(2, check_case, "cuda", dataclasses.replace(case, **more))


@pytest.mark.parametrize("num_ranks", (1, 2, 4))
def test_fuzz(ranks: Ranks, num_ranks: int) -> None:
    ranks.run(num_ranks, test_low_latency.check_fuzz, "cuda", SEED + num_ranks, deadline_s=120.0)


def test_soak(ranks: Ranks) -> None:
    ranks.run(2, test_low_latency.soak, "cuda", SEED, deadline_s=120.0)


def test_most_tokens(ranks: Ranks) -> None:
    ranks.run(2, test_low_latency.large, "cuda")


def test_cast_inside_is_quantize_before(ranks: Ranks) -> None:
    ranks.run(1, test_low_latency.casts_as_quantize, "cuda")


def test_two_micro_batches(ranks: Ranks) -> None:
    ranks.run(2, test_low_latency.overlaps_micro_batches, "cuda")


def test_wait_time_per_source_rank(ranks: Ranks) -> None:
    first, second = ranks.run(2, test_low_latency.waits_for_a_slow_rank, "cuda")
    assert first[1] > 0.2e9 and first[0] == 0
    assert second[0] < 0.1e9


def options(context: RankContext) -> None:
    """``out=``, ``async_op``, int32 routing, statistics, overflow, routing that is refused after the fact."""
    case, rank, device = test_low_latency.BASE, context.rank, use_gpu(context.rank)
    world = World(case)
    x, idx, weights = (t[rank].to(device) for t in (world.x, world.topk_idx, world.weights))
    per_expert = [len(group) for group in world.groups[rank]]
    with make_buffer(context, "cuda", case) as on_device:
        buffer = on_device.buffer
        own = LowLatencyStats(
            num_tokens_per_expert=torch.zeros(case.num_local, dtype=torch.int64, device=device),
            wait_ns=torch.zeros(case.num_ranks, dtype=torch.int64, device=device),
        )
        work = buffer.low_latency_dispatch(x, idx.int(), topk_weights=weights, stats=own, async_op=True)
        assert isinstance(work, Work)
        got = work.wait()
        low_latency_cases.check_dispatch(world, rank, Received(buffer, got))
        assert own.num_tokens_per_expert.tolist() == per_expert
        assert buffer.low_latency_stats.num_tokens_per_expert.sum() == 0
        rows = torch.ones(got.x.shape, device=device)
        out = torch.full((case.num_tokens[rank], case.hidden), 7.0, device=device)
        home = buffer.low_latency_combine(rows, got.handle, out=out)
        assert home.x is out
        want = (weights * (idx >= 0)).sum(1, keepdim=True).expand(-1, case.hidden)
        torch.testing.assert_close(out, want)
        most = buffer.low_latency_dispatch(x, idx, layout=ExpertMajor(4), max_recv_tokens=8)
        needed = sum(-(-n // 4) * 4 for n in per_expert)
        assert needed > 8 and int(most.counts.sum()) <= 8 and int(most.expert_offsets.max()) == 8
        error = error_of(ReceiveOverflowError, most.handle.check)
        assert (error.rank, error.needed, error.room) == (rank, needed, 8)
        home = buffer.low_latency_combine(torch.ones(8, case.hidden, device=device), most.handle)
        assert home.x.isfinite().all()
        for value, rule in ((case.num_experts, "must be in"), (0, "must not name an expert twice")):
            bad = torch.zeros_like(idx)
            bad[:, 0] = value
            bad[:, 2:] = -1
            buffer.low_latency_dispatch(x, bad)
            torch.cuda.synchronize()
            if case.num_tokens[rank]:
                assert rule in str(error_of(InvalidArgumentError, buffer.check))
        buffer.check()


def test_options(ranks: Ranks) -> None:
    ranks.run(2, options)


class CapturedStep:
    """Dispatch and combine as one graph on static inputs; with hooks, compute runs between send and receive."""

    def __init__(self, on_device: OnDevice, case: Case, rank: int, *, with_hooks: bool) -> None:
        buffer, shape = on_device.buffer, (case.num_tokens[rank], case.num_topk)
        self.case, self.rank, self.buffer = case, rank, buffer
        self.x = torch.zeros(shape[0], case.hidden, dtype=case.dtype, device="cuda")
        self.topk_idx = torch.full(shape, -1, dtype=torch.int64, device="cuda")
        self.weights = torch.zeros(shape, device="cuda")
        rows = case.num_local * case.num_ranks * case.max_tokens
        self.outputs = torch.zeros(rows, case.hidden, dtype=case.combine_dtype, device="cuda")
        self.with_hooks = with_hooks
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.run()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self.graph = new_graph()
        with torch.cuda.graph(self.graph):
            self.run()

    def run(self) -> None:
        hooks = {"return_recv_hook": self.with_hooks}
        self.got = self.buffer.low_latency_dispatch(
            self.x, self.topk_idx, topk_weights=self.weights, layout=self.case.layout, cast=self.case.cast, **hooks
        )
        if self.with_hooks:
            self.got.hook()
        rows = self.outputs.view(self.got.x.shape)
        self.home = self.buffer.low_latency_combine(rows, self.got.handle, reduce=self.case.reduce, **hooks)
        if self.with_hooks:
            self.home.hook()

    def replay(self, world: World) -> None:
        self.x.copy_(world.x[self.rank])
        self.topk_idx.copy_(world.topk_idx[self.rank])
        self.weights.copy_(world.weights[self.rank])
        self.outputs.copy_(world.outputs[self.rank])
        self.graph.replay()

    def check(self, world: World) -> None:
        low_latency_cases.check_dispatch(world, self.rank, Received(self.buffer, self.got))
        assert_same(self.home.x.cpu(), world.combined(self.rank), "combined rows")


def replays(context: RankContext) -> None:
    """Several graphs alive at once, replayed by turns with new routing and new expert outputs."""
    use_gpu(context.rank)
    base = Case(seed=SEED, num_tokens=(9, 5), num_experts=6, dtype=torch.bfloat16)
    with make_buffer(context, "cuda", base) as on_device:
        cases = (base, dataclasses.replace(base, cast=Float8Cast(), reduce="exact"))
        steps = [
            CapturedStep(on_device, case, context.rank, with_hooks=hooks) for case in cases for hooks in (False, True)
        ]
        worlds = [World(dataclasses.replace(step.case, seed=SEED + n)) for n, step in enumerate(steps * 4)]
        for number in range(NUM_REPLAYS):
            step, world = steps[number % len(steps)], worlds[number % len(worlds)]
            step.replay(world)
            if number % 7 == 0 or number >= NUM_REPLAYS - len(steps):
                torch.cuda.synchronize()
                step.check(world)
        on_device.settle()


def test_graphs(ranks: Ranks) -> None:
    ranks.run(2, replays, deadline_s=120.0)


def replays_long(context: RankContext) -> None:
    """Alternating dispatches and combines by replay, with new routing each time, checked on the device."""
    device = use_gpu(context.rank)
    case = Case(seed=SEED, num_tokens=(12, 7), num_experts=8, dtype=torch.bfloat16, num_topk=4, dropped=0.1)
    generator = torch.Generator(device).manual_seed(SEED + context.rank)
    with make_buffer(context, "cuda", case) as on_device:
        step = CapturedStep(on_device, case, context.rank, with_hooks=False)
        step.outputs.fill_(1.0)
        wrong = torch.zeros((), dtype=torch.int64, device=device)
        for _ in range(NUM_GRAPH_SOAK):
            order = torch.rand(step.topk_idx.shape[0], case.num_experts, generator=generator, device=device)
            step.topk_idx.copy_(order.topk(case.num_topk).indices)
            # Powers of two: every order of adding gives the same sum.
            step.weights.copy_(torch.randint(-3, 3, step.weights.shape, generator=generator, device=device).exp2())
            step.graph.replay()
            wrong += (step.home.x.float() != step.weights.sum(1, keepdim=True).bfloat16().float()).sum()
        torch.cuda.synchronize()
        on_device.settle()
        assert wrong.item() == 0


def test_graph_soak(ranks: Ranks) -> None:
    ranks.run(2, replays_long, deadline_s=300.0)


def test_mask_by_hand_and_back(ranks: Ranks) -> None:
    ranks.run(3, masks.masks_by_hand, "cuda")


def test_rank_that_missed_its_mask(ranks: Ranks) -> None:
    ranks.run(3, masks.unmasks_early, "cuda")


def test_rejoin_names_who_did_not_unmask(ranks: Ranks) -> None:
    ranks.run(3, masks.nobody_lets_it_in, "cuda")


def test_stopped_rank_is_masked_and_returns(ranks: Ranks) -> None:
    ranks.run(3, masks.stops_and_returns, "cuda")


def test_rank_that_never_calls_its_hook(ranks: Ranks) -> None:
    ranks.run(2, masks.never_calls_its_hook, "cuda")


def test_mask_ends_a_wait(ranks: Ranks) -> None:
    ranks.run(2, masks.masks_while_it_waits, "cuda")


def test_operation_that_came_before_the_mask(ranks: Ranks) -> None:
    ranks.run(2, masks.is_masked_after_it_came, "cuda")


def test_mask_of_one_rank_is_taken_over(ranks: Ranks) -> None:
    ranks.run(3, masks.follows_a_mask, "cuda")


def test_without_rank_0(ranks: Ranks) -> None:
    ranks.run(3, masks.rank_0_is_gone, "cuda")


@pytest.mark.skipif(UNDER_MPS, reason="MPS ends its clients when one is killed")
def test_killed_rank_is_masked() -> None:
    with RankPool(3) as pool:
        outcomes = pool.outcomes(masks.is_killed, "cuda", deadline_s=60.0)
        assert [outcomes[0].value, outcomes[1].value] == [(2,), (2,)], outcomes
