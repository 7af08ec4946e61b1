"""Broken rules, and how they are tried: rank 1 alone makes the bad call; then all ranks use the buffer.

Had anything been sent, they would be out of step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from cases import check_still_works
from harness import RankContext, error_of

from ray_deepep import Buffer, DispatchHandle, ExpertMajor, InvalidArgumentError

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


def check_bad_call(context: RankContext, transport: str, bad: BadCall) -> None:
    """The error on rank 1, word for word, and that it did no harm."""
    with context.buffer(transport, **GEOMETRY) as buffer:
        handle = bad.handle(buffer)
        if context.rank == 1:
            error = error_of(bad.error, lambda: bad.call(buffer, handle))
            assert str(error) == f"{bad.argument}: {bad.message}", str(error)
            assert error.argument == bad.argument
        check_still_works(buffer, context.rank)
