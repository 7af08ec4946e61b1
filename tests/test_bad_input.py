"""Bad input: a typed error that names the argument, the value and the rule, before anything is sent.

Rank 1 alone makes the bad call; then all ranks use the buffer. Had anything been sent, they would be out of step.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import PADDED, Case, assert_dispatched, check_still_works, dispatch, make_world
from harness import RankContext, Ranks, error_of

from ray_deepep import (
    Buffer,
    ClosedError,
    CommConfig,
    DispatchHandle,
    ExpertMajor,
    InvalidArgumentError,
    InvalidTypeError,
    Padded,
    TokenMajor,
    env,
)

GEOMETRY = {"num_experts": 4, "hidden": 128, "num_topk": 3, "max_tokens": 5, "max_capacity": 6}
T, H, K = 4, 128, 2
X = torch.ones(T, H)
IDX = torch.tensor([[0, 1], [2, 3], [-1, 3], [1, 0]])
WEIGHTS = torch.ones(T, K)
FP8 = X.to(torch.float8_e4m3fn)
SCALES = torch.ones(T, 1)
LOCATIONS = torch.arange(T * K, dtype=torch.int32).view(T, K) % 6


def token_major(buffer: Buffer) -> DispatchHandle:
    return buffer.dispatch(X, IDX, WEIGHTS).handle


def expert_major(buffer: Buffer) -> DispatchHandle:
    return buffer.dispatch(X, IDX, WEIGHTS, layout=ExpertMajor(8)).handle


@dataclasses.dataclass(frozen=True, kw_only=True)
class BadCall:
    """One broken rule."""

    call: Callable[[Buffer, DispatchHandle], Any]
    argument: str
    message: str
    """What follows the argument's name."""
    error: type[Exception] = InvalidArgumentError
    handle: Callable[[Buffer], DispatchHandle] = token_major
    """A dispatch of all ranks before the bad call."""


def bad_dispatch(
    argument: str, message: str, error: type[Exception] = InvalidArgumentError, **arguments: Any
) -> BadCall:
    """A dispatch with some arguments replaced."""
    given = {"x": X, "topk_idx": IDX, **arguments}
    return BadCall(
        call=lambda buffer, handle: buffer.dispatch(**given), argument=argument, message=message, error=error
    )


def bad_cached(argument: str, message: str, **arguments: Any) -> BadCall:
    """A cached dispatch with arguments that do not go with it."""
    given = {"x": X, **arguments}
    return BadCall(
        call=lambda buffer, handle: buffer.dispatch(handle=handle, **given), argument=argument, message=message
    )


def bad_combine(
    argument: str,
    message: str,
    error: type[Exception] = InvalidArgumentError,
    handle: Callable[[Buffer], DispatchHandle] = expert_major,
    rows: Callable[[torch.Tensor], Any] = lambda rows: rows,
    **arguments: Any,
) -> BadCall:
    """A combine of rows changed by ``rows``."""

    def call(buffer: Buffer, given: DispatchHandle) -> Any:
        return buffer.combine(rows(torch.zeros(given.num_rows, H)), given, **arguments)

    return BadCall(call=call, argument=argument, message=message, error=error, handle=handle)


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


def check_bad_call(context: RankContext, transport: str, name: str) -> None:
    bad = BAD_CALLS[name]
    with context.buffer(transport, **GEOMETRY) as buffer:
        handle = bad.handle(buffer)
        if context.rank == 1:
            error = error_of(bad.error, lambda: bad.call(buffer, handle))
            assert str(error) == f"{bad.argument}: {bad.message}", str(error)
            assert error.argument == bad.argument
        check_still_works(buffer, context.rank)


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_call(ranks: Ranks, transport: str, name: str) -> None:
    ranks.run(2, check_bad_call, transport, name)


def check_float8_needs_whole_blocks(context: RankContext, transport: str) -> None:
    geometry = {**GEOMETRY, "hidden": 100}
    x = torch.ones(T, 100).to(torch.float8_e4m3fn)
    with context.buffer(transport, **geometry) as buffer:
        error = error_of(InvalidArgumentError, lambda: buffer.dispatch(x, IDX, x_scales=SCALES))
    assert str(error) == "hidden: must be a multiple of 128 for fp8 rows; got 100"


def test_float8_needs_whole_blocks(ranks: Ranks, transport: str) -> None:
    ranks.run(2, check_float8_needs_whole_blocks, transport)


BAD_SIZES = {
    "num_experts": (3, "must be a positive multiple of the 2 ranks; got 3"),
    "hidden": (0, "must be >= 1; got 0"),
    "num_topk": (33, "must be 1 to 32; got 33"),
    "max_tokens": (-1, "must be >= 0; got -1"),
    "max_capacity": (-1, "must be >= 0; got -1"),
}


def check_bad_size(context: RankContext, transport: str, name: str) -> None:
    value, message = BAD_SIZES[name]
    if context.rank == 1:
        error = error_of(InvalidArgumentError, lambda: context.buffer(transport, **{**GEOMETRY, name: value}))
        assert str(error) == f"{name}: {message}", str(error)
    with context.buffer(transport, **GEOMETRY) as buffer:
        check_still_works(buffer, context.rank)


@pytest.mark.parametrize("name", BAD_SIZES)
def test_bad_size(ranks: Ranks, transport: str, name: str) -> None:
    ranks.run(2, check_bad_size, transport, name)


