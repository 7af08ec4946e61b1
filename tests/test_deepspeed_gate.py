"""The gates with sums along rows are stock's gates: same places, same weights, same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deepspeed.moe import sharded_moe

from ray_deepep.deepspeed import enable
from ray_deepep.deepspeed.gate_sums import sums_down, with_sums

NUM_EXPERTS = 8
CALLS = [
    ("top1gating", {"use_rts": False}),
    ("top1gating", {"use_rts": True}),
    ("top1gating", {"use_rts": False, "drop_tokens": False}),
    ("top2gating", {"top2_2nd_expert_sampling": False}),
    ("top2gating", {"top2_2nd_expert_sampling": True}),
    ("top2gating", {"top2_2nd_expert_sampling": False, "drop_tokens": False}),
    ("topkgating", {"k": 3}),
    ("topkgating", {"k": 4, "drop_policy": "position"}),
    ("topkgating", {"k": 3, "drop_tokens": False}),
]


def answers(gating: Any, options: dict[str, Any], *, sparse: bool) -> list[Any]:
    """What a gate returns for 57 tokens, and the gradient of its gates; the same each time."""
    torch.manual_seed(3)
    logits = (torch.randn(57, NUM_EXPERTS) * 2).requires_grad_()
    # A sampling gate adds to what it is given in place.
    out = gating(logits * 1.0, capacity_factor=0.7, min_capacity=2, sparse_routes=sparse, **options)
    gates = out[5] if sparse else out[1]
    (gates.float() ** 2).sum().backward()
    return [*out, logits.grad]


@pytest.mark.parametrize("sparse", [True, False], ids=["routes", "masks"])
@pytest.mark.parametrize("name, options", CALLS, ids=lambda value: "-".join(map(str, value)) if value else "")
def test_same_bits(name: str, options: dict[str, Any], sparse: bool) -> None:
    calls: list[torch.Size] = []

    def noted(x: torch.Tensor, dim: int) -> torch.Tensor:
        calls.append(x.shape)
        return sums_down(x, dim)

    stock = getattr(sharded_moe, name)
    expected = answers(stock, options, sparse=sparse)
    seen = answers(with_sums(stock, noted), options, sparse=sparse)
    assert calls == [(57, NUM_EXPERTS)] * (2 if name == "top2gating" else 1)
    for ours, theirs in zip(seen, expected, strict=True):
        assert ours == theirs if isinstance(theirs, int) else torch.equal(ours, theirs) and ours.dtype == theirs.dtype


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (33, 5)])
def test_sums_down(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = torch.randint(0, 2, shape).to(dtype)
    assert torch.equal(sums_down(x, 0), torch.cumsum(x, 0))
    assert torch.equal(sums_down(x, 1), torch.cumsum(x, 1))
    assert torch.equal(sums_down(x[:, 0], 0), torch.cumsum(x[:, 0], 0))


def test_gates_are_stocks_again_when_the_swap_closes() -> None:
    stock = sharded_moe.top2gating
    with enable():
        assert sharded_moe.top2gating is not stock
        assert sharded_moe.top2gating.__code__ is stock.__code__
    assert sharded_moe.top2gating is stock


def test_what_is_no_plain_function_stays() -> None:
    assert with_sums(len) is len
