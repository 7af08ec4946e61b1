"""Biases by expert from the CUDA core's kernel, against torch's bits.

tests/gpu/run.sh tests/gpu/test_cuda_expert_bias.py
"""

from __future__ import annotations

import pytest
import torch

from ray_deepep.cuda import cuda_problem
from ray_deepep.expert_bias import ExpertRows, add_expert_bias

pytestmark = pytest.mark.skipif(bool(cuda_problem()), reason=f"transport cuda: {cuda_problem()}")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GUARD = 1024


@pytest.fixture
def kernel_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """What would fall back to torch fails."""

    def refuse(rows: ExpertRows) -> torch.Tensor:
        pytest.fail("torch's way")

    monkeypatch.setattr(ExpertRows, "expert_of_row", property(refuse))


@pytest.mark.parametrize("sizes", ([0], [5], [0, 0, 7, 0], [33, 1, 0, 100], [3] * 70, [4000, 0, 5000]), ids=str)
@pytest.mark.parametrize("width", (8, 128, 1032, 7168))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("kernel_only")
def test_bits(dtype: torch.dtype, width: int, sizes: list[int]) -> None:
    num_rows = sum(sizes)
    ends = torch.tensor(sizes, device="cuda").cumsum(0).int()
    biases = [torch.randn(width, device="cuda").to(dtype) for _ in sizes]
    memory = torch.full((num_rows * width + GUARD,), float("nan"), device="cuda").to(dtype)
    x = memory[: num_rows * width].view(num_rows, width)
    x.copy_(torch.randn(num_rows, width, device="cuda"))
    owner = torch.repeat_interleave(torch.tensor(sizes, device="cuda"))
    expected = x + torch.stack(biases).index_select(0, owner)
    add_expert_bias(x, biases, ExpertRows(ends, num_rows))
    assert torch.equal(x.view(torch.uint8), expected.view(torch.uint8))
    assert memory[num_rows * width :].isnan().all()


def test_odd_widths_take_torchs_way() -> None:
    """Rows of no multiple of 16 bytes."""
    biases = [torch.randn(5, device="cuda") for _ in range(2)]
    x = torch.zeros(3, 5, device="cuda")
    add_expert_bias(x, biases, ExpertRows(torch.tensor([1, 3], dtype=torch.int32, device="cuda"), 3))
    assert torch.equal(x, torch.stack([biases[0], biases[1], biases[1]]))
