"""Argument checks of dispatch and combine: whole calls are judged here, before anything is sent."""

from __future__ import annotations

import torch

from . import argument_checks as argument
from .errors import InvalidArgumentError, InvalidTypeError
from .float8 import FLOAT8
from .handle import DispatchHandle, ExpertMajor, Layout, Padded, TokenMajor
from .transport import REDUCE_MODES, BufferGeometry, CombineRequest, DispatchRequest

MAX_TOPK = 32
TOKEN_MAJOR = TokenMajor()


def geometry(geometry: BufferGeometry, num_ranks: int) -> None:
    """Check a buffer's sizes."""
    if geometry.num_experts < 1 or geometry.num_experts % num_ranks:
        raise InvalidArgumentError(
            "num_experts", geometry.num_experts, f"must be a positive multiple of the {num_ranks} ranks"
        )
    if geometry.hidden < 1:
        raise InvalidArgumentError("hidden", geometry.hidden, "must be >= 1")
    if not 1 <= geometry.num_topk <= MAX_TOPK:
        raise InvalidArgumentError("num_topk", geometry.num_topk, f"must be 1 to {MAX_TOPK}")
    if geometry.max_tokens < 0:
        raise InvalidArgumentError("max_tokens", geometry.max_tokens, "must be >= 0")
    if geometry.max_capacity < 0:
        raise InvalidArgumentError("max_capacity", geometry.max_capacity, "must be >= 0")
    if geometry.symm_bytes < 0:
        raise InvalidArgumentError("symm_bytes", geometry.symm_bytes, "must be >= 0")
    if geometry.max_element_size not in (1, 2, 4):
        raise InvalidArgumentError("max_element_size", geometry.max_element_size, "must be 1, 2 or 4")
    if geometry.max_rows is not None:
        argument.at_least_one("max_rows", geometry.max_rows)
        if geometry.max_capacity:
            raise InvalidArgumentError("max_rows", geometry.max_rows, "must be left out with max_capacity")


def _element_size(name: str, dtype: torch.dtype, geometry: BufferGeometry) -> None:
    if dtype.itemsize > geometry.max_element_size:
        rule = f"elements must have at most the buffer's max_element_size of {geometry.max_element_size} bytes"
        raise InvalidTypeError(name, str(dtype).removeprefix("torch."), rule)


def call_options(num_sms: object, after: object) -> None:
    """What says how a call runs, not what it does."""
    if num_sms is not None:
        argument.at_least_one("num_sms", num_sms)
    if after is not None and not isinstance(after, torch.cuda.Event):
        raise InvalidTypeError("after", type(after).__name__, "must be a torch.cuda.Event")


def symm_rows(num_rows: object, dtype: object) -> None:
    """Arguments of ``Buffer.symm_empty``."""
    if type(num_rows) is not int:
        raise InvalidTypeError("num_rows", type(num_rows).__name__, "must be an int")
    if num_rows < 0:
        raise InvalidArgumentError("num_rows", num_rows, "must be >= 0")
    if dtype not in argument.DISPATCH_DTYPES:
        raise InvalidTypeError("dtype", str(dtype), f"must be one of {argument.names(argument.DISPATCH_DTYPES)}")


def handle(handle: object, owner: int) -> DispatchHandle:
    """Check that a handle belongs to the buffer with identity ``owner``."""
    if not isinstance(handle, DispatchHandle):
        raise InvalidTypeError("handle", type(handle).__name__, "must be a DispatchHandle")
    if handle.owner != owner:
        raise InvalidArgumentError("handle", "a handle of another buffer", "must come from a dispatch of this buffer")
    return handle


# The keyword ``handle`` of the requests below hides the function of that name.
_check_handle = handle


def row_weights(value: object, handle: DispatchHandle) -> torch.Tensor:
    """Check numbers that travel beside the rows of ``handle``."""
    token_major = isinstance(handle.layout, TokenMajor)
    shape = (handle.num_recv_tokens, handle.num_topk) if token_major else (handle.num_rows,)
    return argument.tensor("topk_weights", value, (torch.float32,), shape)


