"""Rows that CUDA kernels could not load without ending the context: refused before a launch. Needs no GPU."""

from __future__ import annotations

import pytest
import torch
from harness import error_of

from ray_deepep import InvalidArgumentError
from ray_deepep.cuda_arguments import check_address, check_rows

MEMORY = torch.zeros(4 * 24 + 8, dtype=torch.bfloat16)


@pytest.mark.parametrize("first", (0, 8))
def test_rows_that_fit(first: int) -> None:
    check_rows("x", MEMORY[first : first + 96].view(4, 24))


def test_rows_of_no_tokens_have_no_address() -> None:
    check_rows("x", torch.zeros(0, 24, dtype=torch.bfloat16))


def test_row_size() -> None:
    error = error_of(InvalidArgumentError, lambda: check_rows("x", MEMORY[:80].view(4, 20)))
    assert str(error) == "x: rows must be a multiple of 16 bytes, not 40; got (4, 20)"


def test_a_view_that_begins_in_between() -> None:
    rows = MEMORY[1:97].view(4, 24)
    error = error_of(InvalidArgumentError, lambda: check_rows("rows", rows))
    rule = "must begin at a multiple of 16 bytes in memory (call .clone())"
    assert str(error) == f"rows: {rule}; got 'address {rows.data_ptr():#x}'"


def test_scales_begin_where_rows_do() -> None:
    scales = torch.zeros(13)
    check_address("x_scales", scales[4:12].view(4, 2))
    error = error_of(InvalidArgumentError, lambda: check_address("x_scales", scales[1:9].view(4, 2)))
    assert error.argument == "x_scales" and "multiple of 16 bytes" in error.rule
