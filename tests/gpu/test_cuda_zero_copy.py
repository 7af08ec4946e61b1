"""Low-latency combines on GPUs whose rows peers read in place: the CPU core's cases, and a decode loop in a graph."""

from __future__ import annotations

import pytest
import test_low_latency_zero_copy as zero_copy
import torch
from captured import new_graph
from device_cases import use_gpu
from harness import RankContext, Ranks
from low_latency_cases import LAYOUTS

from ray_deepep import ExpertMajor
from ray_deepep.cuda import cuda_problem

pytestmark = pytest.mark.skipif(bool(cuda_problem()), reason=f"transport cuda: {cuda_problem()}")
SEED = 9_300
NUM_REPLAYS = 200


@pytest.mark.parametrize("num_ranks", (1, 2, 4))
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_layouts_and_dtypes(ranks: Ranks, layout: object, num_ranks: int) -> None:
    zero_copy.test_layouts_and_dtypes(ranks, "cuda", layout, num_ranks)


@pytest.mark.parametrize(
    "case",
    [
        zero_copy.overwrites_after_the_next_dispatch,
        zero_copy.overlaps_micro_batches,
        zero_copy.overflows,
        zero_copy.is_left_behind,
        zero_copy.refuses,
    ],
    ids=lambda case: case.__name__,
)
def test_as_on_cpus(ranks: Ranks, case) -> None:
    ranks.run(2, case, "cuda")


def decodes(context: RankContext) -> None:
    """Layers one after the other without the host: experts' answers of each overwrite those of the last."""
    device = use_gpu(context.rank)
    num_experts, hidden, num_tokens, num_topk = 16, 1024, 24, 4
    generator = torch.Generator(device).manual_seed(SEED + context.rank)
    x = torch.zeros(num_tokens, hidden, dtype=torch.bfloat16, device=device)
    idx = torch.zeros(num_tokens, num_topk, dtype=torch.int64, device=device)
    weights = torch.zeros(num_tokens, num_topk, device=device)
    sizes = {"num_experts": num_experts, "hidden": hidden, "num_topk": num_topk, "max_tokens": 0}
    most_rows = context.num_ranks * num_tokens * num_topk
    with context.buffer(
        "cuda", **sizes, low_latency_max_tokens=num_tokens, symm_bytes=most_rows * hidden * 2 + 4096
    ) as buffer:
        held = buffer.symm_empty(most_rows)

        def layers() -> list[torch.Tensor]:
            outputs = []
            for factor in (2.0, 0.5, 4.0):
                got = buffer.low_latency_dispatch(
                    x, idx, topk_weights=weights, layout=ExpertMajor(), max_recv_tokens=most_rows
                )
                torch.mul(got.x, factor, out=held)
                outputs.append(buffer.low_latency_combine(held, got.handle, reduce="exact", zero_copy=True).x)
            return outputs

        def draw() -> None:
            x.copy_(torch.randn(x.shape, generator=generator, device=device))
            random = torch.rand(num_tokens, num_experts, generator=generator, device=device)
            idx.copy_(random.topk(num_topk).indices)
            idx[torch.rand(idx.shape, generator=generator, device=device) < 0.2] = -1
            weights.copy_(torch.rand(weights.shape, generator=generator, device=device))

        draw()
        layers()
        torch.cuda.synchronize()
        graph = new_graph()
        with torch.cuda.graph(graph):
            outputs = layers()
        for number in range(NUM_REPLAYS):
            draw()
            graph.replay()
            for output, factor in zip(outputs, (2.0, 0.5, 4.0)):
                total = torch.zeros(x.shape, device=device)
                for k in range(num_topk):
                    term = weights[:, k, None] * (x * factor).float()
                    total = torch.where(idx[:, k, None] >= 0, total + term, total)
                assert torch.equal(output, total.to(x.dtype)), f"replay {number}, times {factor}"
        buffer.check()


@pytest.mark.parametrize("num_ranks", (1, 2, 4))
def test_decode_loop_in_a_graph(ranks: Ranks, num_ranks: int) -> None:
    ranks.run(num_ranks, decodes, deadline_s=120.0)
