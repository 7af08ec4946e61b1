"""Argument checks of the low-latency calls: everything this rank can judge, before anything is sent."""

from __future__ import annotations

import dataclasses

import torch

from . import argument_checks as argument
from . import checks
from .argument_checks import COMBINE_DTYPES, DISPATCH_DTYPES
from .errors import InvalidArgumentError, InvalidTypeError
from .float8 import FLOAT8, SCALE_BLOCK
from .handle import ExpertMajor
from .low_latency import (
    LOW_LATENCY_REDUCE_MODES,
    MAX_LOW_LATENCY_TOKENS,
    ON_TIMEOUT,
    ExpertBlocks,
    LowLatencyHandle,
    LowLatencyLayout,
    LowLatencyStats,
)
from .low_latency_transport import LowLatencyCombineRequest, LowLatencyDispatchRequest
from .transport import BufferGeometry


def geometry(geometry: BufferGeometry) -> None:
    """Check a buffer's room for low-latency calls."""
    num_tokens = geometry.low_latency_max_tokens
    if type(num_tokens) is not int:
        raise InvalidTypeError("low_latency_max_tokens", type(num_tokens).__name__, "must be an int")
    if not 0 <= num_tokens <= MAX_LOW_LATENCY_TOKENS:
        raise InvalidArgumentError("low_latency_max_tokens", num_tokens, f"must be 0 to {MAX_LOW_LATENCY_TOKENS}")
    if num_tokens and geometry.hidden % SCALE_BLOCK:
        rule = f"must be a multiple of {SCALE_BLOCK} with low_latency_max_tokens"
        raise InvalidArgumentError("hidden", geometry.hidden, rule)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CallOptions:
    """What says how a low-latency call runs; defaults filled in."""

    return_recv_hook: bool
    async_op: bool
    after: torch.cuda.Event | None
    num_sms: int | None
    on_timeout: str
    timeout_s: float
    stats: LowLatencyStats


def call_options(options: CallOptions, num_local_experts: int, num_ranks: int) -> None:
    """Check them."""
    checks.call_options(options.num_sms, options.after)
    for name in ("return_recv_hook", "async_op"):
        if not isinstance(getattr(options, name), bool):
            raise InvalidTypeError(name, type(getattr(options, name)).__name__, "must be a bool")
    if options.async_op and options.return_recv_hook:
        raise InvalidArgumentError("async_op", True, "goes without return_recv_hook, which sends at once")
    if options.on_timeout not in ON_TIMEOUT:
        raise InvalidArgumentError("on_timeout", options.on_timeout, f"must be one of {', '.join(ON_TIMEOUT)}")
    if not isinstance(options.timeout_s, (int, float)):
        raise InvalidTypeError("timeout_s", type(options.timeout_s).__name__, "must be a number of seconds")
    if not options.timeout_s > 0:
        raise InvalidArgumentError("timeout_s", options.timeout_s, "must be > 0")
    if not isinstance(options.stats, LowLatencyStats):
        raise InvalidTypeError("stats", type(options.stats).__name__, "must be a LowLatencyStats")
    per_expert, wait_ns = options.stats.num_tokens_per_expert, options.stats.wait_ns
    argument.tensor("stats.num_tokens_per_expert", per_expert, (torch.int64,), (num_local_experts,))
    argument.tensor("stats.wait_ns", wait_ns, (torch.int64,), (num_ranks,))


def dispatch_request(
    geometry: BufferGeometry,
    *,
    num_ranks: int,
    x: object,
    topk_idx: object,
    topk_weights: object,
    x_scales: object,
    layout: object,
    max_recv_tokens: object,
    cast: object,
    options: CallOptions,
) -> LowLatencyDispatchRequest:
    """Check the arguments of ``Buffer.low_latency_dispatch`` and put them in the form that transports take."""
    x = argument.rows("x", x, DISPATCH_DTYPES, geometry.hidden)
    num_tokens = x.shape[0]
    if num_tokens > geometry.low_latency_max_tokens:
        rule = f"must have at most low_latency_max_tokens={geometry.low_latency_max_tokens} rows"
        raise InvalidArgumentError("x", tuple(x.shape), rule)
    if cast is not None:
        argument.cast(cast, x, x_scales, geometry.hidden)
    elif x.dtype == FLOAT8:
        argument.scales(x, x_scales, geometry.hidden)
    elif x_scales is not None:
        argument.absent("goes with float8_e4m3fn rows only", x_scales=x_scales)
    topk_idx = argument.topk_idx(topk_idx, num_tokens, geometry)
    _distinct(topk_idx)
    if topk_weights is not None:
        topk_weights = argument.tensor("topk_weights", topk_weights, (torch.float32,), topk_idx.shape)
    layout = _layout(layout, max_recv_tokens)
    if isinstance(layout, ExpertMajor) and max_recv_tokens is None:
        max_recv_tokens = most_rows(geometry, num_ranks, topk_idx.shape[1], layout.alignment)
    return LowLatencyDispatchRequest(
        x=x,
        x_scales=x_scales,
        topk_idx=topk_idx,
        topk_weights=topk_weights,
        layout=layout,
        max_recv_tokens=max_recv_tokens,
        cast=cast,
        reuses_input=options.return_recv_hook,
        num_sms=options.num_sms,
    )


