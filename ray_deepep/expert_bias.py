"""Biases of experts' linear layers, added to rows grouped by expert: one kernel on GPUs, torch elsewhere. Local."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from . import local_kernel
from .cuda_arguments import ROW_ALIGNMENT


class ExpertRows:
    """S rows grouped by expert."""

    def __init__(self, ends: torch.Tensor, num_rows: int) -> None:
        self.ends, self.num_rows = ends, num_rows
        """``ends`` ``[L]`` int32, ascending, the last one S: the first row after each expert's."""

    @functools.cached_property
    def expert_of_row(self) -> torch.Tensor:
        """``[S]``: found once, for all layers of the experts."""
        rows = torch.arange(self.num_rows, device=self.ends.device, dtype=self.ends.dtype)
        return torch.searchsorted(self.ends, rows, right=True)


def add_expert_bias(x: torch.Tensor, biases: Sequence[torch.Tensor], rows: ExpertRows) -> None:
    """``x[n] += biases[expert of n]`` in place, with the bits of torch's sum.

    Args:
        x: ``[S, O]``, contiguous.
        biases: L of ``[O]``, dtype of ``x``.
        rows: whose the rows of ``x`` are.
    """
    stacked = torch.stack(tuple(biases))
    if not (x.is_cuda and _fits_kernel(x, stacked, rows.ends) and _launch(x, stacked, rows.ends)):
        x += stacked.index_select(0, rows.expert_of_row)


def _launch(x: torch.Tensor, biases: torch.Tensor, ends: torch.Tensor) -> bool:
    return local_kernel.launch(
        "expert_bias",
        x,
        rows=x.data_ptr(),
        biases=biases.data_ptr(),
        ends=ends.data_ptr(),
        num_rows=x.shape[0],
        num_experts=biases.shape[0],
        width=x.shape[1],
    )


def _fits_kernel(x: torch.Tensor, biases: torch.Tensor, ends: torch.Tensor) -> bool:
    return (
        x.dtype in local_kernel.KERNEL_DTYPES
        and biases.dtype == x.dtype
        and ends.dtype == torch.int32
        and x.is_contiguous()
        and ends.is_contiguous()
        and x.shape[1] * x.element_size() % ROW_ALIGNMENT == 0
        and x.data_ptr() % ROW_ALIGNMENT == 0
        and biases.data_ptr() % ROW_ALIGNMENT == 0
    )
