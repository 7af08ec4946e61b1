"""Decode steps through the low-latency calls: latency per batch, and that a model split over ranks gives its answer.

    python tests/test_inference.py --batch_size 128 --hidden_size 7168

prints, per batch, the latency of dispatch + combine (p50, p99) and GB/s. As a pytest it judges results; never times.
"""

from __future__ import annotations

import low_latency_timing
import pytest
import torch
from harness import RankContext, Ranks, shm_problem

from ray_deepep import ExpertBlocks, ExpertMajor

E, H, T, K, NUM_LAYERS, NUM_STEPS = 8, 128, 6, 2, 3, 4


def experts(layer: int) -> torch.Tensor:
    """``[E, H, H]``: one linear expert each, the same on every rank."""
    return torch.randn(E, H, H, generator=torch.Generator().manual_seed(layer)) / H**0.5


def route(x: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and experts of each token."""
    gate = torch.randn(H, E, generator=torch.Generator().manual_seed(100 + layer))
    weights, topk_idx = (x @ gate).softmax(-1).topk(K)
    return weights, topk_idx


def alone(x: torch.Tensor) -> torch.Tensor:
    """A step on one process: every token's experts in a loop."""
    for layer in range(NUM_LAYERS):
        weights, topk_idx = route(x, layer)
        moved = torch.zeros_like(x)
        for t in range(len(x)):
            for k in range(K):
                moved[t] += weights[t, k] * (x[t] @ experts(layer)[topk_idx[t, k]])
        x = torch.nn.functional.layer_norm(x + moved, (H,))
    return x


def decode(context: RankContext, transport: str, compact: bool) -> None:
    """Steps with two micro-batches in flight, through experts that ranks share."""
    first, num_local = context.rank * (E // context.num_ranks), E // context.num_ranks
    layout = ExpertMajor(8) if compact else ExpertBlocks()
    sizes = {"num_experts": E, "hidden": H, "num_topk": K, "max_tokens": 0, "low_latency_max_tokens": T}

    def compute(got, layer: int) -> torch.Tensor:
        rows = torch.zeros_like(got.x)
        flat, offsets = rows.view(-1, H), got.expert_offsets.tolist()
        for e in range(num_local):
            group = slice(offsets[e], offsets[e] + int(got.counts[e]))
            flat[group] = got.x.view(-1, H)[group] @ experts(layer)[first + e]
        return rows

    generator = torch.Generator().manual_seed(context.rank)
    with context.buffer(transport, **sizes) as buffer:
        for step in range(NUM_STEPS):
            # The ranks' batches differ in size, and one is empty in some steps.
            batches = [torch.randn((step + context.rank + i) % (T + 1), H, generator=generator) for i in range(2)]
            expected = [alone(x) for x in batches]
            for layer in range(NUM_LAYERS):
                sent = []
                for x in batches:
                    weights, topk_idx = route(x, layer)
                    sent.append(
                        buffer.low_latency_dispatch(
                            x, topk_idx, topk_weights=weights, layout=layout, return_recv_hook=True
                        )
                    )
                homes = []
                for got in sent:
                    got.hook()
                    rows = compute(got, layer)
                    homes.append(buffer.low_latency_combine(rows, got.handle, return_recv_hook=True))
                for home in homes:
                    home.hook()
                batches = [
                    torch.nn.functional.layer_norm(x + home.x, (H,)) for x, home in zip(batches, homes, strict=True)
                ]
            for x, wanted in zip(batches, expected, strict=True):
                torch.testing.assert_close(x, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("compact", (False, True), ids=("blocks", "compact"))
@pytest.mark.parametrize("num_ranks", (1, 2))
def test_decode_gives_the_answer_of_one_process(ranks: Ranks, transport: str, num_ranks: int, compact: bool) -> None:
    ranks.run(num_ranks, decode, transport, compact)


@pytest.mark.skipif(bool(shm_problem()), reason=shm_problem())
def test_steps_are_timed(ranks: Ranks) -> None:
    sizes = low_latency_timing.Sizes(num_tokens=4, hidden=256, num_experts=16, num_topk=4, num_rounds=3)
    by_rank = ranks.run(2, low_latency_timing.measure_step, sizes)
    assert [len(timed.times_us) for timed in by_rank[0]] == [3, 3]
    assert by_rank[0][0].remote_bytes > by_rank[0][1].remote_bytes > 0


def main() -> None:
    low_latency_timing.report_steps(low_latency_timing.parser(__doc__).parse_args())


if __name__ == "__main__":
    main()
