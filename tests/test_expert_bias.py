"""Biases by expert as torch adds them, on CPUs; tests/gpu/test_cuda_expert_bias.py has the kernel."""

from __future__ import annotations

import contextlib

import pytest
import torch

from ray_deepep import expert_bias as module
from ray_deepep.cuda import core_version
from ray_deepep.expert_bias import ExpertRows, add_expert_bias


@pytest.mark.parametrize("sizes", ([0], [5], [0, 0, 7, 0], [3, 1, 0, 10]), ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_each_row_gets_its_experts(dtype: torch.dtype, sizes: list[int]) -> None:
    ends = torch.tensor(sizes).cumsum(0).int()
    biases = [torch.randn(6).to(dtype) for _ in sizes]
    x = torch.randn(sum(sizes), 6).to(dtype)
    groups = x.split(sizes)
    expected = torch.cat([group + bias for group, bias in zip(groups, biases)])
    add_expert_bias(x, biases, ExpertRows(ends, sum(sizes)))
    assert torch.equal(x, expected)


def test_whose_rows_are_is_found_once() -> None:
    rows = ExpertRows(torch.tensor([2, 2, 3], dtype=torch.int32), 3)
    assert rows.expert_of_row.tolist() == [0, 0, 2]
    assert rows.expert_of_row is rows.expert_of_row


@pytest.mark.skipif(not core_version()[0], reason=f"no CUDA core: {core_version()[1]}")
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_the_core_takes_what_it_is_given(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Without rows nothing is launched, so this needs no GPU: it is about names and types of arguments."""
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
    ends = torch.zeros(2, dtype=torch.int32)
    assert module._launch(torch.zeros(0, 8, dtype=dtype), torch.zeros(2, 8, dtype=dtype), ends)
