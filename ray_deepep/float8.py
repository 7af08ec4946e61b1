"""Float8 rows: e4m3 elements with one float32 scale per block of 128, and how rows are cast to them.

``quantize`` and ``dequantize`` are the definition in readable torch. CPU transports cast with them; the CUDA core casts
while it stages rows, and gives the same bits.
"""

from __future__ import annotations

import dataclasses

import torch

from .errors import InvalidArgumentError
from .fields import check_choice, known_fields

FLOAT8 = torch.float8_e4m3fn
SCALE_BLOCK = 128
"""Elements of a row that share a scale."""
LARGEST = 448.0
"""Largest finite e4m3 number."""
SMALLEST_AMAX = 1e-4
"""Blocks are scaled as if their largest element were at least this, so that blocks of zeros have a scale."""
SCALE_FORMATS = ("float32", "power_of_two")

_MANTISSA_BITS = 23


@known_fields
@dataclasses.dataclass(frozen=True, kw_only=True)
class Float8Cast:
    """Cast rows to float8 as they leave.

    Per block, with ``amax`` its largest absolute value in float32, at least 1e-4: ``scale = amax / 448``, and an
    element is ``x / scale`` rounded to the nearest e4m3 number, ties to even, and held within +-448.
    """

    scale_format: str = "float32"
    """``float32``: the scale as it is. ``power_of_two``: the smallest power of two that is no smaller (UE8M0)."""

    def __post_init__(self) -> None:
        check_choice("scale_format", self.scale_format, SCALE_FORMATS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Float8Rows:
    """Rows in float8."""

    data: torch.Tensor
    """``[T, H]`` float8_e4m3fn."""
    scales: torch.Tensor
    """``[T, H / 128]`` float32."""


def quantize(x: torch.Tensor, cast: Float8Cast) -> Float8Rows:
    """Rows ``[T, H]`` of float32, bfloat16 or float16 in float8; H is a multiple of 128.

    Raises:
        InvalidArgumentError: ``x`` has another shape.
    """
    if x.dim() != 2 or x.shape[1] % SCALE_BLOCK:
        raise InvalidArgumentError("x", tuple(x.shape), f"shape must be [T, H] with H a multiple of {SCALE_BLOCK}")
    blocks = x.float().reshape(x.shape[0], x.shape[1] // SCALE_BLOCK, SCALE_BLOCK)
    amax = blocks.abs().amax(-1).clamp(min=SMALLEST_AMAX)
    # Divided by a tensor: on GPUs torch multiplies by the inverse of a number, which rounds twice.
    scales = amax / torch.full_like(amax, LARGEST)
    if cast.scale_format == "power_of_two":
        scales = _next_power_of_two(scales)
    data = (blocks / scales.unsqueeze(-1)).clamp(-LARGEST, LARGEST).to(FLOAT8)
    return Float8Rows(data=data.view(x.shape), scales=scales)


def dequantize(rows: Float8Rows, dtype: torch.dtype) -> torch.Tensor:
    """``[T, H]`` of ``dtype``: each element times its scale in float32, rounded once."""
    num_tokens, num_blocks = rows.scales.shape
    blocks = rows.data.float().view(num_tokens, num_blocks, SCALE_BLOCK)
    return (blocks * rows.scales.unsqueeze(-1)).to(dtype).view(rows.data.shape)


def _next_power_of_two(values: torch.Tensor) -> torch.Tensor:
    """Smallest powers of two that are no smaller; positive normal float32 numbers."""
    bits = values.view(torch.int32)
    exponents = bits >> _MANTISSA_BITS
    has_mantissa = (bits & ((1 << _MANTISSA_BITS) - 1)) != 0
    return ((exponents + has_mantissa.to(torch.int32)) << _MANTISSA_BITS).view(torch.float32)
