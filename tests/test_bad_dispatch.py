"""Bad arguments of ``Buffer.dispatch``: a typed error that names the argument, the value and the rule."""

from __future__ import annotations

import itertools

import pytest
import torch
from bad_calls import FP8, GEOMETRY, IDX, LOCATIONS, SCALES, WEIGHTS, H, T, X, bad_cached, bad_dispatch, check_bad_call
from cases import check_still_works
from harness import RankContext, Ranks, error_of

from ray_deepep import ExpertMajor, InvalidArgumentError, InvalidTypeError, Padded, TokenMajor


def _first_expert_twice() -> torch.Tensor:
    locations = LOCATIONS.clone()
    locations[3, 1] = locations[0, 0]
    return locations


DTYPES = "dtype must be one of float32, bfloat16, float16, float8_e4m3fn"
BAD_CALLS = {
    "x list": bad_dispatch("x", "must be a torch.Tensor; got 'list'", InvalidTypeError, x=[[1.0]]),
    "x float64": bad_dispatch("x", f"{DTYPES}; got 'float64'", InvalidTypeError, x=X.double()),
    "x one dimension": bad_dispatch("x", "shape must be [rows, hidden=128]; got (128,)", x=X[0]),
    "x other hidden": bad_dispatch("x", "shape must be [rows, hidden=128]; got (4, 64)", x=torch.ones(T, 64)),
    "x not contiguous": bad_dispatch("x", "must be contiguous (call .contiguous()); got (1, 4)", x=torch.ones(H, T).T),
    "topk_weights other device": bad_dispatch(
        "topk_weights", "must be on a cpu device; got 'meta'", topk_weights=WEIGHTS.to("meta")
    ),
    "x too many tokens": bad_dispatch(
        "x", "must have at most max_tokens=5 rows; got (6, 128)", x=torch.ones(6, H), topk_idx=torch.zeros(6, 2).long()
    ),
    "topk_idx missing": bad_dispatch(
        "topk_idx", "must be a torch.Tensor (or give handle=); got 'NoneType'", InvalidTypeError, topk_idx=None
    ),
    "topk_idx one dimension": bad_dispatch(
        "topk_idx", "shape must be [T=4, K] with 1 <= K <= num_topk=3; got (4,)", topk_idx=IDX[:, 0]
    ),
    "topk_idx other tokens": bad_dispatch(
        "topk_idx", "shape must be [T=4, K] with 1 <= K <= num_topk=3; got (3, 2)", topk_idx=IDX[:3]
    ),
    "topk_idx too wide": bad_dispatch(
        "topk_idx", "shape must be [T=4, K] with 1 <= K <= num_topk=3; got (4, 4)", topk_idx=IDX.repeat(1, 2)
    ),
    "topk_idx no column": bad_dispatch(
        "topk_idx", "shape must be [T=4, K] with 1 <= K <= num_topk=3; got (4, 0)", topk_idx=IDX[:, :0]
    ),
    "topk_idx float": bad_dispatch(
        "topk_idx", "dtype must be one of int64, int32; got 'float32'", InvalidTypeError, topk_idx=IDX.float()
    ),
    "topk_idx too large": bad_dispatch("topk_idx[1, 1]", "must be in [-1, 4); got 4", topk_idx=IDX + (IDX == 3).long()),
    "topk_idx too small": bad_dispatch("topk_idx[2, 0]", "must be in [-1, 4); got -2", topk_idx=IDX - (IDX < 0).long()),
    "topk_idx not contiguous": bad_dispatch(
        "topk_idx", "must be contiguous (call .contiguous()); got (1, 4)", topk_idx=IDX.T.contiguous().T
    ),
    "topk_weights bfloat16": bad_dispatch(
        "topk_weights",
        "dtype must be one of float32; got 'bfloat16'",
        InvalidTypeError,
        topk_weights=WEIGHTS.bfloat16(),
    ),
    "topk_weights shape": bad_dispatch("topk_weights", "shape must be (4, 2); got (4, 1)", topk_weights=WEIGHTS[:, :1]),
    "x_scales without float8": bad_dispatch(
        "x_scales", "goes with float8_e4m3fn rows only; got 'a tensor of shape (4, 1)'", x_scales=SCALES
    ),
    "x_scales missing": bad_dispatch("x_scales", "must be given with float8 rows; got None", x=FP8),
    "x_scales shape": bad_dispatch("x_scales", "shape must be (4, 1); got (4, 2)", x=FP8, x_scales=SCALES.repeat(1, 2)),
    "x_scales float64": bad_dispatch(
        "x_scales", "dtype must be one of float32; got 'float64'", InvalidTypeError, x=FP8, x_scales=SCALES.double()
    ),
    "layout text": bad_dispatch(
        "layout", "must be TokenMajor, ExpertMajor or Padded; got 'str'", InvalidTypeError, layout="expert"
    ),
    "capacity too large": bad_dispatch(
        "layout.capacity", "must be <= max_capacity=6; got 7", layout=Padded(7), locations=LOCATIONS
    ),
    "locations missing": bad_dispatch(
        "locations", "must be given with layout=Padded(capacity); got None", layout=Padded(6)
    ),
    "locations without padded": bad_dispatch(
        "locations", "goes with layout=Padded(capacity) only; got 'a tensor of shape (4, 2)'", locations=LOCATIONS
    ),
    "locations int64": bad_dispatch(
        "locations",
        "dtype must be one of int32; got 'int64'",
        InvalidTypeError,
        layout=Padded(6),
        locations=LOCATIONS.long(),
    ),
    "locations shape": bad_dispatch(
        "locations", "shape must be (4, 2); got (4, 1)", layout=Padded(6), locations=LOCATIONS[:, :1]
    ),
    "locations too large": bad_dispatch(
        "locations[2, 1]", "must be in [0, 5); got 5", layout=Padded(5), locations=LOCATIONS
    ),
    "locations negative": bad_dispatch(
        "locations[0, 0]", "must be in [0, 6); got -1", layout=Padded(6), locations=LOCATIONS - 1
    ),
    "locations without slots": bad_dispatch(
        "locations[0, 0]", "must be in [0, 0); got 0", layout=Padded(0), locations=torch.zeros_like(LOCATIONS)
    ),
    "locations twice": bad_dispatch(
        "locations",
        "must differ between the routes of one expert; got '0 twice for expert 0'",
        layout=Padded(6),
        locations=_first_expert_twice(),
    ),
    "scale_by_weights token-major": bad_dispatch(
        "scale_by_weights", "needs one row per route and rows that are not float8; got True", scale_by_weights=True
    ),
    "scale_by_weights float8": bad_dispatch(
        "scale_by_weights",
        "needs one row per route and rows that are not float8; got True",
        x=FP8,
        x_scales=SCALES,
        layout=ExpertMajor(),
        scale_by_weights=True,
    ),
    "handle type": bad_dispatch(
        "handle", "must be a DispatchHandle; got 'int'", InvalidTypeError, topk_idx=None, handle=3
    ),
    "handle and topk_idx": bad_cached(
        "topk_idx", "must be left out with handle=; got 'a tensor of shape (4, 2)'", topk_idx=IDX
    ),
    "handle and topk_weights": bad_cached(
        "topk_weights", "must be left out with handle=; got 'a tensor of shape (4, 2)'", topk_weights=WEIGHTS
    ),
    "handle and layout": bad_cached("layout", "must be left out with handle=; got TokenMajor()", layout=TokenMajor()),
    "handle and locations": bad_cached(
        "locations", "must be left out with handle=; got 'a tensor of shape (4, 2)'", locations=LOCATIONS
    ),
    "handle of other tokens": bad_cached("x", "must have the handle's 4 tokens; got (3, 128)", x=X[:3]),
}


