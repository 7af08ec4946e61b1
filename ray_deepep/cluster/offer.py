"""What a Ray cluster offers now, and the wait until a run fits into it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence

import ray

from ..errors import InvalidTypeError
from .nodes import lost_nodes
from .placement import (
    Decision,
    NodeOffer,
    Placement,
    PlacementConfig,
    PlacementRequest,
    decide_at,
)
from .shortage import PlacementError

logger = logging.getLogger("ray_deepep")

_POLL_S = 0.5
_ANSWER_S = 1.0
_TELL_EVERY_S = 10.0


def cluster_offer() -> list[NodeOffer]:
    """Nodes that are alive and stay, with their labels and resources, as Ray's control service knows them.

    A node that has just died, of which the service has not heard, is no more among them.
    """
    state = ray._private.state.state
    free, leaving = state.available_resources_per_node(), state.get_draining_nodes()
    nodes = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving]
    lost = lost_nodes({node["NodeID"] for node in nodes}, _ANSWER_S)
    return [
        NodeOffer(
            node_id=node["NodeID"],
            host=node["NodeManagerHostname"],
            labels=node["Labels"],
            free=free.get(node["NodeID"], {}),
            total=node["Resources"],
        )
        for node in nodes
        if node["NodeID"] not in lost
    ]


def find_placement(
    *,
    num_workers: int,
    ep_size: int | None = None,
    resources_per_worker: Mapping[str, float],
    config: PlacementConfig | None = None,
    offer: Callable[[], Sequence[NodeOffer]] = cluster_offer,
) -> Placement:
    """A node for every rank, waiting up to ``config.wait_s`` until there is room.

    Nothing is reserved: pass ``Placement.label_selectors`` to ``ray.util.placement_group`` for that. While it waits, a
    log line every ten seconds says what is missing.

    Args:
        num_workers: ranks.
        ep_size: ranks of one EP group, consecutive; None: all of them.
        resources_per_worker: as in Ray's ``ScalingConfig``.
        config: how to place.
        offer: what the cluster has now.

    Raises:
        InvalidArgumentError, InvalidTypeError: before anything is asked.
        PlacementError: saying what is missing.
    """
    config = PlacementConfig() if config is None else config
    if not isinstance(config, PlacementConfig):
        raise InvalidTypeError("config", type(config).__name__, "must be a PlacementConfig")
    request = PlacementRequest(
        num_workers=num_workers,
        ep_size=ep_size,
        resources_per_worker=resources_per_worker,
        domain_label=config.domain_label,
        allow_spread=config.allow_spread,
    )
    begin, told = time.monotonic(), 0.0
    while True:
        waited = time.monotonic() - begin
        decision: Decision = decide_at(offer(), request, waited, min(config.settle_s, config.wait_s))
        if isinstance(decision, Placement):
            _tell(decision)
            return decision
        if waited >= config.wait_s:
            raise PlacementError(decision, waited)
        if waited >= told:
            logger.warning("placement: waiting up to %.0f s: %s", config.wait_s - waited, decision)
            told += _TELL_EVERY_S
        time.sleep(min(_POLL_S, config.wait_s - waited))


def _tell(placement: Placement) -> None:
    log = logger.warning if placement.spread_groups else logger.info
    log("placement: %s", placement)
