"""Kernels of the CUDA core that work on this rank's own tensors: they need no buffer, and torch stands in for them."""

from __future__ import annotations

import importlib

import torch

from .cuda_arguments import core_dtypes
from .cuda_heap import load_core

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of rows that they take."""


def launch(kernel: str, rows: torch.Tensor, /, **arguments: int) -> bool:
    """Launch ``kernel`` on the current stream of the GPU of ``rows``, whose dtype it is told.

    Args:
        kernel: name in the core.
        rows: on a GPU.
        arguments: addresses and sizes, by name.

    Returns:
        Whether there is a CUDA core that could be given the work.
    """
    try:
        core = load_core()
    except ImportError:
        return False
    dtypes = core_dtypes(importlib.import_module("ray_deepep._core"))
    with torch.cuda.device(rows.device):
        stream = torch._C._cuda_getCurrentRawStream(rows.device.index)
        getattr(core, kernel)(**arguments, dtype=dtypes[rows.dtype], stream=stream)
    return True
