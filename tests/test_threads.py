"""Rows that several threads of a rank move, and one does: the same bits. Cases elsewhere are too small for more."""

from __future__ import annotations

import pytest
import torch
from cases import layout_id
from harness import RankContext, Ranks, shm_problem

from ray_deepep import Buffer, ExpertMajor, Padded, TokenMajor

pytestmark = pytest.mark.skipif(bool(shm_problem()), reason=shm_problem())

NUM_TOKENS, HIDDEN, NUM_EXPERTS, NUM_TOPK = 600, 1024, 6, 3
CAPACITY = NUM_TOKENS + 5
"""Of a padded block: room for all tokens of a rank, and slots that stay empty."""


def given(rank: int) -> dict[str, torch.Tensor]:
    """Rows of 2.4 MB, their routes and weights."""
    generator = torch.Generator().manual_seed(rank)
    topk_idx = torch.rand(NUM_TOKENS, NUM_EXPERTS, generator=generator).topk(NUM_TOPK).indices
    topk_idx[::7, 1] = -1
    return {
        "x": torch.randn(NUM_TOKENS, HIDDEN, generator=generator),
        "topk_idx": topk_idx,
        "topk_weights": torch.rand(NUM_TOKENS, NUM_TOPK, generator=generator),
    }


def by_threads(context: RankContext, num_threads: int, layout: object) -> list[torch.Tensor]:
    sent = given(context.rank)
    if isinstance(layout, Padded):
        sent["locations"] = torch.arange(NUM_TOKENS, dtype=torch.int32).unsqueeze(1).expand(-1, NUM_TOPK).contiguous()
    sizes = {"num_experts": NUM_EXPERTS, "hidden": HIDDEN, "num_topk": NUM_TOPK, "max_tokens": NUM_TOKENS}
    with (
        context.new_communicator("shm", num_threads=num_threads) as comm,
        Buffer(comm, **sizes, max_capacity=CAPACITY) as buffer,
    ):
        result = buffer.dispatch(**sent, layout=layout)
        found, weighted = [result.x], layout != TokenMajor()
        for reduce in ("exact", "fast"):
            found.append(buffer.combine(result.x, result.handle, weighted=weighted, reduce=reduce).x)
        if weighted:
            scaled = buffer.dispatch(sent["x"], handle=result.handle, scale_by_weights=True).x
            found += [scaled, buffer.combine(scaled, result.handle, keep_routes=True).routes]
        return [tensor.clone() for tensor in found]


def check(context: RankContext, layout: object) -> None:
    one, three = (by_threads(context, num_threads, layout) for num_threads in (1, 3))
    assert len(one) == len(three) and all(torch.equal(a, b) for a, b in zip(one, three))
    assert all(tensor.abs().sum() > 0 for tensor in one)


@pytest.mark.parametrize("layout", (TokenMajor(), ExpertMajor(16), Padded(CAPACITY)), ids=layout_id)
def test_threads_do_not_show_in_the_rows(ranks: Ranks, layout: object) -> None:
    ranks.run(2, check, layout)


def low_latency_by_threads(context: RankContext, num_threads: int) -> list[torch.Tensor]:
    sent = given(context.rank)
    sizes = {"num_experts": NUM_EXPERTS, "hidden": HIDDEN, "num_topk": NUM_TOPK, "max_tokens": 0}
    with (
        context.new_communicator("shm", num_threads=num_threads) as comm,
        Buffer(comm, **sizes, low_latency_max_tokens=NUM_TOKENS) as buffer,
    ):
        result = buffer.low_latency_dispatch(**sent)
        found = [rows_that_came(result)]
        for reduce in ("exact", "fast"):
            found.append(buffer.low_latency_combine(result.x, result.handle, reduce=reduce).x.clone())
        return found


def rows_that_came(result) -> torch.Tensor:
    """The rows of each local expert one after the other; what lies behind them is whatever was there."""
    blocks = []
    for rows, count in zip(result.x, result.counts.tolist()):
        blocks.append(rows[:count])
    return torch.cat(blocks).clone()


def check_low_latency(context: RankContext) -> None:
    one, three = (low_latency_by_threads(context, num_threads) for num_threads in (1, 3))
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))
    assert all(tensor.abs().sum() > 0 for tensor in one)


def test_threads_do_not_show_in_low_latency_rows(ranks: Ranks) -> None:
    ranks.run(2, check_low_latency)
