"""``MOELayer.forward`` over a buffer: stock gate, dispatch, stock experts, combine.

Follows deepspeed 0.19.8 ``moe/sharded_moe.py``; what is kept as it is there: the gate and its call, ``l_aux``,
``exp_counts``, the shapes that experts see (padded layout), the timers and their names.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.moe.experts import Experts
from deepspeed.moe.sharded_moe import FIRST_ALLTOALL_TIMER, MOE_TIMER, SECOND_ALLTOALL_TIMER, MOELayer
from deepspeed.utils import groups
from deepspeed.utils.bwc import bwc_tensor_model_parallel_world_size

from ..argument_checks import COMBINE_DTYPES
from ..checks import MAX_TOPK
from ..errors import BootstrapError, InvalidArgumentError, MismatchError, ReceiveOverflowError
from ..handle import DispatchHandle, ExpertMajor, Padded
from .agree import tell
from .config import SwapConfig
from .exchange import Arrival, Dispatched, Routes, combine, dispatch
from .gating import bounds_routes, route
from .graphed import GRAPHS_FIELD, LayerGraphs
from .grouped import GroupedExperts, LinearGradients
from .registry import ROOM_PHASE, BufferRegistry, SharedBuffer
from .room import MAX_ROWS, Need

CAPACITY_FIELDS = ("layout", "layout.capacity")
"""What a mismatch of capacities is called: by the CPU core and the reference, and by the CUDA core."""
GRAPHS_NOTE = (
    "An MoE layer that runs as CUDA graphs got more tokens on some ranks than when it was captured. Where ranks get "
    "different numbers of tokens, set SwapConfig(graphs='off') or RAY_DEEPEP_GRAPHS=off."
)

ROOM_NOTE = "Gates that drop no token may send many to one rank: RAY_DEEPEP_DEVICE_HEAP_GIB gives more room for rows."


def stock_reason(layer: MOELayer, hidden_states: torch.Tensor) -> str:
    """Why this layer must run as DeepSpeed wrote it, or an empty string. The same on every rank."""
    if layer.use_tutel:
        return "the layer uses Tutel"
    tensor_parallel = bwc_tensor_model_parallel_world_size(groups.mpu)
    if tensor_parallel > 1:
        return f"tensor parallelism of {tensor_parallel} ranks"
    expert_parallel = groups._get_expert_model_parallel_world_size()
    if expert_parallel > 1:
        return f"tensor parallelism of experts over {expert_parallel} ranks"
    if hidden_states.dtype not in COMBINE_DTYPES:
        return f"rows are {str(hidden_states.dtype).removeprefix('torch.')}"
    if getattr(layer.gate, "k", 1) > MAX_TOPK:
        return f"top-{layer.gate.k} is more than {MAX_TOPK} experts per token"
    if layer.ep_group is None:
        return "the layer has no expert-parallel group (set_deepspeed_parallelism was not called)"
    return ""


def moe_forward(
    registry: BufferRegistry,
    config: SwapConfig,
    layer: MOELayer,
    hidden_states: torch.Tensor,
    used_token: torch.Tensor | None,
) -> torch.Tensor:
    """Output of ``layer`` for ``hidden_states`` ``[..., M]``, same shape; collective over the layer's EP group."""
    with _timed(layer, MOE_TIMER, "time_moe"):
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        call = _Call(registry, config, layer, used_token)
        graphs = registry.graphs.of(layer) if _wants_graphs(config, layer, tokens) else None
        captured = None
        if graphs is not None:
            send = functools.partial(_forward, call, graphs)
            captured = graphs.ready(layer, tokens, used_token, registry.buffer_of(layer), send)
        try:
            out = _forward(call, graphs, tokens)[0] if captured is None else captured(layer, tokens)
        except (MismatchError, BootstrapError) as error:
            if comes_of_graphs(error, replayed=graphs is not None and graphs.agreed):
                error.add_note(GRAPHS_NOTE)
            raise
        return out.reshape(hidden_states.shape)


def comes_of_graphs(error: MismatchError | BootstrapError, *, replayed: bool) -> bool:
    """Whether a call failed because of graphs. replayed: by now other ranks may replay this layer, and then do not come
    where ranks say what room they need."""
    if isinstance(error, MismatchError):
        return error.field == GRAPHS_FIELD
    return replayed and error.phase == ROOM_PHASE


@dataclasses.dataclass(frozen=True)
class _Call:
    """What a forward works with, beside tokens."""

    registry: BufferRegistry
    config: SwapConfig
    layer: MOELayer
    used_token: torch.Tensor | None


