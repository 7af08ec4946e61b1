"""The stock gate, called as the stock layer calls it, and its answer in the terms of dispatch."""

from __future__ import annotations

import torch
from deepspeed.moe.sharded_moe import MOELayer, TopKGate

from .exchange import Routes


def route(layer: MOELayer, tokens: torch.Tensor, used_token: torch.Tensor | None) -> Routes:
    """Run ``layer``'s gate on ``tokens`` ``[T, M]`` and set ``l_aux`` and ``exp_counts`` of the layer.

    A rank without tokens runs the gate too, because a gate that drops nothing agrees on the capacity with the group.
    """
    if tokens.shape[0] == 0:
        return _route_nothing(layer, tokens)
    layer.l_aux, capacity, _, indices, locations, gates, layer.exp_counts = layer.gate(
        tokens, used_token, True, layer.use_tutel
    )
    return _routes(indices, locations, gates, capacity)


def bounds_routes(layer: MOELayer) -> bool:
    """Whether the capacity, known to the host, bounds the routes of a rank to an expert."""
    return type(layer.gate) is TopKGate and layer.gate.drop_tokens


def _route_nothing(layer: MOELayer, tokens: torch.Tensor) -> Routes:
    used_token = None
    if getattr(layer.gate, "k", None) == 1:
        # The top-1 gate refuses fewer tokens than min_capacity; it gets that many, marked unused.
        phantoms = max(int(layer.gate.min_capacity), 1)
        tokens = tokens.new_zeros(phantoms, tokens.shape[1])
        used_token = torch.zeros(phantoms, dtype=torch.int64, device=tokens.device)
    l_aux, capacity, _, indices, locations, gates, layer.exp_counts = layer.gate(
        tokens, used_token, True, layer.use_tutel
    )
    # Means over no tokens are NaN. No tokens means nothing to balance; gradients are zero either way.
    layer.l_aux = l_aux.nan_to_num(0.0)
    return _routes(indices[:, :0], locations[:, :0], gates[:, :0], capacity)


def _routes(indices: torch.Tensor, locations: torch.Tensor, gates: torch.Tensor, capacity: torch.Tensor) -> Routes:
    return Routes(
        topk_idx=indices.t().contiguous(),
        locations=locations,
        gates=gates,
        capacity=capacity,
    )
