"""What dispatch, combine and their low-latency forms check of single arguments: each names argument, value and rule."""

from __future__ import annotations

import torch

from .errors import InvalidArgumentError, InvalidTypeError
from .float8 import FLOAT8, SCALE_BLOCK, Float8Cast
from .transport import BufferGeometry

COMBINE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOPK_DTYPES = (torch.int64, torch.int32)
DISPATCH_DTYPES = (*COMBINE_DTYPES, FLOAT8)


def devices(wanted: torch.device | None, **tensors: object) -> None:
    """All given tensors are on this device (None: any, but all on one)."""
    index = -1 if wanted is None or wanted.index is None else wanted.index
    for name, value in tensors.items():
        if value is None or not isinstance(value, torch.Tensor):
            continue
        if value.is_cuda and value.get_device() == index:
            continue
        device = value.device
        if wanted is None:
            wanted = device
        elif device != wanted:
            where = "a cpu device" if wanted.type == "cpu" else str(wanted)
            raise InvalidArgumentError(name, str(device), f"must be on {where}")


def at_least_one(name: str, value: object) -> None:
    """An int of 1 or more."""
    if type(value) is not int:
        raise InvalidTypeError(name, type(value).__name__, "must be an int")
    if value < 1:
        raise InvalidArgumentError(name, value, "must be >= 1")


def names(dtypes: tuple[torch.dtype, ...]) -> str:
    """Dtypes in words."""
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def tensor(name: str, value: object, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> torch.Tensor:
    """A contiguous tensor of one of these dtypes and this shape."""
    # One line for what is right; the rest finds out what is not.
    if isinstance(value, torch.Tensor) and value.dtype in dtypes and value.shape == shape and value.is_contiguous():
        return value
    if not isinstance(value, torch.Tensor):
        raise InvalidTypeError(name, type(value).__name__, "must be a torch.Tensor")
    if value.dtype not in dtypes:
        rule = f"dtype must be one of {names(dtypes)}"
        raise InvalidTypeError(name, str(value.dtype).removeprefix("torch."), rule)
    if value.shape != shape:
        raise InvalidArgumentError(name, tuple(value.shape), f"shape must be {tuple(shape)}")
    raise InvalidArgumentError(name, value.stride(), "must be contiguous (call .contiguous())")


def rows(name: str, value: object, dtypes: tuple[torch.dtype, ...], hidden: int) -> torch.Tensor:
    """Contiguous ``[rows, hidden]`` of one of these dtypes."""
    if not isinstance(value, torch.Tensor):
        raise InvalidTypeError(name, type(value).__name__, "must be a torch.Tensor")
    shape = value.shape
    if len(shape) == 2 and shape[1] == hidden and value.dtype in dtypes and value.is_contiguous():
        return value
    if len(shape) != 2 or shape[1] != hidden:
        raise InvalidArgumentError(name, tuple(shape), f"shape must be [rows, hidden={hidden}]")
    return tensor(name, value, dtypes, shape)


def absent(rule: str, **arguments: object) -> None:
    """None of these arguments was given."""
    for name, value in arguments.items():
        if value is not None:
            shown = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else value
            raise InvalidArgumentError(name, shown, rule)


def topk_idx(value: object, num_tokens: int, geometry: BufferGeometry) -> torch.Tensor:
    """Routing ``[T, K]`` that a buffer has room for."""
    if not isinstance(value, torch.Tensor):
        raise InvalidTypeError("topk_idx", type(value).__name__, "must be a torch.Tensor (or give handle=)")
    shape = value.shape
    if len(shape) != 2 or shape[0] != num_tokens or not 1 <= shape[1] <= geometry.num_topk:
        rule = f"shape must be [T={num_tokens}, K] with 1 <= K <= num_topk={geometry.num_topk}"
        raise InvalidArgumentError("topk_idx", tuple(value.shape), rule)
    if value.dtype not in TOPK_DTYPES or not value.is_contiguous():
        tensor("topk_idx", value, TOPK_DTYPES, shape)
    in_range("topk_idx", value, -1, geometry.num_experts)
    return value


def in_range(name: str, value: torch.Tensor, low: int, high: int) -> None:
    """``low <= value < high`` everywhere. On a GPU it would stall the host; there the kernel looks."""
    if not value.is_cpu or value.numel() == 0:
        return
    smallest, largest = (int(v) for v in torch.aminmax(value))
    if smallest < low or largest >= high:
        bad = (value < low) | (value >= high)
        where = tuple(int(i) for i in bad.nonzero()[0])
        raise InvalidArgumentError(f"{name}{list(where)}", int(value[where]), f"must be in [{low}, {high})")


def cast(cast: object, x: torch.Tensor, x_scales: object, hidden: int) -> None:
    """A cast that goes with these rows."""
    if not isinstance(cast, Float8Cast):
        raise InvalidTypeError("cast", type(cast).__name__, "must be a Float8Cast")
    if x.dtype == FLOAT8:
        raise InvalidTypeError("x", "float8_e4m3fn", f"dtype must be one of {names(COMBINE_DTYPES)} with cast=")
    if hidden % SCALE_BLOCK:
        raise InvalidArgumentError("hidden", hidden, f"must be a multiple of {SCALE_BLOCK} for fp8 rows")
    absent("must be left out with cast=", x_scales=x_scales)


def scales(x: torch.Tensor, x_scales: object, hidden: int) -> None:
    """Scales that go with these float8 rows."""
    if hidden % SCALE_BLOCK:
        raise InvalidArgumentError("hidden", hidden, f"must be a multiple of {SCALE_BLOCK} for fp8 rows")
    if x_scales is None:
        raise InvalidArgumentError("x_scales", None, "must be given with float8 rows")
    tensor("x_scales", x_scales, (torch.float32,), (x.shape[0], hidden // SCALE_BLOCK))
