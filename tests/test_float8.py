"""Rows cast to float8: bits against a table of all e4m3 numbers, accuracy, and dispatch with a cast."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from cases import PADDED, Case, assert_same, check_case, dtype_id, layout_id, random_rows
from harness import RankContext, Ranks, error_of

from ray_deepep import ExpertMajor, Float8Cast, InvalidArgumentError, InvalidTypeError, TokenMajor
from ray_deepep.float8 import FLOAT8, SCALE_FORMATS, Float8Rows, dequantize, quantize

SEED = 8
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASTS = tuple(Float8Cast(scale_format=name) for name in SCALE_FORMATS)


def cast_id(cast: Float8Cast) -> str:
    return cast.scale_format


def rows_of_many_sizes(dtype: torch.dtype) -> torch.Tensor:
    """Blocks from all zeros to large numbers, each with elements far below its largest."""
    generator = torch.Generator().manual_seed(SEED)
    rows = random_rows(40, 384, torch.float32, generator)
    rows *= torch.exp2(torch.randint(-30, 12, (40, 1), generator=generator).float())
    rows *= torch.exp2(torch.randint(-12, 1, rows.shape, generator=generator).float())
    rows[3] = 0.0
    rows[4, 128:256] = -0.0
    return rows.to(dtype)


@pytest.mark.parametrize("cast", CASTS, ids=cast_id)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_bits(cast: Float8Cast, dtype: torch.dtype) -> None:
    x = rows_of_many_sizes(dtype)
    rows = quantize(x, cast)
    data, scales = oracle.quantize(x, cast)
    assert_same("scales", rows.scales, scales)
    assert_same("data", rows.data, data)


@pytest.mark.parametrize("cast", CASTS, ids=cast_id)
def test_ties_go_to_even(cast: Float8Cast) -> None:
    """With 448 in each block the scale is 1, and elements are rounded as they are."""
    ties = [
        (17.0, 16.0),
        (19.0, 20.0),
        (-21.0, -20.0),
        (23.0, 24.0),
        (2**-10, 0.0),
        (3 * 2**-10, 2**-8),
        (447.0, 448.0),
    ]
    x = torch.zeros(1, 128)
    x[0, 0] = 448.0
    x[0, 1 : len(ties) + 1] = torch.tensor([given for given, _ in ties])
    rows = quantize(x, cast)
    assert rows.scales.item() == 1.0
    assert rows.data[0, 1 : len(ties) + 1].float().tolist() == [want for _, want in ties]


def test_powers_of_two() -> None:
    """The smallest that is no smaller than the exact scale, which a power of two stays."""
    for exponent in range(-15, 60):
        for factor, want in ((1.0, 0), (1.0 + 2**-23, 1), (1.5, 1), (2.0 - 2**-23, 1)):
            x = torch.zeros(1, 128)
            x[0, 5] = 448.0 * math.ldexp(1.0, exponent)
            scales = quantize(x * factor, Float8Cast()).scales
            rounded = quantize(x * factor, Float8Cast(scale_format="power_of_two")).scales
            if scales.item() > math.ldexp(1.0, exponent):
                assert rounded.item() == math.ldexp(1.0, exponent + want)
            else:
                assert rounded.item() == math.ldexp(1.0, exponent)


def test_the_largest_rows_and_zeros_are_finite() -> None:
    x = torch.zeros(2, 128)
    x[0, 0] = torch.finfo(torch.float32).max
    for cast in CASTS:
        rows = quantize(x, cast)
        assert torch.isfinite(rows.data.float()).all() and torch.isfinite(rows.scales).all()
        assert rows.data[1].float().abs().max() == 0
        assert rows.scales[1].item() >= 1e-4 / 448 * (1 - 1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("cast", CASTS, ids=cast_id)
def test_accuracy(cast: Float8Cast, dtype: torch.dtype) -> None:
    """Three mantissa bits: at most 1/16 of an element, or half the smallest e4m3 step of its block; a power of two
    costs up to one bit of the range below."""
    x = rows_of_many_sizes(dtype)
    back = dequantize(quantize(x, cast), torch.float32)
    amax = x.float().view(40, 3, 128).abs().amax(-1).clamp(min=1e-4)
    step = (amax / 448 * 2**-10 * (2.0 if cast.scale_format == "power_of_two" else 1.0)).repeat_interleave(128, 1)
    error = (back - x.float()).abs()
    assert (error <= torch.maximum(x.float().abs() / 16, step) * (1 + 1e-5)).all()
    assert dequantize(quantize(x, cast), dtype).dtype == dtype


def test_shapes() -> None:
    rows = quantize(torch.zeros(0, 256), Float8Cast())
    assert (rows.data.shape, rows.data.dtype, rows.scales.shape) == ((0, 256), FLOAT8, (0, 2))
    assert dequantize(rows, torch.bfloat16).shape == (0, 256)
    error = error_of(InvalidArgumentError, lambda: quantize(torch.zeros(2, 100), Float8Cast()))
    assert str(error) == "x: shape must be [T, H] with H a multiple of 128; got (2, 100)"
    error = error_of(InvalidArgumentError, lambda: Float8Cast(scale_format="e8m0"))
    assert str(error) == "scale_format: must be one of float32, power_of_two; got 'e8m0'"


@pytest.mark.parametrize("num_ranks", (1, 2, 4))
@pytest.mark.parametrize("cast", CASTS, ids=cast_id)
@pytest.mark.parametrize("layout", (TokenMajor(), ExpertMajor(8), PADDED), ids=layout_id)
def test_dispatch_with_a_cast(ranks: Ranks, transport: str, layout: object, cast: Float8Cast, num_ranks: int) -> None:
    """New and cached dispatches, and the combines after them."""
    for dtype in DTYPES:
        case = Case(
            seed=SEED,
            num_tokens=(6, 0, 5, 3)[:num_ranks],
            hidden=256,
            layout=layout,
            dtype=dtype,
            routing="sparse",
            cast=cast,
            spare_rows=None if layout == PADDED else 3,
        )
        ranks.run(num_ranks, check_case, transport, case)


def round_trip(context: RankContext, transport: str) -> float:
    """Relative error of an exchange in float8 whose experts do nothing."""
    with context.buffer(transport, num_experts=4, hidden=512, num_topk=2, max_tokens=32) as buffer:
        generator = torch.Generator().manual_seed(context.rank)
        x = torch.randn(32, 512, generator=generator)
        topk_idx = torch.rand(32, 4, generator=generator).topk(2).indices
        result = buffer.dispatch(x, topk_idx, layout=ExpertMajor(4), cast=Float8Cast())
        rows = dequantize(Float8Rows(data=result.x, scales=result.x_scales), torch.float32)
        home = buffer.combine(rows, result.handle).x / 2
        return float((home - x).norm() / x.norm())


def test_round_trip_error(ranks: Ranks, transport: str) -> None:
    for error in ranks.run(2, round_trip, transport):
        assert 0.01 < error < 0.04


def bad_casts(context: RankContext, transport: str) -> list[str]:
    x, idx, scales = torch.ones(3, 128), torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 1)
    geometry = {"num_experts": 4, "num_topk": 2, "max_tokens": 3}
    narrow = torch.ones(3, 64)
    with (
        context.buffer(transport, hidden=128, **geometry) as buffer,
        context.buffer(transport, hidden=64, **geometry) as small,
    ):
        cast = Float8Cast()
        calls = (
            (InvalidTypeError, lambda: buffer.dispatch(x, idx, cast="float8")),
            (InvalidTypeError, lambda: buffer.dispatch(x.to(FLOAT8), idx, cast=cast)),
            (InvalidArgumentError, lambda: buffer.dispatch(x, idx, x_scales=scales, cast=cast)),
            (InvalidArgumentError, lambda: small.dispatch(narrow, idx, cast=cast)),
            (
                InvalidArgumentError,
                lambda: buffer.dispatch(x, idx, layout=ExpertMajor(1), cast=cast, scale_by_weights=True),
            ),
        )
        return [str(error_of(error, call)) for error, call in calls]


def test_bad_casts(ranks: Ranks, transport: str) -> None:
    (messages,) = ranks.run(1, bad_casts, transport)
    assert messages == [
        "cast: must be a Float8Cast; got 'str'",
        "x: dtype must be one of float32, bfloat16, float16 with cast=; got 'float8_e4m3fn'",
        "x_scales: must be left out with cast=; got 'a tensor of shape (3, 1)'",
        "hidden: must be a multiple of 128 for fp8 rows; got 64",
        "scale_by_weights: needs one row per route and rows that are not float8; got True",
    ]