def most_rows(geometry: BufferGeometry, num_ranks: int, num_topk: int, alignment: int) -> int:
    """Rows of a compact output that are enough whatever the routing."""
    num_local = geometry.num_experts // num_ranks
    routes = num_ranks * geometry.low_latency_max_tokens * min(num_topk, num_local)
    return routes + num_local * (alignment - 1)


def _distinct(topk_idx: torch.Tensor) -> None:
    """A token names an expert once: a block has one row per token. On a GPU the kernel would look."""
    if not topk_idx.is_cpu or topk_idx.shape[1] < 2 or len(topk_idx) == 0:
        return
    ordered = topk_idx.sort(dim=1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if twice.any():
        token, k = (int(i) for i in twice.nonzero()[0])
        rule = "must not name an expert twice in low-latency calls"
        raise InvalidArgumentError(f"topk_idx[{token}]", int(ordered[token, k]), rule)


def _layout(layout: object, max_recv_tokens: object) -> LowLatencyLayout:
    if layout is None:
        layout = ExpertBlocks()
    if not isinstance(layout, (ExpertBlocks, ExpertMajor)):
        raise InvalidTypeError("layout", type(layout).__name__, "must be ExpertBlocks or ExpertMajor")
    if max_recv_tokens is not None:
        argument.at_least_one("max_recv_tokens", max_recv_tokens)
        if isinstance(layout, ExpertBlocks):
            raise InvalidArgumentError("max_recv_tokens", max_recv_tokens, "goes with layout=ExpertMajor(...) only")
    return layout


def handle(handle: object, owner: int) -> LowLatencyHandle:
    """Check that a handle is of a low-latency dispatch of the buffer with identity ``owner``."""
    if not isinstance(handle, LowLatencyHandle):
        raise InvalidTypeError("handle", type(handle).__name__, "must be a LowLatencyHandle")
    if handle.owner != owner:
        raise InvalidArgumentError("handle", "a handle of another buffer", "must come from a dispatch of this buffer")
    return handle


def combine_request(
    geometry: BufferGeometry,
    *,
    rows: object,
    handle: LowLatencyHandle,
    topk_weights: object,
    reduce: object,
    zero_copy: object,
    out: object,
    options: CallOptions,
) -> LowLatencyCombineRequest:
    """Check the arguments of ``Buffer.low_latency_combine``, but for where ``rows`` lie."""
    rows = argument.tensor("rows", rows, COMBINE_DTYPES, handle.rows_shape)
    if reduce not in LOW_LATENCY_REDUCE_MODES:
        raise InvalidArgumentError("reduce", reduce, f"must be one of {', '.join(LOW_LATENCY_REDUCE_MODES)}")
    if topk_weights is not None:
        if reduce == "fast":
            argument.absent(
                'goes with reduce="exact"; the experts\' ranks need them, so give them to low_latency_dispatch',
                topk_weights=topk_weights,
            )
        shape = (handle.num_tokens, handle.num_topk)
        topk_weights = argument.tensor("topk_weights", topk_weights, (torch.float32,), shape)
    if not isinstance(zero_copy, bool):
        raise InvalidTypeError("zero_copy", type(zero_copy).__name__, "must be a bool")
    if zero_copy and reduce != "exact":
        rule = f'goes with reduce="exact" only; {reduce!r} sends sums, and copies nothing either'
        raise InvalidArgumentError("zero_copy", True, rule)
    if out is not None:
        argument.tensor("out", out, (rows.dtype,), (handle.num_tokens, geometry.hidden))
    return LowLatencyCombineRequest(
        rows=rows,
        plan=None,
        topk_weights=topk_weights,
        zero_copy=zero_copy,
        reduce=reduce,
        reuses_input=options.return_recv_hook,
        num_sms=options.num_sms,
    )


def peer(name: str, rank: object, own: int, num_ranks: int) -> None:
    """Check the rank that is to be masked or unmasked."""
    if type(rank) is not int:
        raise InvalidTypeError(name, type(rank).__name__, "must be an int")
    if not 0 <= rank < num_ranks or rank == own:
        raise InvalidArgumentError(name, rank, f"must be another rank, in [0, {num_ranks})")
