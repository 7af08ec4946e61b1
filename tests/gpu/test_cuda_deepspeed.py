"""DeepSpeed's MoE layer swapped onto the CUDA core, against the same layer swapped onto the CPU core.

Needs DeepSpeed on the GPU host, and MPS where ranks share a GPU.
"""

from __future__ import annotations

import pytest
import torch
from harness import CASE_CONFIG, RankContext, Ranks

from ray_deepep.cuda import cuda_problem

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed here")
pytestmark = pytest.mark.skipif(bool(cuda_problem()), reason=f"transport cuda: {cuda_problem()}")


def layer_on_both(
    context: RankContext, k: int, drop_tokens: bool, layout: str, combine: str, uneven: bool = False
) -> list[str]:
    import deepspeed_cases as ds

    from ray_deepep import CommConfig
    from ray_deepep.deepspeed import SwapConfig, enable

    torch.cuda.set_device(context.rank % torch.cuda.device_count())
    torch.backends.cuda.matmul.allow_tf32 = False
    ds.start_deepspeed()
    # Without random gates: the devices draw differently.
    moe = {"top2_2nd_expert_sampling": False} if k == 2 else {}
    case = ds.LayerCase(k=k, drop_tokens=drop_tokens, ep_size=context.num_ranks, moe=moe)
    layer = ds.make_layer(case)
    results = []
    for device, transport in (("cpu", "shm"), ("cuda", "cuda")):
        comm = CommConfig(**{**CASE_CONFIG, "transport": transport, "device_heap_gib": 0.05})
        with enable(SwapConfig(layout=layout, combine=combine, comm=comm)) as swap:
            results.append(_step(layer.to(device), context.rank, device, 4 + context.rank if uneven else 4))
            assert [c.transport for c in swap.communicators] == [transport]
    return ds.differences(*results, atol=2e-5)


def _step(
    layer: torch.nn.Module, rank: int, device: str, num_sequences: int, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    shape = (num_sequences, 16, layer.deepspeed_moe.gate.wg.weight.shape[1])
    x = torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()
    weight = torch.randn(shape, generator=generator).to(device, dtype)
    layer.zero_grad()
    y, l_aux, exp_counts = layer(x)
    ((y * weight).sum() + l_aux).backward()
    results = {"y": y, "l_aux": l_aux, "exp_counts": exp_counts, "x.grad": x.grad}
    results |= {f"{name}.grad": p.grad for name, p in layer.named_parameters()}
    return {name: value.detach().cpu().clone() for name, value in results.items()}


@pytest.mark.parametrize(("layout", "combine"), [("padded", "exact"), ("padded", "fast"), ("compact", "exact")])
@pytest.mark.parametrize(("k", "drop_tokens"), [(2, True), (4, True), (4, False)])
@pytest.mark.parametrize("num_ranks", (2, 4))
def test_layer(ranks: Ranks, num_ranks: int, k: int, drop_tokens: bool, layout: str, combine: str) -> None:
    for differences in ranks.run(num_ranks, layer_on_both, k, drop_tokens, layout, combine, deadline_s=120.0):
        assert differences == []


@pytest.mark.parametrize("layout", ("padded", "compact"))
def test_ranks_with_different_token_counts(ranks: Ranks, layout: str) -> None:
    """Padded: their capacities differ, which the core reports as a mismatch before ranks agree on one."""
    for differences in ranks.run(2, layer_on_both, 2, True, layout, "exact", True, deadline_s=120.0):
        assert differences == []


def grouped_and_loop(context: RankContext, combine: str) -> list[str]:
    """bfloat16 experts as grouped products, which is what GPUs do by default, against one by one."""
    import deepspeed_cases as ds

    from ray_deepep import CommConfig
    from ray_deepep.deepspeed import SwapConfig, enable

    torch.cuda.set_device(context.rank % torch.cuda.device_count())
    ds.start_deepspeed()
    case = ds.LayerCase(k=4, ep_size=context.num_ranks, dtype=torch.bfloat16)
    layer = ds.make_layer(case).to("cuda")
    comm = CommConfig(**{**CASE_CONFIG, "transport": "cuda", "device_heap_gib": 0.05})
    results = []
    for experts in ("loop", "auto"):
        with enable(SwapConfig(combine=combine, experts=experts, comm=comm)) as swap:
            step = _step(layer, context.rank, "cuda", 4, torch.bfloat16)
            results.append({name: value.float() for name, value in step.items()})
            asked = [found for found, _ in swap._registry.grouped._found.values()]
            assert [found is not None for found in asked] == ([] if experts == "loop" else [True])
    return ds.differences(*results, atol=2e-2)


@pytest.mark.parametrize("combine", ("exact", "fast"))
@pytest.mark.parametrize("num_ranks", (1, 2))
def test_grouped_experts(ranks: Ranks, num_ranks: int, combine: str) -> None:
    for differences in ranks.run(num_ranks, grouped_and_loop, combine, deadline_s=120.0):
        assert differences == []


def growing_layer(context: RankContext, layout: str, drop_tokens: bool) -> list[list[str]]:
    """Batches that grow on one rank, on all, and shrink again: each against the CPU core."""
    import deepspeed_cases as ds

    from ray_deepep import CommConfig
    from ray_deepep.deepspeed import SwapConfig, enable

    torch.cuda.set_device(context.rank % torch.cuda.device_count())
    torch.backends.cuda.matmul.allow_tf32 = False
    ds.start_deepspeed()
    case = ds.LayerCase(k=4, drop_tokens=drop_tokens, ep_size=context.num_ranks)
    layer = ds.make_layer(case)
    batches = (2, 2 + 5 * context.rank, 20, 1, 30 - 29 * context.rank)
    results: dict[str, list[dict[str, torch.Tensor]]] = {}
    for device, transport in (("cpu", "shm"), ("cuda", "cuda")):
        layer.to(device)
        with enable(
            SwapConfig(layout=layout, combine="exact", comm=CommConfig(**CASE_CONFIG | {"transport": transport}))
        ) as swap:
            results[device] = [_step(layer, context.rank, device, batch) for batch in batches]
            sizes = [buffer.geometry.max_tokens for buffer in swap.buffers]
            assert len(sizes) == (1 if device == "cpu" else 4), sizes
            assert device == "cpu" or sizes[0] < 64 <= sizes[1] < sizes[2] < sizes[3] < 1000
    return [ds.differences(*pair, atol=2e-5) for pair in zip(results["cpu"], results["cuda"], strict=True)]


@pytest.mark.parametrize("drop_tokens", (True, False))
@pytest.mark.parametrize("layout", ("padded", "compact"))
def test_buffers_grow_with_batches(ranks: Ranks, layout: str, drop_tokens: bool) -> None:
    for differences in ranks.run(2, growing_layer, layout, drop_tokens, deadline_s=120.0):
        assert differences == [[]] * 5