def _forward(
    call: _Call, graphs: LayerGraphs | None, tokens: torch.Tensor, later: list[LinearGradients] | None = None
) -> tuple[torch.Tensor, DispatchHandle]:
    """Output ``[T, M]`` for ``tokens`` ``[T, M]``, and the handle of its dispatch. ``later``: as grouped experts take
    it."""
    registry, config, layer = call.registry, call.config, call.layer
    routes = route(layer, tokens, call.used_token)
    grouped = _grouped(registry, config, layer, tokens)
    # Fused or hand-written expert containers know the stock shape only.
    compact = grouped is not None or (config.layout == "compact" and type(layer.experts).forward is Experts.forward)
    hidden, num_topk = tokens.shape[1], routes.gates.shape[0]
    need = _need(layer, tokens, routes, padded=not compact)
    shared = registry.for_layer(layer, need, hidden=hidden, num_topk=num_topk, padded=not compact)
    _check_room(shared, tokens, routes)
    reduce = config.combine
    if reduce == "auto":
        reduce = "exact" if grouped is None else "fast"
    with _timed(layer, FIRST_ALLTOALL_TIMER, "time_falltoall"):
        if compact:
            how = Arrival(layout=ExpertMajor(), combine=reduce, split=grouped is None)
            counted = graphs if grouped is not None else None
            send = functools.partial(_dispatch_compact, shared, layer, tokens, routes, how, counted)
        else:
            how = {"combine": reduce, "split": _is_loop(layer.experts)}
            send = functools.partial(_dispatch_padded, shared, tokens, routes, **how)
        arrived = registry.with_room(shared, layer.ep_group, need, tokens.device, send)
    # The buffer that the rows came over; a larger one may have taken its place.
    buffer = shared.buffer
    if grouped is not None:
        outputs = _all_experts(grouped, arrived, later)
    else:
        outputs = _each_expert(layer, arrived) if arrived.split else (layer.experts(*arrived.blocks),)
    with _timed(layer, SECOND_ALLTOALL_TIMER, "time_salltoall"):
        combined = combine(buffer, outputs, arrived, combine=reduce)
    return combined, arrived.handle


def _wants_graphs(config: SwapConfig, layer: MOELayer, tokens: torch.Tensor) -> bool:
    """Whether this layer's calls may become graphs; the same on every rank."""
    training = layer.training and torch.is_grad_enabled()
    return config.graphs == "auto" and tokens.is_cuda and training and wants_grouped(config, tokens)


def _is_loop(experts: torch.nn.Module) -> bool:
    """Whether calling ``experts`` does no more than call each, so that what it cuts and puts together can be saved."""
    hooks = (
        experts._forward_hooks,
        experts._forward_pre_hooks,
        experts._backward_hooks,
        experts._backward_pre_hooks,
    )
    return type(experts).forward is Experts.forward and not any(hooks)


def wants_grouped(config: SwapConfig, rows: torch.Tensor) -> bool:
    """Whether experts are to be grouped where they can be."""
    by_itself = rows.device.type == "cuda" and rows.dtype == torch.bfloat16
    return config.experts == "grouped" or (config.experts == "auto" and by_itself)


def _grouped(
    registry: BufferRegistry, config: SwapConfig, layer: MOELayer, tokens: torch.Tensor
) -> GroupedExperts | None:
    """The layer's experts as grouped products, if they are wanted and can be; the same on every rank, whose experts
    are built alike."""
    if not wants_grouped(config, tokens):
        return None
    reason = "" if _is_loop(layer.experts) else "the container of the experts is not stock's, or has hooks"
    grouped = None
    if not reason:
        grouped, reason = registry.grouped.of(layer.experts)
    if grouped is not None:
        reason = grouped.problem(tokens)
    if not reason:
        return grouped
    level = logging.WARNING if config.experts == "grouped" else logging.DEBUG
    registry.log_once(level, f"experts run one after the other: {reason}")
    return None


def _all_experts(
    grouped: GroupedExperts, arrived: Dispatched, later: list[LinearGradients] | None
) -> tuple[torch.Tensor]:
    """Every expert at once, ``[1, 1, S, M]``."""
    (block,) = arrived.blocks
    rows = block.view(-1, block.shape[-1])
    ends = arrived.handle.device_counts.expert_offsets[1:].to(rows.device)
    out = grouped(rows, ends, later)
    return (out.view(block.shape),)


