"""Dot products of rows, which are the gradients of gates: one kernel on GPUs, torch elsewhere.

Not communication: a rank computes them alone, on the current stream.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from . import local_kernel
from .cuda_arguments import ROW_ALIGNMENT
from .errors import InvalidArgumentError

# Half a MiB of float32: most of a second-level cache, and few enough pieces that the calls cost little.
_CACHED_ELEMENTS = 2**17


def row_dots(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor, weights: torch.Tensor | None = None) -> None:
    """Write ``out[g, n] = sum over h of a[n, h] * b[g, n, h]``, and then scale ``a`` in place by ``weights``. Local.

    N stands for one dimension or more, G for any number; products and sums have the dtype of ``out``.

    On GPUs contiguous float32, bfloat16 or float16 rows, a multiple of 16 bytes, whose dots are float32 take the CUDA
    core's kernel, which reads every row from memory once. A dot's bits then depend on its two rows alone. All others,
    and GPUs without the CUDA core, take torch's products and sums. So do CPUs, with the bits of ``(a.to(out.dtype) *
    b).sum(-1)``. Scaled rows have the same bits either way.

    Args:
        a: ``[*N, H]``.
        b: ``[*G, *N, H]``.
        out: ``[*G, *N]``.
        weights: ``[*N]`` float32; products with them are float32 and rounded once.

    Raises:
        InvalidArgumentError: a shape or a device does not go with the others.
    """
    _check(a, b, out, weights)
    if a.is_cuda:
        # Rows that are scaled must stay where they are.
        rows = a.contiguous() if weights is None else a
        if fits_kernel(rows, b, out, weights) and _launch(rows, b, out, weights):
            return
    tensors = [a, b, out.unsqueeze(-1), *([] if weights is None else [weights.unsqueeze(-1)])]
    for rows, others, dots, *factors in _pieces(*tensors):
        torch.sum(rows.to(out.dtype) * others, -1, keepdim=True, out=dots)
        for factor in factors:
            rows.mul_(factor)


def fits_kernel(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, weights: torch.Tensor | None) -> bool:
    """Whether the kernel takes such tensors, were they on a GPU."""
    given = [a, b, out, *([] if weights is None else [weights])]
    return (
        a.dtype in local_kernel.KERNEL_DTYPES
        and b.dtype == a.dtype
        and all(tensor.dtype == torch.float32 for tensor in given[2:])
        and all(tensor.is_contiguous() for tensor in given)
        and a.shape[-1] * a.element_size() % ROW_ALIGNMENT == 0
        and all(tensor.data_ptr() % ROW_ALIGNMENT == 0 for tensor in (a, b))
        # A block per row.
        and math.prod(a.shape[:-1]) < 2**31
    )


def _check(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, weights: torch.Tensor | None) -> None:
    if a.dim() < 2 or b.shape[max(b.dim() - a.dim(), 0) :] != a.shape:
        raise InvalidArgumentError("b", tuple(b.shape), f"must be [*G, *N, H], where a is [*N, H] = {list(a.shape)}")
    if out.shape != b.shape[:-1]:
        raise InvalidArgumentError("out", tuple(out.shape), f"must be {list(b.shape[:-1])}, as b without H")
    if weights is not None and weights.shape != a.shape[:-1]:
        raise InvalidArgumentError("weights", tuple(weights.shape), f"must be {list(a.shape[:-1])}, as a without H")
    for name, tensor in (("b", b), ("out", out), ("weights", weights)):
        if tensor is not None and tensor.device != a.device:
            raise InvalidArgumentError(name, str(tensor.device), f"must be on {a.device}, as a is")


def _launch(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, weights: torch.Tensor | None) -> bool:
    return local_kernel.launch(
        "row_dots",
        a,
        a=a.data_ptr(),
        b=b.data_ptr(),
        weights=0 if weights is None else weights.data_ptr(),
        out=out.data_ptr(),
        num_rows=math.prod(a.shape[:-1]),
        num_groups=math.prod(b.shape[: b.dim() - a.dim()]),
        hidden=a.shape[-1],
    )


def _pieces(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Views of ``tensors`` along the last dimension but one: on a CPU, pieces whose products stay in its cache.

    A product of all rows at once needs fresh memory, which costs more than the arithmetic.
    """
    count = max(tensors[0].shape[-2], 1)
    widest = max(*(tensor.numel() // count for tensor in tensors), 1)
    step = max(_CACHED_ELEMENTS // widest, 1) if tensors[0].device.type == "cpu" else count
    return zip(*(tensor.split(step, -2) for tensor in tensors))