def _layout(layout: Layout | None, locations: object, topk_idx: torch.Tensor, geometry: BufferGeometry) -> Layout:
    if layout is None:
        layout = TOKEN_MAJOR
    if isinstance(layout, (TokenMajor, ExpertMajor)):
        if locations is not None:
            argument.absent("goes with layout=Padded(capacity) only", locations=locations)
        return layout
    if not isinstance(layout, Padded):
        raise InvalidTypeError("layout", type(layout).__name__, "must be TokenMajor, ExpertMajor or Padded")
    if layout.capacity > geometry.max_capacity:
        raise InvalidArgumentError(
            "layout.capacity", layout.capacity, f"must be <= max_capacity={geometry.max_capacity}"
        )
    if locations is None:
        raise InvalidArgumentError("locations", None, "must be given with layout=Padded(capacity)")
    locations = argument.tensor("locations", locations, (torch.int32,), topk_idx.shape)
    if locations.is_cpu:
        _locations_in_range(locations, topk_idx >= 0, layout.capacity)
    return layout


def _locations_in_range(locations: torch.Tensor, routed: torch.Tensor, capacity: int) -> None:
    """Beside -1 anything may stand; with capacity 0 that is all there may be. As in ``_in_range``, not on GPUs."""
    bad = routed & ((locations < 0) | (locations >= capacity))
    if bool(bad.any()):
        where = tuple(int(i) for i in bad.nonzero()[0])
        raise InvalidArgumentError(f"locations{list(where)}", int(locations[where]), f"must be in [0, {capacity})")


def _room(max_recv_tokens: object, layout: Layout) -> None:
    argument.at_least_one("max_recv_tokens", max_recv_tokens)
    if isinstance(layout, Padded):
        rule = "goes with token-major and expert-major rows; a padded layout has fixed shapes anyway"
        raise InvalidArgumentError("max_recv_tokens", max_recv_tokens, rule)


def _sent_rows(x: object, x_scales: object, cast: object, geometry: BufferGeometry) -> torch.Tensor:
    x = argument.rows("x", x, argument.DISPATCH_DTYPES, geometry.hidden)
    if x.shape[0] > geometry.max_tokens:
        raise InvalidArgumentError("x", tuple(x.shape), f"must have at most max_tokens={geometry.max_tokens} rows")
    if cast is not None:
        argument.cast(cast, x, x_scales, geometry.hidden)
    elif x.dtype == FLOAT8:
        argument.scales(x, x_scales, geometry.hidden)
    elif x_scales is not None:
        argument.absent("goes with float8_e4m3fn rows only", x_scales=x_scales)
    return x


def dispatch_request(
    geometry: BufferGeometry,
    *,
    x: object,
    topk_idx: object,
    topk_weights: object,
    x_scales: object,
    layout: Layout | None,
    locations: object,
    handle: object,
    owner: int,
    scale_by_weights: bool,
    max_recv_tokens: object,
    cast: object,
    num_sms: int | None,
) -> DispatchRequest:
    """Check the arguments of ``Buffer.dispatch`` and put them in the form that transports take."""
    x = _sent_rows(x, x_scales, cast, geometry)
    _element_size("x", x.dtype if cast is None else FLOAT8, geometry)
    num_tokens = x.shape[0]
    if handle is not None:
        rule = "must be left out with handle="
        argument.absent(rule, topk_idx=topk_idx, topk_weights=topk_weights, layout=layout, locations=locations)
        argument.absent(rule, max_recv_tokens=max_recv_tokens)
        handle = _check_handle(handle, owner)
        layout, max_recv_tokens = handle.layout, handle.max_recv_tokens
        if num_tokens != handle.num_tokens:
            raise InvalidArgumentError("x", tuple(x.shape), f"must have the handle's {handle.num_tokens} tokens")
    else:
        topk_idx = argument.topk_idx(topk_idx, num_tokens, geometry)
        if topk_weights is not None:
            topk_weights = argument.tensor("topk_weights", topk_weights, (torch.float32,), topk_idx.shape)
        layout = _layout(layout, locations, topk_idx, geometry)
        if max_recv_tokens is not None:
            _room(max_recv_tokens, layout)
            if geometry.max_rows is not None and max_recv_tokens > geometry.max_rows:
                rule = f"must be at most the buffer's max_rows of {geometry.max_rows}"
                raise InvalidArgumentError("max_recv_tokens", max_recv_tokens, rule)
    if scale_by_weights and (isinstance(layout, TokenMajor) or x.dtype == FLOAT8 or cast is not None):
        raise InvalidArgumentError("scale_by_weights", True, "needs one row per route and rows that are not float8")
    return DispatchRequest(
        x=x,
        x_scales=x_scales,
        topk_idx=topk_idx,
        topk_weights=topk_weights,
        locations=locations,
        layout=layout,
        handle=handle,
        scale_by_weights=scale_by_weights,
        max_recv_tokens=max_recv_tokens,
        cast=cast,
        num_sms=num_sms,
    )