def _each_expert(layer: MOELayer, arrived: Dispatched) -> list[torch.Tensor]:
    """Every expert once, also with no rows: ZeRO's hooks and its gradients (zeros) are expected on every rank.

    Blocks have as many dimensions as stock gives, for experts that count on them.
    """
    outputs = []
    for block, expert in zip(arrived.blocks, layer.experts.deepspeed_experts, strict=True):
        out = expert(block)
        out = out[0] if isinstance(out, tuple) else out
        outputs.append(out if out.shape == block.shape else out.reshape(block.shape))
    return outputs


def _dispatch_compact(
    shared: SharedBuffer,
    layer: MOELayer,
    tokens: torch.Tensor,
    routes: Routes,
    how: Arrival,
    graphs: LayerGraphs | None,
) -> Dispatched:
    """Dispatch without a capacity; with ``graphs``, into the room that ranks agreed on for them."""
    if graphs is not None:
        num_rows = graphs.num_rows(shared.buffer, layer, tokens, routes.capacity)
        how = dataclasses.replace(how, max_recv_tokens=num_rows)
    try:
        return dispatch(shared.buffer, tokens, routes, how)
    except MismatchError:
        if graphs is not None:
            graphs.not_made()
        raise
    except ReceiveOverflowError as error:
        error.add_note(ROOM_NOTE)
        raise


def _dispatch_padded(shared: SharedBuffer, tokens: torch.Tensor, routes: Routes, **how: Any) -> Dispatched:
    """Dispatch with one capacity for all ranks, the largest. how: of ``Arrival``, but for the layout.

    Capacities differ only where token counts do, which stock does not allow. So ranks take them for equal and find out
    at no cost: a dispatch with different ones fails on every rank before a row moves. From then on they agree first.
    """
    capacity = int(routes.capacity)
    if not shared.capacities_differ:
        try:
            return dispatch(shared.buffer, tokens, routes, Arrival(layout=Padded(capacity), **how))
        except MismatchError as error:
            if error.field not in CAPACITY_FIELDS or shared.grows:
                raise  # who grows buffers looks at what capacities there are
            shared.capacities_differ = True
    capacity = _largest_capacity(shared, tokens, capacity)
    return dispatch(shared.buffer, tokens, routes, Arrival(layout=Padded(capacity), **how))


def _largest_capacity(shared: SharedBuffer, tokens: torch.Tensor, capacity: int) -> int:
    """Largest capacity of all ranks, by telling each other."""
    return max(tell(shared.buffer, capacity, tokens.device))


def _need(layer: MOELayer, tokens: torch.Tensor, routes: Routes, *, padded: bool) -> Need:
    """What a buffer must have room for; with a capacity that will do for evaluation and training, which take turns."""
    bounded = bounds_routes(layer)
    if not padded and not bounded:
        return Need(num_tokens=tokens.shape[0])
    capacity = int(routes.capacity)
    factors = (layer.gate.capacity_factor, layer.gate.eval_capacity_factor) if bounded else (0.0,)
    if min(factors) > 0:
        capacity = math.ceil(capacity * max(factors) / factors[0 if layer.gate.training else 1])
    return Need(num_tokens=tokens.shape[0], capacity=capacity)


def _check_room(shared: SharedBuffer, tokens: torch.Tensor, routes: Routes) -> None:
    geometry = shared.buffer.geometry
    max_tokens = MAX_ROWS if shared.grows else geometry.max_tokens
    max_capacity = MAX_ROWS if shared.grows else geometry.max_capacity
    more = "" if shared.grows else " (RAY_DEEPEP_HEAP_GIB or CommConfig.heap_gib gives more)"
    if tokens.shape[0] > max_tokens:
        raise InvalidArgumentError("hidden_states", tuple(tokens.shape), f"must hold at most {max_tokens} tokens{more}")
    if shared.shape.padded and int(routes.capacity) > max_capacity:
        rule = f"must be at most {max_capacity}{more}; layout='compact' needs no capacity"
        raise InvalidArgumentError("capacity", int(routes.capacity), rule)


@contextmanager
def _timed(layer: MOELayer, name: str, attribute: str) -> Iterator[None]:
    """Stock's timer ``name`` around a block, its total in ms in the layer's ``attribute``, if breakdown is on."""
    if not layer.wall_clock_breakdown:
        yield
        return
    layer.timers(name).start()
    try:
        yield
    finally:
        # Activation checkpointing may leave a recomputed block early, by an exception.
        layer.timers(name).stop()
        setattr(layer, attribute, layer.timers(name).elapsed(reset=False))