def check_call(context: RankContext, transport: str, name: str) -> None:
    check_bad_call(context, transport, BAD_CALLS[name])


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_call(ranks: Ranks, transport: str, name: str) -> None:
    ranks.run(2, check_call, transport, name)


def check_float8_needs_whole_blocks(context: RankContext, transport: str) -> None:
    geometry = {**GEOMETRY, "hidden": 100}
    x = torch.ones(T, 100).to(torch.float8_e4m3fn)
    with context.buffer(transport, **geometry) as buffer:
        error = error_of(InvalidArgumentError, lambda: buffer.dispatch(x, IDX, x_scales=SCALES))
    assert str(error) == "hidden: must be a multiple of 128 for fp8 rows; got 100"


def test_float8_needs_whole_blocks(ranks: Ranks, transport: str) -> None:
    ranks.run(2, check_float8_needs_whole_blocks, transport)


def check_one_error_at_a_time(context: RankContext, transport: str) -> None:
    """Bad calls on different ranks at different times, good ones between them."""
    with context.buffer(transport, **GEOMETRY) as buffer:
        for turn, bad in enumerate(itertools.islice(BAD_CALLS.values(), 12)):
            handle = bad.handle(buffer)
            if turn % context.num_ranks == context.rank:
                error_of(bad.error, lambda bad=bad, handle=handle: bad.call(buffer, handle))
            check_still_works(buffer, context.rank)


def test_one_error_at_a_time(ranks: Ranks, transport: str) -> None:
    ranks.run(2, check_one_error_at_a_time, transport)
