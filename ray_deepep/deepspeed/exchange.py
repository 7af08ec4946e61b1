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
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ..buffer import Buffer
from ..handle import CombineResult, DispatchHandle, DispatchResult, Layout, Padded
from ..row_dots import row_dots

# torch adds up to four terms one after the other. With more, the order depends on shape and number of threads, and the
# bits of stock can only be had from torch itself.
_MAX_SEQUENTIAL_K = 4

# Inputs of the combine functions before the expert outputs.
_FIRST_OUTPUT = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Routes:
    """Where the T tokens of this rank go."""

    topk_idx: torch.Tensor
    """``[T, K]`` int32 contiguous, global expert ids, -1 = dropped."""
    locations: torch.Tensor
    """``[K, T]`` int32 as the gate made them, slot of each route in its expert's block of ``capacity`` rows."""
    gates: torch.Tensor
    """``[K, T]`` as the gate made them (float32; under autocast perhaps not); gradients flow."""
    capacity: torch.Tensor
    """C of this rank; others may have another. Where the gate drops nothing it is on the rows' device: padded blocks
    alone need to know it, and whoever reads it waits."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dispatched:
    """Rows that this rank received."""

    blocks: tuple[torch.Tensor, ...]
    """What experts get. Padded: views ``[N, 1, C, M]`` of one tensor, one per local expert, as stock's ``chunk`` makes
    them; or that tensor, ``[N, L, C, M]``, whole. Compact: ``[1, 1, rows, M]`` per local expert, or of all."""
    split: bool
    """Whether there is a block for each local expert."""
    gates: torch.Tensor
    """What combine weights with: the routes' own ``[K, T]`` (exact), or those received, ``[S]`` (fast)."""
    handle: DispatchHandle


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arrival:
    """How rows arrive; the same on every rank."""

    layout: Layout
    combine: str
    """``exact`` or ``fast``: how they will be combined."""
    split: bool
    """Whether in a block for each local expert, or (padded) in one. With a block for each, gradients come from and go
    to the experts' own tensors: nothing puts them together."""
    max_recv_tokens: int | None = None
    """As in ``Buffer.dispatch``; not with ``split``."""


def dispatch(buffer: Buffer, x: torch.Tensor, routes: Routes, arrival: Arrival) -> Dispatched:
    """Send ``x`` ``[T, M]`` to its experts; collective, and so is the backward."""
    handles: list[DispatchHandle] = []
    if arrival.combine == "exact":
        blocks = _DispatchExact.apply(x, buffer, routes, arrival, handles)
        gates = routes.gates
    else:
        *blocks, gates = _DispatchFast.apply(x, routes.gates.float(), buffer, routes, arrival, handles)
    (handle,) = handles
    return Dispatched(blocks=tuple(blocks), split=arrival.split, gates=gates, handle=handle)


def combine(buffer: Buffer, outputs: Sequence[torch.Tensor], dispatched: Dispatched, *, combine: str) -> torch.Tensor:
    """Bring expert outputs, shaped as the dispatched blocks, home, ``[T, M]``; collective, and so is the backward."""
    dtype = functools.reduce(torch.promote_types, (output.dtype for output in outputs))
    function = _CombineExact if combine == "exact" else _CombineFast
    outputs = [output.to(dtype) for output in outputs]
    return function.apply(dispatched.gates, buffer, dispatched.handle, dispatched.split, *outputs)


def _blocks(handle: DispatchHandle, rows: torch.Tensor, split: bool) -> tuple[torch.Tensor, ...]:
    """Views of ``rows`` ``[S, W]`` as ``Dispatched.blocks``."""
    width = rows.shape[1]
    if isinstance(handle.layout, Padded):
        whole = rows.view(handle.num_ranks, handle.num_local_experts, handle.layout.capacity, width)
        return whole.split(1, 1) if split else (whole,)
    if not split:
        return (rows.view(1, 1, -1, width),)
    return tuple(block.view(1, 1, -1, width) for block in handle.split(rows))


def _combine(
    buffer: Buffer, blocks: Sequence[torch.Tensor], handle: DispatchHandle, split: bool, **options: Any
) -> CombineResult:
    rows = [block.reshape(-1, block.shape[-1]).contiguous() for block in blocks]
    if split:
        return buffer.combine_experts(rows, handle, **options)
    return buffer.combine(rows[0], handle, **options)


def _send(x: torch.Tensor, gates: torch.Tensor, buffer: Buffer, routes: Routes, arrival: Arrival) -> DispatchResult:
    return buffer.dispatch(
        x.contiguous(),
        routes.topk_idx,
        gates.detach().float().t().contiguous(),
        layout=arrival.layout,
        locations=routes.locations.t().contiguous() if isinstance(arrival.layout, Padded) else None,
        max_recv_tokens=arrival.max_recv_tokens,
    )


