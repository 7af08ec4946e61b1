"""How many workers an elastic run gets: a pure decision over what a cluster offers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from ..errors import InvalidArgumentError
from .layout import ep_groups
from .placement import NodeOffer, Placement, PlacementConfig, PlacementRequest, decide_placement
from .shortage import PlacementShortage


def check_ep_sizes(ep_sizes: Mapping[int, int]) -> None:
    """Raises InvalidArgumentError or InvalidTypeError unless each EP degree divides its number of workers."""
    if not ep_sizes:
        raise InvalidArgumentError("ep_sizes", dict(ep_sizes), "must name at least one number of workers")
    for num_workers, ep_size in ep_sizes.items():
        ep_groups(num_workers, ep_size)


def choose_size(
    nodes: Sequence[NodeOffer],
    ep_sizes: Mapping[int, int],
    *,
    resources_per_worker: Mapping[str, float],
    placement: PlacementConfig,
) -> int | PlacementShortage:
    """The largest number of workers that has room, or what the smallest one lacks.

    Args:
        nodes: what there is.
        ep_sizes: the EP degree at each number of workers that is allowed.
        resources_per_worker: as in Ray's ``ScalingConfig``.
        placement: what counts as room; its times are not used.
    """
    decision = None
    for num_workers in sorted(ep_sizes, reverse=True):
        request = PlacementRequest(
            num_workers=num_workers,
            ep_size=ep_sizes[num_workers],
            resources_per_worker=resources_per_worker,
            domain_label=placement.domain_label,
            allow_spread=placement.allow_spread,
        )
        decision = decide_placement(nodes, request)
        if isinstance(decision, Placement):
            return num_workers
    return decision


def without_workers(
    nodes: Sequence[NodeOffer], workers: Mapping[str, int], resources_per_worker: Mapping[str, float]
) -> list[NodeOffer]:
    """What ``nodes`` would offer without a run's own workers. workers: how many it has, by id of the node."""
    return [
        dataclasses.replace(node, free=_freed(node, workers.get(node.node_id, 0), resources_per_worker))
        for node in nodes
    ]


def _freed(node: NodeOffer, num_workers: int, resources: Mapping[str, float]) -> dict[str, float]:
    freed = {
        # Where they have gone already, what they had is free: a node has never more than its total.
        name: min(node.free.get(name, 0.0) + num_workers * amount, node.total.get(name, 0.0))
        for name, amount in resources.items()
    }
    return {**node.free, **freed}
