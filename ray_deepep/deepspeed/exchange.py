"""Differentiable dispatch and combine as DeepSpeed's layer computes them: a pair per way of reducing.

*Exact* repeats the arithmetic of ``sharded_moe._sparse_encode`` and ``_sparse_decode`` step by step, so that outputs
and gradients are bit-equal. With g the gradient of the layer's output, w the gates and r a route's row:

- encode's backward is an ``index_add`` of a token's row gradients by ascending expert: ``reduce="expert_order"``;
- decode is ``(r * w).sum(0)`` over k in float32, rounded once: ``reduce="exact", weighted=True``;
- decode's backward is ``g.float() * w`` rounded to the rows' dtype for each route, which is the dispatch of g scaled
  on arrival, and ``(g.float() * r).sum(-1)`` for the gates, at the source, from the rows that combine keeps.

*Fast* adds up where rows are. Its gate gradients are computed beside the experts and go home with the row gradients.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch.autograd.function import once_differentiable

from ..buffer import Buffer
from ..handle import DispatchHandle, DispatchResult, Layout, Padded

# torch adds up to four terms one after the other. With more, the order depends on shape and number of threads, and the
# bits of stock can only be had from torch itself.
_MAX_SEQUENTIAL_K = 4

# Half a MiB of float32: most of a second-level cache, and few enough pieces that the calls cost little.
_CACHED_ELEMENTS = 2**17


@dataclasses.dataclass(frozen=True, kw_only=True)
class Routes:
    """Where the T tokens of this rank go."""

    topk_idx: torch.Tensor
    """``[T, K]`` int32 contiguous, global expert ids, -1 = dropped."""
    locations: torch.Tensor
    """``[T, K]`` int32 contiguous, slot of each route in its expert's block of ``capacity`` rows."""
    gates: torch.Tensor
    """``[K, T]`` as the gate made them (float32; under autocast perhaps not); gradients flow."""
    capacity: int
    """C of this rank; others may have another."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dispatched:
    """Rows that this rank received."""

    rows: torch.Tensor
    """``[S, M]``."""
    gates: torch.Tensor
    """What combine weights with: the routes' own ``[K, T]`` (exact), or those received, ``[S]`` (fast)."""
    handle: DispatchHandle


def dispatch(buffer: Buffer, x: torch.Tensor, routes: Routes, *, layout: Layout, combine: str) -> Dispatched:
    """Send ``x`` ``[T, M]`` to its experts; collective, and so is the backward."""
    handles: list[DispatchHandle] = []
    if combine == "exact":
        rows = _DispatchExact.apply(x, buffer, routes, layout, handles)
        gates = routes.gates
    else:
        rows, gates = _DispatchFast.apply(x, routes.gates.float(), buffer, routes, layout, handles)
    (handle,) = handles
    return Dispatched(rows=rows, gates=gates, handle=handle)


def combine(buffer: Buffer, rows: torch.Tensor, dispatched: Dispatched, *, combine: str) -> torch.Tensor:
    """Bring expert outputs ``[S, M]`` home, ``[T, M]``; collective, and so is the backward."""
    function = _CombineExact if combine == "exact" else _CombineFast
    return function.apply(rows, dispatched.gates, buffer, dispatched.handle)


