"""Bad arguments of the low-latency calls: a typed error that names argument, value and rule; nothing was sent."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from harness import RankContext, Ranks, error_of
from low_latency_cases import Case, World, make_buffer, step

from ray_deepep import (
    Buffer,
    ExpertBlocks,
    ExpertMajor,
    Float8Cast,
    HookError,
    InvalidArgumentError,
    InvalidTypeError,
    LowLatencyDispatchResult,
    LowLatencyStats,
    MismatchError,
    Padded,
)

CASE = Case(seed=3, num_tokens=(4, 4), max_tokens=5, num_experts=4)
T, H, K = 4, 128, 2
X = torch.ones(T, H)
IDX = torch.tensor([[0, 1], [2, 3], [-1, 3], [1, 0]])
WEIGHTS = torch.ones(T, K)
FP8 = X.to(torch.float8_e4m3fn)
ROW_DTYPES = "dtype must be one of float32, bfloat16, float16"
STATS = LowLatencyStats(
    num_tokens_per_expert=torch.zeros(2, dtype=torch.int64), wait_ns=torch.zeros(2, dtype=torch.int64)
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BadCall:
    """One broken rule; ``call`` gets the buffer and a dispatch of all ranks."""

    call: Callable[[Buffer, LowLatencyDispatchResult], Any]
    message: str
    error: type[Exception] = InvalidArgumentError


def bad_dispatch(message: str, error: type[Exception] = InvalidArgumentError, **arguments: Any) -> BadCall:
    """A dispatch with some arguments replaced."""
    given = {"x": X, "topk_idx": IDX, **arguments}
    return BadCall(call=lambda buffer, got: buffer.low_latency_dispatch(**given), message=message, error=error)


def bad_combine(
    message: str,
    error: type[Exception] = InvalidArgumentError,
    rows: Callable[[torch.Tensor], Any] = lambda rows: rows,
    **arguments: Any,
) -> BadCall:
    """A combine of rows changed by ``rows``."""

    def call(buffer: Buffer, got: LowLatencyDispatchResult) -> Any:
        given = {"handle": got.handle, **arguments}
        return buffer.low_latency_combine(rows(torch.zeros(got.x.shape)), **given)

    return BadCall(call=call, message=message, error=error)


def with_stats(**fields: torch.Tensor) -> LowLatencyStats:
    return dataclasses.replace(STATS, **fields)


BAD_CALLS = {
    "x list": bad_dispatch("x: must be a torch.Tensor; got 'list'", InvalidTypeError, x=[1.0]),
    "x dtype": bad_dispatch(f"x: {ROW_DTYPES}, float8_e4m3fn; got 'float64'", InvalidTypeError, x=X.double()),
    "x hidden": bad_dispatch("x: shape must be [rows, hidden=128]; got (4, 64)", x=torch.ones(T, 64)),
    "x strided": bad_dispatch("x: must be contiguous (call .contiguous()); got (1, 4)", x=torch.ones(H, T).T),
    "x too many": bad_dispatch(
        "x: must have at most low_latency_max_tokens=5 rows; got (6, 128)", x=torch.ones(6, H), topk_idx=IDX[:1]
    ),
    "x device": bad_dispatch("x: must be on a cpu device; got 'meta'", x=X.to("meta")),
    "idx missing": bad_dispatch(
        "topk_idx: must be a torch.Tensor (or give handle=); got 'NoneType'", InvalidTypeError, topk_idx=None
    ),
    "idx range": bad_dispatch(
        "topk_idx[1, 0]: must be in [-1, 4); got 4", topk_idx=torch.tensor([[0, 1], [4, 1], [0, 1], [0, 1]])
    ),
    "idx twice": bad_dispatch(
        "topk_idx[2]: must not name an expert twice in low-latency calls; got 3",
        topk_idx=torch.tensor([[0, 1], [-1, -1], [3, 3], [0, 1]]),
    ),
    "idx K": bad_dispatch(
        "topk_idx: shape must be [T=4, K] with 1 <= K <= num_topk=3; got (4, 4)", topk_idx=IDX.repeat(1, 2)
    ),
    "weights shape": bad_dispatch("topk_weights: shape must be (4, 2); got (4, 1)", topk_weights=WEIGHTS[:, :1]),
    "weights dtype": bad_dispatch(
        "topk_weights: dtype must be one of float32; got 'float64'", InvalidTypeError, topk_weights=WEIGHTS.double()
    ),
    "scales alone": bad_dispatch(
        "x_scales: goes with float8_e4m3fn rows only; got 'a tensor of shape (4, 1)'", x_scales=torch.ones(T, 1)
    ),
    "scales missing": bad_dispatch("x_scales: must be given with float8 rows; got None", x=FP8),
    "scales shape": bad_dispatch("x_scales: shape must be (4, 1); got (4, 2)", x=FP8, x_scales=torch.ones(T, 2)),
    "cast type": bad_dispatch("cast: must be a Float8Cast; got 'str'", InvalidTypeError, cast="float8"),
    "cast float8": bad_dispatch(
        f"x: {ROW_DTYPES} with cast=; got 'float8_e4m3fn'", InvalidTypeError, x=FP8, cast=Float8Cast()
    ),
    "layout": bad_dispatch(
        "layout: must be ExpertBlocks or ExpertMajor; got 'Padded'", InvalidTypeError, layout=Padded(4)
    ),
    "room of blocks": bad_dispatch(
        "max_recv_tokens: goes with layout=ExpertMajor(...) only; got 8", layout=ExpertBlocks(), max_recv_tokens=8
    ),
    "room 0": bad_dispatch("max_recv_tokens: must be >= 1; got 0", layout=ExpertMajor(), max_recv_tokens=0),
    "num_sms": bad_dispatch("num_sms: must be >= 1; got 0", num_sms=0),
    "hook and async": bad_dispatch(
        "async_op: goes without return_recv_hook, which sends at once; got True", async_op=True, return_recv_hook=True
    ),
    "hook type": bad_dispatch("return_recv_hook: must be a bool; got 'int'", InvalidTypeError, return_recv_hook=1),
    "after": bad_dispatch("after: must be a torch.cuda.Event; got 'int'", InvalidTypeError, after=1),
    "on_timeout": bad_dispatch("on_timeout: must be one of raise, mask; got 'skip'", on_timeout="skip"),
    "timeout_s 0": bad_dispatch("timeout_s: must be > 0; got 0", timeout_s=0),
    "timeout_s type": bad_dispatch(
        "timeout_s: must be a number of seconds; got 'str'", InvalidTypeError, timeout_s="1"
    ),
    "stats type": bad_dispatch("stats: must be a LowLatencyStats; got 'dict'", InvalidTypeError, stats={}),
    "stats shape": bad_dispatch(
        "stats.num_tokens_per_expert: shape must be (2,); got (4,)",
        stats=with_stats(num_tokens_per_expert=torch.zeros(4, dtype=torch.int64)),
    ),
    "stats dtype": bad_dispatch(
        "stats.wait_ns: dtype must be one of int64; got 'float32'",
        InvalidTypeError,
        stats=with_stats(wait_ns=torch.zeros(2)),
    ),
    "rows list": bad_combine("rows: must be a torch.Tensor; got 'list'", InvalidTypeError, rows=lambda r: r.tolist()),
    "rows float8": bad_combine(
        f"rows: {ROW_DTYPES}; got 'float8_e4m3fn'", InvalidTypeError, rows=lambda r: r.to(torch.float8_e4m3fn)
    ),
    "rows shape": bad_combine("rows: shape must be (2, 10, 128); got (20, 128)", rows=lambda r: r.view(20, H)),
    "rows strided": bad_combine(
        "rows: must be contiguous (call .contiguous()); got (128, 256, 1)",
        rows=lambda r: r.transpose(0, 1).contiguous().transpose(0, 1),
    ),
    "handle type": bad_combine("handle: must be a LowLatencyHandle; got 'str'", InvalidTypeError, handle="1"),
    "reduce": bad_combine("reduce: must be one of fast, exact; got 'expert_order'", reduce="expert_order"),
    "weights with fast": bad_combine(
        'topk_weights: goes with reduce="exact"; the experts\' ranks need them, so give them to low_latency_dispatch;'
        " got 'a tensor of shape (4, 2)'",
        topk_weights=WEIGHTS,
    ),
    "weights with exact": bad_combine(
        "topk_weights: shape must be (4, 2); got (4, 1)", topk_weights=WEIGHTS[:, :1], reduce="exact"
    ),
    "out shape": bad_combine("out: shape must be (4, 128); got (5, 128)", out=torch.zeros(5, H)),
    "out dtype": bad_combine(
        "out: dtype must be one of float32; got 'bfloat16'", InvalidTypeError, out=torch.zeros(T, H).bfloat16()
    ),
    "mask itself": BadCall(
        call=lambda buffer, got: buffer.mask_rank(1), message="rank: must be another rank, in [0, 2); got 1"
    ),
    "mask nobody": BadCall(
        call=lambda buffer, got: buffer.mask_rank(2), message="rank: must be another rank, in [0, 2); got 2"
    ),
    "mask type": BadCall(
        call=lambda buffer, got: buffer.mask_rank(None),
        message="rank: must be an int; got 'NoneType'",
        error=InvalidTypeError,
    ),
    "after on a CPU": bad_dispatch("after: must be a torch.cuda.Event; got 'str'", InvalidTypeError, after="now"),
}


def check_bad_calls(context: RankContext, transport: str) -> None:
    """Rank 1 alone makes each bad call; had anything been sent, ranks would be out of step."""
    world = World(CASE)
    with make_buffer(context, transport, CASE) as buffer, make_buffer(context, transport, CASE) as other:
        got = buffer.low_latency_dispatch(X, IDX)
        if context.rank == 1:
            for name, bad in BAD_CALLS.items():
                if name == "x device" and transport == "reference":
                    continue  # any device will do there, as long as it is one
                error = error_of(bad.error, lambda bad=bad: bad.call(buffer, got))
                assert str(error) == bad.message, (name, str(error))
            error = error_of(InvalidArgumentError, lambda: other.low_latency_combine(got.x, got.handle))
            assert str(error) == "handle: must come from a dispatch of this buffer; got 'a handle of another buffer'"
        step(buffer, world, context.rank)


def test_bad_calls(ranks: Ranks, transport: str) -> None:
    ranks.run(2, check_bad_calls, transport)


def check_mismatches(context: RankContext, transport: str) -> None:
    """All ranks raise, and the next operation is right."""
    rank, world = context.rank, World(CASE)
    odd = rank == 1
    with make_buffer(context, transport, CASE) as buffer:

        def differs(call: Callable[[], Any], field: str) -> None:
            error = error_of(MismatchError, call)
            assert (error.peer, error.field) == (1, field), str(error)
            step(buffer, world, rank)

        x, got = world.x[rank], buffer.low_latency_dispatch(X, IDX)
        differs(lambda: buffer.low_latency_dispatch(x.bfloat16() if odd else x, world.topk_idx[rank]), "dtype")
        differs(lambda: buffer.low_latency_dispatch(x, world.topk_idx[rank][:, : 2 + odd].contiguous()), "num_topk")
        reduce = "exact" if odd else "fast"
        differs(lambda: buffer.low_latency_combine(got.x.nan_to_num(), got.handle, reduce=reduce), "reduce")
        later = buffer.low_latency_dispatch(X, IDX)
        handle = (later if odd else got).handle
        differs(lambda: buffer.low_latency_combine(got.x.nan_to_num(), handle), "handle (dispatch number)")
        sent = (
            buffer.low_latency_combine(got.x.nan_to_num(), got.handle, return_recv_hook=True)
            if odd
            else buffer.low_latency_dispatch(X, IDX, return_recv_hook=True)
        )
        differs(sent.hook, "operation")
        error_of(HookError, sent.hook)
        bad = buffer.low_latency_dispatch(x.bfloat16() if odd else x, world.topk_idx[rank], return_recv_hook=True)
        error_of(MismatchError, bad.hook)
        error = error_of(InvalidArgumentError, lambda: buffer.low_latency_combine(bad.x.float(), bad.handle))
        assert "must come from a dispatch that was received" in str(error)


def test_mismatches(ranks: Ranks, transport: str) -> None:
    ranks.run(2, check_mismatches, transport)


SIZES = {"num_experts": 4, "hidden": 128, "num_topk": 3, "max_tokens": 5}


def check_sizes(context: RankContext, transport: str) -> None:
    """Rules of the room, on one rank and between ranks; calls of a buffer without room."""
    for name, value, rule in (
        ("low_latency_max_tokens", 1025, "must be 0 to 1024"),
        ("low_latency_max_tokens", -1, "must be 0 to 1024"),
        ("hidden", 100, "must be a multiple of 128 with low_latency_max_tokens"),
    ):
        sizes = {**SIZES, "low_latency_max_tokens": 5, name: value}
        error = error_of(InvalidArgumentError, lambda sizes=sizes: context.buffer(transport, **sizes))
        assert str(error) == f"{name}: {rule}; got {value}"
    error_of(InvalidTypeError, lambda: context.buffer(transport, **SIZES, low_latency_max_tokens=1.5))
    error = error_of(MismatchError, lambda: context.buffer(transport, **SIZES, low_latency_max_tokens=5 + context.rank))
    assert error.field == "low_latency_max_tokens"
    with context.buffer(transport, **SIZES) as buffer:
        error = error_of(InvalidArgumentError, lambda: buffer.low_latency_dispatch(X, IDX))
        rule = "must be given when the buffer is made, 1 or more, for low_latency_dispatch"
        assert str(error) == f"low_latency_max_tokens: {rule}; got 0"


def test_room(ranks: Ranks, transport: str) -> None:
    ranks.run(2, check_sizes, transport)
