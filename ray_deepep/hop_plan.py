"""Who sends which token to which node, and what travels beside the rows, in readable torch."""

from __future__ import annotations

import dataclasses

import torch

from .handle import DispatchHandle


@dataclasses.dataclass(frozen=True, kw_only=True)
class HopPlan:
    """The hop of a dispatch: what its handle holds. M nodes; lists are by node.

    *Landed* tokens are those that this rank takes in for its node, from each node in turn: one per (token, node).
    """

    sequence: int
    """Number of the dispatch that made the plan."""
    topk_idx: torch.Tensor
    """``[T, K]`` int64: this rank's own routing, global ids."""
    topk_weights: torch.Tensor
    """``[T, K]`` float32: its own weights."""
    send_tokens: tuple[torch.Tensor, ...]
    """Own tokens with an expert on the node, ascending."""
    send_routes: tuple[torch.Tensor, ...]
    """Own routes to the node as ``token * K + k``, ascending."""
    num_landed: tuple[int, ...]
    """Tokens that landed from the node."""
    landed_routes: tuple[int, ...]
    """Routes of these to this node."""
    domain_handle: DispatchHandle
    """Of the dispatch of the landed tokens inside the node."""

    @property
    def num_sent(self) -> tuple[int, ...]:
        """Tokens sent to each node."""
        return tuple(len(tokens) for tokens in self.send_tokens)

    @property
    def num_sent_routes(self) -> tuple[int, ...]:
        """Routes sent to each node."""
        return tuple(len(routes) for routes in self.send_routes)


def node_of(topk_idx: torch.Tensor, num_node_experts: int) -> torch.Tensor:
    """Node of each route; -1 where there is none."""
    return topk_idx.div(num_node_experts, rounding_mode="floor")


def tokens_by_node(nodes: torch.Tensor, num_nodes: int) -> tuple[torch.Tensor, ...]:
    """Tokens with a route to each node, ascending, from ``nodes`` ``[T, K]``."""
    return tuple((nodes == node).any(1).nonzero().flatten() for node in range(num_nodes))


def routes_by_node(nodes: torch.Tensor, num_nodes: int) -> tuple[torch.Tensor, ...]:
    """Routes to each node as ``token * K + k``, ascending."""
    flat = nodes.flatten()
    return tuple((flat == node).nonzero().flatten() for node in range(num_nodes))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Routing:
    """What travels beside the rows."""

    topk_idx: torch.Tensor
    """``[T, K]`` int64."""
    topk_weights: torch.Tensor
    """``[T, K]`` float32."""
    locations: torch.Tensor | None
    """``[T, K]`` int32, with padded rows only."""

    def packed(self) -> torch.Tensor:
        """``[T, 2 K or 3 K]`` int32, to travel in one message."""
        parts = [self.topk_idx.to(torch.int32), self.topk_weights.view(torch.int32)]
        return torch.cat(parts if self.locations is None else [*parts, self.locations], dim=1)

    @classmethod
    def unpacked(cls, packed: torch.Tensor, num_topk: int) -> Routing:
        """Inverse of :meth:`packed`."""
        topk_idx, topk_weights, *locations = packed.split(num_topk, dim=1)
        return cls(
            topk_idx=topk_idx.to(torch.int64),
            topk_weights=topk_weights.contiguous().view(torch.float32),
            locations=locations[0].contiguous() if locations else None,
        )

    def localised(self, node: int, num_node_experts: int) -> Routing:
        """As the ranks of ``node`` see it: experts counted from the node's first, -1 where they are elsewhere."""
        here = node_of(self.topk_idx, num_node_experts) == node
        topk_idx = torch.where(here, self.topk_idx - node * num_node_experts, -1)
        return dataclasses.replace(self, topk_idx=topk_idx)