class _DispatchExact(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, buffer, routes, arrival, handles):
        result = _send(x, routes.gates, buffer, routes, arrival)
        handles.append(result.handle)
        ctx.buffer, ctx.handle, ctx.split = buffer, result.handle, arrival.split
        return _blocks(result.handle, result.x, arrival.split)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_blocks):
        home = _combine(ctx.buffer, grad_blocks, ctx.handle, ctx.split, reduce="expert_order")
        return home.x, *(None,) * 4


class _CombineExact(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gates, buffer, handle, split, *outputs):
        ctx.buffer, ctx.handle, ctx.split, ctx.gates_dtype = buffer, handle, split, gates.dtype
        ctx.num_outputs = len(outputs)
        torch_order = handle.num_topk > _MAX_SEQUENTIAL_K or gates.dtype != torch.float32
        keep_routes = ctx.needs_input_grad[0] or torch_order
        result = _combine(buffer, outputs, handle, split, weighted=True, keep_routes=keep_routes)
        # Through save_for_backward, so that activation checkpointing frees it.
        ctx.save_for_backward(*([result.routes] if ctx.needs_input_grad[0] else []))
        return (result.routes * gates.unsqueeze(-1)).sum(0).to(result.x.dtype) if torch_order else result.x

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        grad_blocks, grad_gates = (None,) * ctx.num_outputs, None
        if any(ctx.needs_input_grad[_FIRST_OUTPUT:]):
            arrived = ctx.buffer.dispatch(grad_out.contiguous(), handle=ctx.handle, scale_by_weights=True).x
            grad_blocks = _blocks(ctx.handle, arrived, ctx.split)
        if ctx.needs_input_grad[0]:
            (routes,) = ctx.saved_tensors
            product = torch.promote_types(routes.dtype, ctx.gates_dtype)
            grad_gates = torch.empty(routes.shape[:2], dtype=product, device=routes.device)
            row_dots(grad_out, routes, out=grad_gates)
            grad_gates = grad_gates.to(ctx.gates_dtype)
        return grad_gates, None, None, None, *grad_blocks


class _DispatchFast(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gates, buffer, routes, arrival, handles):
        result = _send(x, gates, buffer, routes, arrival)
        handles.append(result.handle)
        ctx.buffer, ctx.handle, ctx.split, ctx.dtype = buffer, result.handle, arrival.split, x.dtype
        ctx.set_materialize_grads(False)
        # An alias: the handle keeps the tensor itself, and an output kept by its own node would never be freed.
        return *_blocks(result.handle, result.x, arrival.split), result.topk_weights.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        *grad_blocks, grad_weights = grads
        handle, hidden = ctx.handle, ctx.buffer.geometry.hidden
        # Every rank must enter the collective, even where nothing depends on the rows.
        for i, size in enumerate(handle.expert_sizes if ctx.split else (handle.num_rows,)):
            if grad_blocks[i] is None:
                device = handle.recv_topk_weights.device
                grad_blocks[i] = torch.zeros(size, hidden, dtype=ctx.dtype, device=device)
        if grad_weights is not None:
            grad_weights = grad_weights.contiguous()
        home = _combine(ctx.buffer, grad_blocks, handle, ctx.split, topk_weights=grad_weights, reduce="fast")
        grad_gates = None if home.topk_weights is None else home.topk_weights.t()
        return home.x, grad_gates, *(None,) * 4


class _CombineFast(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weights, buffer, handle, split, *outputs):
        ctx.buffer, ctx.handle, ctx.split = buffer, handle, split
        ctx.save_for_backward(weights, *outputs)
        return _combine(buffer, outputs, handle, split, weighted=True, reduce="fast").x

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        weights, *outputs = ctx.saved_tensors
        arrived = ctx.buffer.dispatch(grad_out.contiguous(), handle=ctx.handle).x
        grad_weights = torch.empty_like(weights)
        grad_blocks, weight_blocks, dot_blocks = (
            _blocks(ctx.handle, tensor, ctx.split)
            for tensor in (arrived, weights.unsqueeze(-1), grad_weights.unsqueeze(-1))
        )
        for grad, rows, weight, dots in zip(grad_blocks, outputs, weight_blocks, dot_blocks):
            # Scaled in place: nobody else has these rows.
            row_dots(grad, rows, out=dots.squeeze(-1), weights=weight.squeeze(-1))
        return grad_weights, None, None, None, *grad_blocks
