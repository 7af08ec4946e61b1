"""What kernels count: bytes from each rank, and time waited for it."""

from __future__ import annotations

import time

import pytest
import torch
from harness import RankContext, Ranks

from ray_deepep import ExpertMajor, TokenMajor
from ray_deepep.cuda import cuda_problem
from ray_deepep.telemetry import CommStats

pytestmark = pytest.mark.skipif(bool(cuda_problem()), reason=f"transport cuda: {cuda_problem()}")
HIDDEN = 256
ROW = HIDDEN * 2


def count_exchanges(context: RankContext, layout: object, reduce: str) -> tuple[CommStats, CommStats]:
    """A dispatch and a combine on two ranks; rank 1 comes late to both. Counters before and after."""
    torch.cuda.set_device(context.rank % torch.cuda.device_count())
    with context.buffer("cuda", num_experts=4, hidden=HIDDEN, num_topk=2, max_tokens=16) as buffer:
        # Of three tokens: the first to experts 0 and 1 (rank 0), the second to 1 and 2, the third to 3 alone.
        topk_idx = torch.tensor([[0, 1], [1, 2], [3, -1]], device="cuda")
        x = torch.ones(3, HIDDEN, dtype=torch.bfloat16, device="cuda")
        arrived = buffer.dispatch(x, topk_idx)
        buffer.combine(arrived.x, arrived.handle)
        torch.cuda.synchronize()
        buffer.stats(reset=True)
        for _ in range(2):
            if context.rank == 1:
                time.sleep(0.1)
            arrived = buffer.dispatch(x, topk_idx, layout=layout)
            torch.cuda.synchronize()
            if context.rank == 1:
                time.sleep(0.1)
            buffer.combine(arrived.x, arrived.handle, **({} if layout == TokenMajor() else {"reduce": reduce}))
            torch.cuda.synchronize()
        return buffer.stats(reset=True), buffer.stats()


@pytest.mark.parametrize(
    ("layout", "reduce", "combined"),
    ((TokenMajor(), "", (2, 2)), (ExpertMajor(), "exact", (3, 2)), (ExpertMajor(), "fast", (2, 2))),
    ids=str,
)
def test_what_kernels_count(ranks: Ranks, layout: object, reduce: str, combined: tuple[int, int]) -> None:
    for rank, (stats, after) in enumerate(ranks.run(2, count_exchanges, layout, reduce)):
        # Both ranks send two tokens to either rank, in each of two rounds.
        assert stats.recv_bytes == tuple(2 * (2 + rows) * ROW for rows in combined)
        assert after.recv_bytes == (0, 0)
        assert stats.wait_ns[rank] == 0
        late = stats.wait_ns[1 - rank]
        assert late > 0.3e9 if rank == 0 else late < 0.1e9, (rank, stats.wait_ns)
        assert stats.heap_bytes == after.heap_bytes >= 2 * 3 * ROW


def count_float8(context: RankContext) -> tuple[int, ...]:
    """Bytes of a dispatch that casts: a rank's scales come with its rows."""
    from ray_deepep import Float8Cast

    torch.cuda.set_device(context.rank % torch.cuda.device_count())
    with context.buffer("cuda", num_experts=2, hidden=HIDDEN, num_topk=1, max_tokens=8) as buffer:
        x = torch.ones(5, HIDDEN, dtype=torch.bfloat16, device="cuda")
        buffer.dispatch(x, torch.zeros(5, 1, dtype=torch.int64, device="cuda"), cast=Float8Cast())
        torch.cuda.synchronize()
        return buffer.stats().recv_bytes


def test_scales_are_counted(ranks: Ranks) -> None:
    row = HIDDEN + HIDDEN // 128 * 4
    assert ranks.run(2, count_float8) == [(5 * row, 5 * row), (0, 0)]