def expert_rows(geometry: BufferGeometry, blocks: object, *, handle: object, owner: int) -> None:
    """Check the blocks of ``Buffer.combine_experts``."""
    handle = _check_handle(handle, owner)
    if isinstance(handle.layout, TokenMajor) or handle.max_recv_tokens is not None:
        rule = "must be of an expert-major or padded dispatch without max_recv_tokens"
        shown = "token-major" if isinstance(handle.layout, TokenMajor) else f"max_recv_tokens={handle.max_recv_tokens}"
        raise InvalidArgumentError("handle", shown, rule)
    if not isinstance(blocks, (tuple, list)):
        raise InvalidTypeError("expert_rows", type(blocks).__name__, "must be a tuple or list of tensors")
    sizes = handle.expert_sizes
    if len(blocks) != len(sizes):
        rule = f"must have one tensor for each of the {len(sizes)} local experts"
        raise InvalidArgumentError("expert_rows", len(blocks), rule)
    for i, (block, size) in enumerate(zip(blocks, sizes)):
        argument.rows(f"expert_rows[{i}]", block, argument.COMBINE_DTYPES, geometry.hidden)
        _element_size(f"expert_rows[{i}]", block.dtype, geometry)
        if block.shape[0] != size:
            rule = f"must have the {size} rows of its expert"
            raise InvalidArgumentError(f"expert_rows[{i}]", tuple(block.shape), rule)
        if block.dtype != blocks[0].dtype or block.device != blocks[0].device:
            rule = f"must be like expert_rows[0], {argument.names((blocks[0].dtype,))} on {blocks[0].device}"
            raise InvalidTypeError(f"expert_rows[{i}]", f"{argument.names((block.dtype,))} on {block.device}", rule)


# The keyword ``expert_rows`` of the request below hides it.
def combine_request(
    geometry: BufferGeometry,
    *,
    rows: object,
    expert_rows: tuple[torch.Tensor, ...],
    handle: object,
    owner: int,
    topk_weights: object,
    weighted: bool,
    reduce: str,
    keep_routes: bool,
    bias: object,
    num_sms: int | None,
) -> CombineRequest:
    """Check the arguments of ``Buffer.combine``."""
    handle = _check_handle(handle, owner)
    if not expert_rows:
        rows = argument.rows("rows", rows, argument.COMBINE_DTYPES, geometry.hidden)
        _element_size("rows", rows.dtype, geometry)
    if rows is not None and rows.shape[0] != handle.num_rows:
        raise InvalidArgumentError("rows", tuple(rows.shape), f"must have the handle's {handle.num_rows} rows")
    if reduce not in REDUCE_MODES:
        raise InvalidArgumentError("reduce", reduce, f"must be one of {', '.join(REDUCE_MODES)}")
    token_major = isinstance(handle.layout, TokenMajor)
    if weighted and token_major:
        raise InvalidArgumentError("weighted", True, "needs one row per route; token-major rows are already reduced")
    if keep_routes and (token_major or reduce == "fast"):
        raise InvalidArgumentError("keep_routes", True, "needs one row per route and a reduction at the source")
    if topk_weights is not None:
        topk_weights = row_weights(topk_weights, handle)
    if bias is not None:
        dtype = (expert_rows[0] if expert_rows else rows).dtype
        bias = argument.tensor("bias", bias, (dtype,), (handle.num_tokens, geometry.hidden))
    return CombineRequest(
        rows=rows,
        expert_rows=expert_rows,
        handle=handle,
        topk_weights=topk_weights,
        weighted=weighted,
        reduce=reduce,
        keep_routes=keep_routes,
        bias=bias,
        num_sms=num_sms,
    )
