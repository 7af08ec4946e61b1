"""Ranks that call one collective in ways that do not fit: every rank gets the same error, and goes on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import check_still_works
from harness import RankContext, Ranks, error_of

from ray_deepep import Buffer, DispatchHandle, ExpertMajor, MismatchError, Padded

GEOMETRY = {"num_experts": 12, "hidden": 128, "num_topk": 3, "max_tokens": 5, "max_capacity": 6}
T, H, K = 4, 128, 2
X = torch.ones(T, H)
IDX = torch.tensor([[0, 1], [2, 3], [-1, 3], [1, 0]])
FP8 = X.to(torch.float8_e4m3fn)
SCALES = torch.ones(T, 1)
LOCATIONS = torch.arange(T * K, dtype=torch.int32).view(T, K) % 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mismatch:
    """Two ways to call one collective that do not fit each other; each gets the buffer and two handles."""

    usual: Callable[[Buffer, DispatchHandle, DispatchHandle], Any]
    odd: Callable[[Buffer, DispatchHandle, DispatchHandle], Any]
    field: str
    expected: str
    seen: str
    operation: str = "dispatch"


def dispatching(**arguments: Any) -> Callable[..., Any]:
    given = {"x": X, "topk_idx": IDX, **arguments}
    return lambda buffer, handle, other: buffer.dispatch(**given)


def combining(dtype: torch.dtype = torch.float32, **arguments: Any) -> Callable[..., Any]:
    return lambda buffer, handle, other: buffer.combine(
        torch.zeros(handle.num_rows, H, dtype=dtype), handle, **arguments
    )


def _carrying(buffer: Buffer, handle: DispatchHandle, other: DispatchHandle) -> Any:
    return buffer.combine(torch.zeros(handle.num_rows, H), handle, topk_weights=torch.zeros(handle.num_rows))


HANDLE = "handle (dispatch number)"
MISMATCHES = {
    "dtype": Mismatch(
        usual=dispatching(), odd=dispatching(x=X.half()), field="dtype", expected="float32", seen="float16"
    ),
    "float8": Mismatch(
        usual=dispatching(x=FP8, x_scales=SCALES),
        odd=dispatching(),
        field="dtype",
        expected="float8_e4m3fn",
        seen="float32",
    ),
    "num_topk": Mismatch(
        usual=dispatching(), odd=dispatching(topk_idx=IDX[:, :1].contiguous()), field="num_topk", expected="2", seen="1"
    ),
    "layout": Mismatch(
        usual=dispatching(),
        odd=dispatching(layout=ExpertMajor(4)),
        field="layout",
        expected="TokenMajor",
        seen="ExpertMajor",
    ),
    "alignment": Mismatch(
        usual=dispatching(layout=ExpertMajor(4)),
        odd=dispatching(layout=ExpertMajor(8)),
        field="layout.alignment",
        expected="4",
        seen="8",
    ),
    "capacity": Mismatch(
        usual=dispatching(layout=Padded(6), locations=LOCATIONS),
        odd=dispatching(layout=Padded(5), locations=LOCATIONS % 5),
        field="layout.capacity",
        expected="6",
        seen="5",
    ),
    "scale_by_weights": Mismatch(
        usual=dispatching(layout=ExpertMajor(4), scale_by_weights=True),
        odd=dispatching(layout=ExpertMajor(4)),
        field="scale_by_weights",
        expected="True",
        seen="False",
    ),
    "new plan and cached": Mismatch(
        usual=lambda buffer, handle, other: buffer.dispatch(X, handle=handle),
        odd=dispatching(layout=ExpertMajor(1)),
        field=HANDLE,
        expected="1",
        seen="0",
    ),
    "other handle": Mismatch(
        usual=lambda buffer, handle, other: buffer.dispatch(X, handle=handle),
        odd=lambda buffer, handle, other: buffer.dispatch(X, handle=other),
        field=HANDLE,
        expected="1",
        seen="2",
    ),
    "operation": Mismatch(
        usual=combining(),
        odd=dispatching(),
        field="operation",
        expected="combine",
        seen="dispatch",
        operation="combine",
    ),
    "combine dtype": Mismatch(
        usual=combining(),
        odd=combining(torch.bfloat16),
        field="dtype",
        expected="float32",
        seen="bfloat16",
        operation="combine",
    ),
    "combine handle": Mismatch(
        usual=lambda buffer, handle, other: combining()(buffer, other, handle),
        odd=combining(),
        field=HANDLE,
        expected="2",
        seen="1",
        operation="combine",
    ),
    "reduce": Mismatch(
        usual=combining(reduce="fast"),
        odd=combining(),
        field="reduce",
        expected="fast",
        seen="exact",
        operation="combine",
    ),
    "weighted": Mismatch(
        usual=combining(weighted=True),
        odd=combining(),
        field="weighted",
        expected="True",
        seen="False",
        operation="combine",
    ),
    "carried weights": Mismatch(
        usual=combining(), odd=_carrying, field="topk_weights", expected="False", seen="True", operation="combine"
    ),
    "combine_weights": Mismatch(
        usual=lambda buffer, handle, other: buffer.combine_weights(torch.zeros(handle.num_rows), handle),
        odd=combining(),
        field="operation",
        expected="combine_weights",
        seen="combine",
        operation="combine_weights",
    ),
}


def check_mismatch(context: RankContext, transport: str, name: str) -> tuple:
    mismatch, odd_rank = MISMATCHES[name], context.num_ranks - 1
    with context.buffer(transport, **GEOMETRY) as buffer:
        handle, other = (buffer.dispatch(X, IDX, layout=ExpertMajor(1)).handle for _ in range(2))
        call = mismatch.odd if context.rank == odd_rank else mismatch.usual
        # Twice: an error must not put ranks out of step.
        errors = [error_of(MismatchError, lambda: call(buffer, handle, other)) for _ in range(2)]
        check_still_works(buffer, context.rank)
    return [(error.operation, error.peer, error.field, error.expected, error.seen) for error in errors]


@pytest.mark.parametrize("num_ranks", (2, 3))
@pytest.mark.parametrize("name", MISMATCHES)
def test_mismatch_is_raised_on_every_rank(ranks: Ranks, transport: str, name: str, num_ranks: int) -> None:
    mismatch = MISMATCHES[name]
    want = (mismatch.operation, num_ranks - 1, mismatch.field, mismatch.expected, mismatch.seen)
    for rank, found in enumerate(ranks.run(num_ranks, check_mismatch, transport, name)):
        assert found == [want, want], f"rank {rank}"


def check_geometry_mismatch(context: RankContext, transport: str, name: str) -> str:
    geometry = dict(GEOMETRY)
    if context.rank == 1:
        geometry[name] *= 2
    error = error_of(MismatchError, lambda: context.buffer(transport, **geometry))
    with context.buffer(transport, **GEOMETRY) as buffer:
        check_still_works(buffer, context.rank)
    return str(error)


@pytest.mark.parametrize("name", GEOMETRY)
def test_geometry_mismatch(ranks: Ranks, transport: str, name: str) -> None:
    usual = GEOMETRY[name]
    message = f"allocate: rank 1 passed {name}={2 * usual}, rank 0 passed {name}={usual}"
    assert ranks.run(2, check_geometry_mismatch, transport, name) == [message, message]