@pytest.mark.parametrize(
    ("make", "message"),
    (
        (lambda: ExpertMajor(0), "alignment: must be >= 1; got 0"),
        (lambda: Padded(-1), "capacity: must be >= 0; got -1"),
        (lambda: CommConfig(transport="tcp"), "transport: must be one of auto, cuda, shm, reference; got 'tcp'"),
        (lambda: CommConfig(deadline_s=0.0), "deadline_s: must be > 0; got 0.0"),
        (lambda: CommConfig(bootstrap_deadline_s=-1), "bootstrap_deadline_s: must be > 0; got -1"),
        (lambda: CommConfig(heap_gib=0), "heap_gib: must be > 0; got 0"),
        (lambda: CommConfig(num_threads=-1), "num_threads: must be >= 0; got -1"),
        (lambda: CommConfig(deadline_s=float("nan")), "deadline_s: must be > 0; got nan"),
    ),
)
def test_bad_settings(make: Callable[[], Any], message: str) -> None:
    assert str(error_of(InvalidArgumentError, make)) == message


BAD_ENVIRONMENT = {
    "RAY_DEEPEP": ("yes", env.enabled, "must be 0 or 1"),
    "RAY_DEEPEP_TRANSPORT": ("tcp", CommConfig, "must be auto, cuda, shm or reference"),
    "RAY_DEEPEP_DEADLINE_S": ("0", CommConfig, "must be a positive number of seconds"),
    "RAY_DEEPEP_BOOTSTRAP_DEADLINE_S": ("soon", CommConfig, "must be a positive number of seconds"),
    "RAY_DEEPEP_NUM_THREADS": ("1.5", CommConfig, "must be an integer >= 0"),
    "RAY_DEEPEP_HEAP_GIB": ("-1", CommConfig, "must be a positive number of GiB"),
    "RAY_DEEPEP_LAYOUT": ("dense", env.layout, "must be padded or compact"),
    "RAY_DEEPEP_COMBINE": ("quick", env.combine, "must be exact or fast"),
}


@pytest.mark.parametrize("name", BAD_ENVIRONMENT)
def test_bad_environment(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    value, read, rule = BAD_ENVIRONMENT[name]
    monkeypatch.setenv(name, value)
    assert str(error_of(InvalidArgumentError, read)) == f"{name}: {rule}; got {value!r}"
    monkeypatch.setenv(name, "")
    read()


def check_handle_of_another_buffer(context: RankContext, transport: str) -> None:
    with context.buffer(transport, **GEOMETRY) as first, context.buffer(transport, **GEOMETRY) as second:
        handle = token_major(first)
        rows = torch.zeros(handle.num_rows, H)
        calls = [
            lambda: second.dispatch(X, handle=handle),
            lambda: second.combine(rows, handle),
            lambda: second.combine_weights(torch.zeros(handle.num_recv_tokens, K), handle),
        ]
        for call in calls:
            if context.rank == 0:
                error = error_of(InvalidArgumentError, call)
                assert (
                    str(error) == "handle: must come from a dispatch of this buffer; got 'a handle of another buffer'"
                )
        check_still_works(second, context.rank)
        first.combine(rows, handle)


def test_handle_of_another_buffer(ranks: Ranks, transport: str) -> None:
    ranks.run(2, check_handle_of_another_buffer, transport)


def check_handle_of_a_freed_buffer(context: RankContext, transport: str) -> None:
    """A handle outlives its buffer, and a new buffer may take the old one's place in memory."""
    buffer = context.buffer(transport, **GEOMETRY)
    handle = token_major(buffer)
    buffer.close()
    del buffer
    for _ in range(10):
        check_handle_is_refused(context, transport, handle)


def check_handle_is_refused(context: RankContext, transport: str, handle: DispatchHandle) -> None:
    with context.buffer(transport, **GEOMETRY) as buffer:
        error = error_of(InvalidArgumentError, lambda: buffer.dispatch(X, handle=handle))
        assert error.argument == "handle"


def test_handle_of_a_freed_buffer(ranks: Ranks, transport: str) -> None:
    ranks.run(2, check_handle_of_a_freed_buffer, transport)


def check_calls_after_close(context: RankContext, transport: str) -> None:
    buffer = context.buffer(transport, **GEOMETRY)
    handle = token_major(buffer)
    rows = torch.zeros(handle.num_rows, H)
    buffer.close()
    buffer.close()
    assert buffer.closed
    calls = {
        "dispatch": lambda: buffer.dispatch(X, IDX),
        "combine": lambda: buffer.combine(rows, handle),
        "combine_weights": lambda: buffer.combine_weights(torch.zeros(handle.num_recv_tokens, K), handle),
    }
    for name, call in calls.items():
        assert str(error_of(ClosedError, call)) == f"{name}: the buffer is closed"
    with context.buffer(transport, **GEOMETRY) as another:
        check_still_works(another, context.rank)


def test_calls_after_close(ranks: Ranks, transport: str) -> None:
    ranks.run(2, check_calls_after_close, transport)


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


def check_padded_without_room(context: RankContext, transport: str) -> None:
    """Capacity 0 is allowed when nothing is routed."""
    case = Case(seed=3, num_tokens=(4, 2), num_experts=4, hidden=H, num_topk=2, layout=PADDED, routing="dropped")
    world = make_world(case)
    assert world.layout == Padded(0)
    with context.buffer(transport, **GEOMETRY) as buffer:
        assert_dispatched(dispatch(buffer, world, context.rank), world, context.rank)


def test_padded_without_room(ranks: Ranks, transport: str) -> None:
    ranks.run(2, check_padded_without_room, transport)
