"""``async_op``, ``num_sms`` and ``after`` on CPUs: a Work that has ended, a limit without effect, a refusal."""

from __future__ import annotations

import pytest
import torch
from cases import Case, CombineMode, assert_dispatched, check_combine, dispatch, layout_id, make_buffer, make_world
from harness import RankContext, Ranks, error_of

from ray_deepep import (
    CombineResult,
    DispatchResult,
    ExpertMajor,
    InvalidArgumentError,
    InvalidTypeError,
    TokenMajor,
    Work,
)
from ray_deepep.handle import Layout

SEED = 5


def check_work(context: RankContext, transport: str, layout: Layout, spare_rows: int | None) -> None:
    case = Case(
        seed=SEED, num_tokens=(6, 3, 0, 4)[: context.num_ranks], layout=layout, routing="sparse", spare_rows=spare_rows
    )
    world, rank = make_world(case), context.rank
    with make_buffer(context, transport, case, world) as buffer:
        work = dispatch(buffer, world, rank, async_op=True)
        assert isinstance(work, Work) and work.done() and work.event is None
        result = work.wait()
        assert isinstance(result, DispatchResult) and work.wait() is result
        assert_dispatched(result, world, rank)
        check_combine(buffer, result.handle, world, rank, CombineMode(), seed=SEED)
        rows = torch.randn(result.handle.num_rows, case.hidden)
        work = buffer.combine(rows, result.handle, async_op=True)
        home = work.wait()
        assert isinstance(home, CombineResult)
        assert torch.equal(home.x, buffer.combine(rows, result.handle, num_sms=1).x)


@pytest.mark.parametrize("num_ranks", (1, 2, 4))
@pytest.mark.parametrize("spare_rows", (None, 3))
@pytest.mark.parametrize("layout", (TokenMajor(), ExpertMajor(4)), ids=layout_id)
def test_work(ranks: Ranks, transport: str, layout: Layout, spare_rows: int | None, num_ranks: int) -> None:
    ranks.run(num_ranks, check_work, transport, layout, spare_rows)


def bad_options(context: RankContext, transport: str) -> list[str]:
    x, idx = torch.ones(3, 16), torch.zeros(3, 2, dtype=torch.int64)
    # torch refuses to make an event without a GPU.
    event = object.__new__(torch.cuda.Event)
    with context.buffer(transport, num_experts=4, hidden=16, num_topk=2, max_tokens=3) as buffer:
        result = buffer.dispatch(x, idx)
        rows, handle = result.x, result.handle
        weights = torch.zeros(handle.num_recv_tokens, 2)
        calls = (
            (InvalidArgumentError, lambda: buffer.dispatch(x, idx, num_sms=0)),
            (InvalidTypeError, lambda: buffer.combine(rows, handle, num_sms="all")),
            (InvalidArgumentError, lambda: buffer.combine_weights(weights, handle, num_sms=-1)),
            (InvalidTypeError, lambda: buffer.dispatch(x, idx, after=1.5)),
            (InvalidTypeError, lambda: buffer.combine(rows, handle, after="now")),
            (InvalidArgumentError, lambda: buffer.dispatch(x, idx, after=event)),
            (InvalidArgumentError, lambda: buffer.dispatch(x, idx, async_op=True, after=event)),
            (InvalidArgumentError, lambda: buffer.combine(rows, handle, after=event)),
        )
        messages = [str(error_of(error, call)).split("; got")[0] for error, call in calls]
        # Nothing was sent: the ranks are still in step.
        assert torch.equal(buffer.dispatch(x, handle=handle).x, rows)
        return messages


@pytest.mark.parametrize("num_ranks", (1, 2))
def test_bad_options(ranks: Ranks, transport: str, num_ranks: int) -> None:
    want = [
        "num_sms: must be >= 1",
        "num_sms: must be an int",
        "num_sms: must be >= 1",
        "after: must be a torch.cuda.Event",
        "after: must be a torch.cuda.Event",
        *["after: goes with transport cuda only"] * 3,
    ]
    assert ranks.run(num_ranks, bad_options, transport) == [want] * num_ranks
