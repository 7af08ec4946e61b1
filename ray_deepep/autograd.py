"""Differentiable dispatch and combine: each is the other's backward, on the same plan.

With g the gradient of the output and w the weights:

- rows = dispatch(x): dx = combine(drows), unweighted; the gradient of the received weights goes home beside it.
- out = combine(rows, weighted): drows = w * dispatch(g) and dw = <dispatch(g), rows> per route, computed where the
  rows are; dw goes home with the next combine of scalars. Unweighted: drows = dispatch(g).
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from .buffer import Buffer
from .errors import InvalidArgumentError, InvalidTypeError
from .handle import CombineResult, DispatchHandle, DispatchResult, Layout
from .row_dots import row_dots


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, topk_weights, buffer, topk_idx, options, reduce, holder):
        result = buffer.dispatch(x, topk_idx, topk_weights, **options)
        holder.append(result)
        ctx.buffer, ctx.handle, ctx.reduce = buffer, result.handle, reduce
        ctx.dtype, ctx.device, ctx.num_sms = x.dtype, x.device, options["num_sms"]
        ctx.needs_weights = topk_weights is not None and ctx.needs_input_grad[1]
        ctx.set_materialize_grads(False)
        # An alias: the handle keeps the tensor itself, and an output kept by its own node is freed late.
        return result.x, result.topk_weights.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_rows, grad_weights):
        handle, geometry = ctx.handle, ctx.buffer.geometry
        if grad_rows is None:
            # Every rank must enter the collective, even where nothing depends on the rows.
            grad_rows = torch.zeros(handle.num_rows, geometry.hidden, dtype=ctx.dtype, device=ctx.device)
        if not ctx.needs_weights:
            grad_weights = None
        elif grad_weights is None:
            grad_weights = torch.zeros_like(handle.recv_topk_weights)
        else:
            grad_weights = grad_weights.contiguous()
        result = ctx.buffer.combine(
            grad_rows.contiguous(), handle, topk_weights=grad_weights, reduce=ctx.reduce, num_sms=ctx.num_sms
        )
        return result.x, result.topk_weights, *(None,) * 5


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, topk_weights, buffer, handle, weighted, reduce, num_sms):
        result = buffer.combine(rows, handle, weighted=weighted, reduce=reduce, num_sms=num_sms)
        ctx.buffer, ctx.handle, ctx.weighted, ctx.num_sms = buffer, handle, weighted, num_sms
        ctx.needs_weights = weighted and topk_weights is not None and ctx.needs_input_grad[1]
        ctx.save_for_backward(*([rows] if ctx.needs_weights else []))
        return result.x

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        grad_out, num_sms = grad_out.contiguous(), ctx.num_sms
        if not ctx.needs_weights:
            grad_rows = ctx.buffer.dispatch(
                grad_out, handle=ctx.handle, scale_by_weights=ctx.weighted, num_sms=num_sms
            ).x
            return grad_rows, *(None,) * 6
        (rows,) = ctx.saved_tensors
        weights = ctx.handle.recv_topk_weights
        grad_rows = ctx.buffer.dispatch(grad_out, handle=ctx.handle, num_sms=num_sms).x
        grad_route_weights = torch.empty_like(weights)
        # Scaled in place: nobody else has these rows.
        row_dots(grad_rows, rows, out=grad_route_weights, weights=weights)
        home = ctx.buffer.combine_weights(grad_route_weights, ctx.handle, num_sms=num_sms)
        return grad_rows, home, *(None,) * 5


def dispatch(
    buffer: Buffer,
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor | None = None,
    *,
    layout: Layout | None = None,
    locations: torch.Tensor | None = None,
    reduce: str = "exact",
    max_recv_tokens: int | None = None,
    num_sms: int | None = None,
) -> DispatchResult:
    """Differentiable :meth:`Buffer.dispatch` (float32, bfloat16, float16 rows).

    Gradients flow from ``x`` of the result to ``x``, and from its ``topk_weights`` to ``topk_weights``. ``reduce`` says
    how the backward adds up a token's row gradients; ``num_sms`` is for the backward too.

    Collective, forward and backward: ``x`` or ``topk_weights`` must need a gradient on all ranks or on none, or some
    would wait for a backward that others never run.
    """
    holder: list[DispatchResult] = []
    options = {"layout": layout, "locations": locations, "max_recv_tokens": max_recv_tokens, "num_sms": num_sms}
    rows, weights = _Dispatch.apply(x, topk_weights, buffer, topk_idx, options, reduce, holder)
    (result,) = holder
    return DispatchResult(x=rows, x_scales=None, topk_idx=result.topk_idx, topk_weights=weights, handle=result.handle)


def combine(
    buffer: Buffer,
    rows: torch.Tensor,
    handle: DispatchHandle,
    *,
    topk_weights: torch.Tensor | None = None,
    weighted: bool = False,
    reduce: str = "exact",
    num_sms: int | None = None,
) -> CombineResult:
    """Differentiable :meth:`Buffer.combine`; ``num_sms`` is for the backward too.

    With ``weighted=True`` pass the ``topk_weights`` ``[T, K]`` that were given to the dispatch again, to get their
    gradient; the weights are those of the handle. Collective, forward and backward.

    Raises:
        InvalidArgumentError: ``topk_weights`` has another shape, such as that of the weights that arrived.
        InvalidTypeError: it is no tensor.
        As :meth:`Buffer.combine`.
    """
    if topk_weights is not None and isinstance(handle, DispatchHandle):
        _check_sent_weights(topk_weights, (handle.num_tokens, handle.num_topk))
    x = _Combine.apply(rows, topk_weights, buffer, handle, weighted, reduce, num_sms)
    return CombineResult(x=x, topk_weights=None, routes=None)


def _check_sent_weights(topk_weights: object, sent: tuple[int, int]) -> None:
    if not isinstance(topk_weights, torch.Tensor):
        raise InvalidTypeError("topk_weights", type(topk_weights).__name__, "must be a torch.Tensor")
    if tuple(topk_weights.shape) != sent:
        rule = f"shape must be {sent}, as given to the dispatch; its result has the weights that arrived"
        raise InvalidArgumentError("topk_weights", tuple(topk_weights.shape), rule)
