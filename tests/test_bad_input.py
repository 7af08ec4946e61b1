"""Bad sizes, settings, environment and handles: a typed error that names the argument, the value and the rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bad_calls import GEOMETRY, IDX, H, K, X, token_major
from cases import PADDED, Case, assert_dispatched, check_still_works, dispatch, make_world
from harness import RankContext, Ranks, error_of

from ray_deepep import (
    ClosedError,
    CommConfig,
    DispatchHandle,
    ExpertMajor,
    Float8Cast,
    InvalidArgumentError,
    InvalidTypeError,
    NvshmemConfig,
    Padded,
    TokenMajor,
    env,
)
from ray_deepep.transport import BufferGeometry

BAD_SIZES = {
    "num_experts": (3, "must be a positive multiple of the 2 ranks; got 3"),
    "hidden": (0, "must be >= 1; got 0"),
    "num_topk": (33, "must be 1 to 32; got 33"),
    "max_tokens": (-1, "must be >= 0; got -1"),
    "max_capacity": (-1, "must be >= 0; got -1"),
    "max_rows": (4, "must be left out with max_capacity; got 4"),
    "max_element_size": (8, "must be 1, 2 or 4; got 8"),
}


def check_bad_size(context: RankContext, transport: str, name: str) -> None:
    value, message = BAD_SIZES[name]
    if context.rank == 1:
        error = error_of(InvalidArgumentError, lambda: context.buffer(transport, **{**GEOMETRY, name: value}))
        assert str(error) == f"{name}: {message}", str(error)
    with context.buffer(transport, **GEOMETRY) as buffer:
        check_still_works(buffer, context.rank)


def check_limits(context: RankContext, transport: str) -> None:
    """What a buffer with less room refuses before anything is sent, and what it still does."""
    sizes = {**GEOMETRY, "max_capacity": 0, "max_rows": 12, "max_element_size": 2}
    x, weights = X.bfloat16(), torch.ones(IDX.shape)
    with context.buffer(transport, **sizes) as buffer:
        result = buffer.dispatch(x, IDX, weights, max_recv_tokens=12)
        calls = {
            "x: elements must have at most the buffer's max_element_size of 2 bytes; got 'float32'": lambda: (
                buffer.dispatch(X, IDX)
            ),
            "rows: elements must have at most the buffer's max_element_size of 2 bytes; got 'float32'": lambda: (
                buffer.combine(result.x.float(), result.handle)
            ),
            "max_recv_tokens: must be at most the buffer's max_rows of 12; got 13": lambda: buffer.dispatch(
                x, IDX, weights, max_recv_tokens=13
            ),
        }
        for message, call in calls.items():
            if context.rank == 1:
                assert str(error_of((InvalidArgumentError, InvalidTypeError), call)) == message
        home = buffer.combine(result.x, result.handle).x
        needed = (IDX >= 0).sum(1, keepdim=True) > 0
        assert torch.equal(home.float() != 0, needed & (x != 0))


def test_a_buffer_with_less_room(ranks: Ranks, transport: str) -> None:
    ranks.run(2, check_limits, transport)


def test_max_rows_is_a_number(ranks: Ranks, transport: str) -> None:
    ranks.run(1, check_max_rows, transport)


def check_max_rows(context: RankContext, transport: str) -> None:
    sizes = {**GEOMETRY, "max_capacity": 0}
    error = error_of(InvalidArgumentError, lambda: context.buffer(transport, **sizes, max_rows=0))
    assert str(error) == "max_rows: must be >= 1; got 0"


@pytest.mark.parametrize("name", BAD_SIZES)
def test_bad_size(ranks: Ranks, transport: str, name: str) -> None:
    ranks.run(2, check_bad_size, transport, name)


BAD_NUMBERS = (
    ("num_experts", 4.0, InvalidTypeError, "must be an int; got 'float'"),
    ("hidden", "128", InvalidTypeError, "must be an int; got 'str'"),
    ("max_tokens", None, InvalidTypeError, "must be an int; got 'NoneType'"),
    ("max_rows", True, InvalidTypeError, "must be an int; got 'bool'"),
    ("num_experts", 2**40, InvalidArgumentError, "must be < 2**31; got 1099511627776"),
    ("hidden", 2**70, InvalidArgumentError, "must be < 2**31; got 1180591620717411303424"),
    ("symm_bytes", 2**63, InvalidArgumentError, "must be < 2**63; got 9223372036854775808"),
)


@pytest.mark.parametrize(("name", "value", "kind", "message"), BAD_NUMBERS)
def test_sizes_are_ints_that_cores_can_hold(name: str, value: Any, kind: type[Exception], message: str) -> None:
    error = error_of(kind, lambda: BufferGeometry(**{**GEOMETRY, name: value}))
    assert str(error) == f"{name}: {message}"


@pytest.mark.parametrize(
    ("make", "message"),
    (
        (lambda: ExpertMajor(0), "alignment: must be >= 1; got 0"),
        (lambda: Padded(-1), "capacity: must be >= 0; got -1"),
        (
            lambda: CommConfig(transport="tcp"),
            "transport: must be one of auto, cuda, nvshmem, shm, reference; got 'tcp'",
        ),
        (lambda: CommConfig(deadline_s=0.0), "deadline_s: must be > 0; got 0.0"),
        (lambda: CommConfig(bootstrap_deadline_s=-1), "bootstrap_deadline_s: must be > 0; got -1"),
        (lambda: CommConfig(heap_gib=0), "heap_gib: must be > 0; got 0"),
        (lambda: CommConfig(low_latency_num_sms=-1), "low_latency_num_sms: must be >= 0; got -1"),
        (lambda: CommConfig(num_threads=-1), "num_threads: must be >= 0; got -1"),
        (lambda: CommConfig(deadline_s=float("nan")), "deadline_s: must be > 0; got nan"),
        (lambda: CommConfig(deadline_s=float("inf")), "deadline_s: must be at most 1e+07; got inf"),
        (lambda: CommConfig(heap_gib=1e300), "heap_gib: must be at most 1e+06; got 1e+300"),
    ),
)
def test_bad_settings(make: Callable[[], Any], message: str) -> None:
    assert str(error_of(InvalidArgumentError, make)) == message


@pytest.mark.parametrize(
    ("make", "message"),
    (
        (lambda: CommConfig(deadline_s="5"), "deadline_s: must be a number; got '5'"),
        (lambda: CommConfig(heap_gib=None), "heap_gib: must be a number; got None"),
        (lambda: CommConfig(num_sms=1.5), "num_sms: must be an int; got 1.5"),
        (lambda: CommConfig(num_threads=True), "num_threads: must be an int; got True"),
        (lambda: CommConfig(allow_shared_gpus="no"), "allow_shared_gpus: must be a bool; got 'no'"),
        (lambda: CommConfig(time_gpu_calls=1), "time_gpu_calls: must be a bool; got 1"),
        (lambda: CommConfig(transport=3), "transport: must be a str; got 3"),
        (lambda: CommConfig(heap_provider=None), "heap_provider: must be a str; got None"),
        (lambda: ExpertMajor(1.5), "alignment: must be an int; got 1.5"),
        (lambda: ExpertMajor("8"), "alignment: must be an int; got '8'"),
        (lambda: ExpertMajor(True), "alignment: must be an int; got True"),
        (lambda: Padded(None), "capacity: must be an int; got None"),
        (lambda: Float8Cast(scale_format=8), "scale_format: must be a str; got 8"),
        (lambda: NvshmemConfig(qp_depth="8"), "qp_depth: must be an int or None; got '8'"),
        (lambda: CommConfig(nvshmem=[]), "nvshmem: must be an NvshmemConfig; got []"),
    ),
)
def test_settings_of_another_type(make: Callable[[], Any], message: str) -> None:
    assert str(error_of(InvalidTypeError, make)) == message


@pytest.mark.parametrize(
    "make",
    (
        NvshmemConfig,
        CommConfig,
        TokenMajor,
        lambda **fields: ExpertMajor(1, **fields),
        lambda **fields: Padded(1, **fields),
        Float8Cast,
        lambda **fields: CommConfig(nvshmem=fields),
    ),
)
def test_fields_that_are_not_known(make: Callable[..., Any]) -> None:
    error = error_of(InvalidTypeError, lambda: make(unknown=3))
    assert error.argument == "unknown" and error.value == 3 and "has no such field, only" in error.rule


BAD_ENVIRONMENT = {
    "RAY_DEEPEP": ("yes", env.enabled, "must be 0 or 1"),
    "RAY_DEEPEP_TRANSPORT": ("tcp", CommConfig, "must be auto, cuda, nvshmem, shm or reference"),
    "RAY_DEEPEP_DEADLINE_S": ("0", CommConfig, "must be a positive number of seconds"),
    "RAY_DEEPEP_BOOTSTRAP_DEADLINE_S": ("soon", CommConfig, "must be a positive number of seconds"),
    "RAY_DEEPEP_NUM_THREADS": ("1.5", CommConfig, "must be an integer >= 0"),
    "RAY_DEEPEP_NUM_SMS": ("0", CommConfig, "must be an integer >= 1"),
    "RAY_DEEPEP_BULK_COPY": ("2", env.bulk_copy, "must be 0 or 1"),
    "RAY_DEEPEP_DEVICE_HEAP_GIB": ("inf", CommConfig, "must be a positive number of GiB"),
    "RAY_DEEPEP_HEAP_GIB": ("-1", CommConfig, "must be a positive number of GiB"),
    "RAY_DEEPEP_LAYOUT": ("dense", env.layout, "must be padded or compact"),
    "RAY_DEEPEP_COMBINE": ("quick", env.combine, "must be auto, exact or fast"),
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


def check_padded_without_room(context: RankContext, transport: str) -> None:
    """Capacity 0 is allowed when nothing is routed."""
    case = Case(seed=3, num_tokens=(4, 2), num_experts=4, hidden=H, num_topk=2, layout=PADDED, routing="dropped")
    world = make_world(case)
    assert world.layout == Padded(0)
    with context.buffer(transport, **GEOMETRY) as buffer:
        assert_dispatched(dispatch(buffer, world, context.rank), world, context.rank)


def test_padded_without_room(ranks: Ranks, transport: str) -> None:
    ranks.run(2, check_padded_without_room, transport)
