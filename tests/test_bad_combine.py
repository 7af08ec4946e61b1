"""Bad arguments of ``Buffer.combine``: a typed error that names the argument, the value and the rule."""

from __future__ import annotations

import pytest
import torch
from bad_calls import WEIGHTS, BadCall, H, X, bad_combine, check_bad_call, token_major
from harness import RankContext, Ranks

from ray_deepep import InvalidTypeError

BAD_CALLS = {
    "combine handle type": BadCall(
        call=lambda buffer, handle: buffer.combine(X, None),
        argument="handle",
        message="must be a DispatchHandle; got 'NoneType'",
        error=InvalidTypeError,
    ),
    "combine rows float8": bad_combine(
        "rows",
        "dtype must be one of float32, bfloat16, float16; got 'float8_e4m3fn'",
        InvalidTypeError,
        rows=lambda rows: rows.to(torch.float8_e4m3fn),
    ),
    "combine rows list": bad_combine(
        "rows", "must be a torch.Tensor; got 'list'", InvalidTypeError, rows=lambda rows: rows.tolist()
    ),
    "combine rows number": bad_combine(
        "rows", "must have the handle's 16 rows; got (15, 128)", rows=lambda rows: rows[:15]
    ),
    "combine rows hidden": bad_combine(
        "rows", "shape must be [rows, hidden=128]; got (16, 100)", rows=lambda rows: rows[:, :100]
    ),
    "combine rows not contiguous": bad_combine(
        "rows", "must be contiguous (call .contiguous()); got (256, 1)", rows=lambda rows: rows.repeat(1, 2)[:, :H]
    ),
    "combine reduce": bad_combine("reduce", "must be one of exact, fast, expert_order; got 'sum'", reduce="sum"),
    "combine weighted token-major": bad_combine(
        "weighted",
        "needs one row per route; token-major rows are already reduced; got True",
        handle=token_major,
        weighted=True,
    ),
    "combine keep_routes token-major": bad_combine(
        "keep_routes",
        "needs one row per route and a reduction at the source; got True",
        handle=token_major,
        keep_routes=True,
    ),
    "combine keep_routes fast": bad_combine(
        "keep_routes",
        "needs one row per route and a reduction at the source; got True",
        reduce="fast",
        keep_routes=True,
    ),
    "combine topk_weights shape": bad_combine("topk_weights", "shape must be (16,); got (4, 2)", topk_weights=WEIGHTS),
    "combine topk_weights token-major shape": bad_combine(
        "topk_weights", "shape must be (4, 2); got (8,)", handle=token_major, topk_weights=torch.ones(8)
    ),
    "combine topk_weights float64": bad_combine(
        "topk_weights",
        "dtype must be one of float32; got 'float64'",
        InvalidTypeError,
        topk_weights=torch.ones(16).double(),
    ),
    "combine bias other device": bad_combine("bias", "must be on a cpu device; got 'meta'", bias=X.to("meta")),
    "combine bias shape": bad_combine("bias", "shape must be (4, 128); got (1, 128)", bias=X[:1]),
    "combine bias dtype": bad_combine(
        "bias", "dtype must be one of float32; got 'float16'", InvalidTypeError, bias=X.half()
    ),
    "combine_weights shape": BadCall(
        call=lambda buffer, handle: buffer.combine_weights(WEIGHTS[:2], handle),
        argument="topk_weights",
        message="shape must be (4, 2); got (2, 2)",
    ),
    "combine_weights handle type": BadCall(
        call=lambda buffer, handle: buffer.combine_weights(WEIGHTS, "plan"),
        argument="handle",
        message="must be a DispatchHandle; got 'str'",
        error=InvalidTypeError,
    ),
}


def check_call(context: RankContext, transport: str, name: str) -> None:
    check_bad_call(context, transport, BAD_CALLS[name])


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_call(ranks: Ranks, transport: str, name: str) -> None:
    ranks.run(2, check_call, transport, name)