def _pieces(dim: int, *tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Views of ``tensors`` along their dimension ``dim``: on a CPU, pieces whose products stay in its cache.

    A product of all rows at once needs fresh memory, which costs more than the arithmetic.
    """
    count = max(tensors[0].shape[dim], 1)
    widest = max(*(tensor.numel() // count for tensor in tensors), 1)
    step = max(_CACHED_ELEMENTS // widest, 1) if tensors[0].device.type == "cpu" else count
    return zip(*(tensor.split(step, dim) for tensor in tensors))


def _send(x: torch.Tensor, gates: torch.Tensor, buffer: Buffer, routes: Routes, layout: Layout) -> DispatchResult:
    return buffer.dispatch(
        x.contiguous(),
        routes.topk_idx,
        gates.detach().float().t().contiguous(),
        layout=layout,
        locations=routes.locations if isinstance(layout, Padded) else None,
    )


class _DispatchExact(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, buffer, routes, layout, handles):
        result = _send(x, routes.gates, buffer, routes, layout)
        handles.append(result.handle)
        ctx.buffer, ctx.handle = buffer, result.handle
        return result.x

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_rows):
        home = ctx.buffer.combine(grad_rows.contiguous(), ctx.handle, reduce="expert_order")
        return home.x, None, None, None, None


class _CombineExact(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, gates, buffer, handle):
        ctx.buffer, ctx.handle, ctx.gates_dtype = buffer, handle, gates.dtype
        torch_order = handle.num_topk > _MAX_SEQUENTIAL_K or gates.dtype != torch.float32
        keep_routes = ctx.needs_input_grad[1] or torch_order
        result = buffer.combine(rows.contiguous(), handle, weighted=True, keep_routes=keep_routes)
        # Through save_for_backward, so that activation checkpointing frees it.
        ctx.save_for_backward(*([result.routes] if ctx.needs_input_grad[1] else []))
        return (result.routes * gates.unsqueeze(-1)).sum(0).to(rows.dtype) if torch_order else result.x

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        grad_rows = grad_gates = None
        if ctx.needs_input_grad[0]:
            grad_rows = ctx.buffer.dispatch(grad_out.contiguous(), handle=ctx.handle, scale_by_weights=True).x
        if ctx.needs_input_grad[1]:
            (routes,) = ctx.saved_tensors
            product = torch.promote_types(routes.dtype, ctx.gates_dtype)
            grad_gates = torch.empty(routes.shape[:2], dtype=product, device=routes.device)
            for grad, rows, dots in _pieces(1, grad_out.unsqueeze(0), routes, grad_gates):
                torch.sum(grad.to(product) * rows, -1, out=dots)
            grad_gates = grad_gates.to(ctx.gates_dtype)
        return grad_rows, grad_gates, None, None


class _DispatchFast(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gates, buffer, routes, layout, handles):
        result = _send(x, gates, buffer, routes, layout)
        handles.append(result.handle)
        ctx.buffer, ctx.handle, ctx.dtype = buffer, result.handle, x.dtype
        ctx.set_materialize_grads(False)
        # An alias: the handle keeps the tensor itself, and an output kept by its own node would never be freed.
        return result.x, result.topk_weights.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_rows, grad_weights):
        if grad_rows is None:
            # Every rank must enter the collective, even where nothing depends on the rows.
            shape = (ctx.handle.num_rows, ctx.buffer.geometry.hidden)
            grad_rows = torch.zeros(shape, dtype=ctx.dtype, device=ctx.handle.recv_topk_weights.device)
        if grad_weights is not None:
            grad_weights = grad_weights.contiguous()
        home = ctx.buffer.combine(grad_rows.contiguous(), ctx.handle, topk_weights=grad_weights, reduce="fast")
        grad_gates = None if home.topk_weights is None else home.topk_weights.t()
        return home.x, grad_gates, None, None, None, None


class _CombineFast(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, weights, buffer, handle):
        ctx.buffer, ctx.handle = buffer, handle
        ctx.save_for_backward(rows, weights)
        return buffer.combine(rows.contiguous(), handle, weighted=True, reduce="fast").x

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        rows, weights = ctx.saved_tensors
        arrived = ctx.buffer.dispatch(grad_out.contiguous(), handle=ctx.handle).x
        grad_weights = torch.empty_like(weights)
        for grad, row, weight, dots in _pieces(0, arrived, rows, weights.unsqueeze(-1), grad_weights):
            torch.sum(grad.float() * row, -1, out=dots)
            # In place: nobody else has these rows. The product is float32, like the weights, and is rounded once.
            grad.mul_(weight)
        return arrived, grad_weights, None, None
