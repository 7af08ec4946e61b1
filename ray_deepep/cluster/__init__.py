"""ray_deepep on Ray: Ray Train runs, raw actors, and faults that name their culprit. The only part that imports ray.

Names are loaded when first used: what submits a job or asks for its state needs neither torch nor Ray Train.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy_names import lazy_getattr

if TYPE_CHECKING:
    from .actors import ActorRank, bootstrap, teardown
    from .culprit import Culprit, Evidence, RankFault, RankState, RankStatus
    from .decision import decide_culprit, decide_hung
    from .elastic import ElasticTrainer
    from .exchange import RayExchange, make_rendezvous
    from .expert_parallel import ExpertParallelConfig, WorkerBootstrapError
    from .layout import ep_groups
    from .offer import cluster_offer, find_placement
    from .placement import (
        NodeOffer,
        Placement,
        PlacementConfig,
        PlacementRequest,
        decide_placement,
    )
    from .resize import HandoverError, ResizeHandover
    from .shortage import DomainRoom, PlacementError, PlacementShortage
    from .state import NotBootstrappedError, WorkerState, current
    from .trainer import ExpertParallelTrainer

__all__ = [
    "ActorRank",
    "Culprit",
    "DomainRoom",
    "ElasticTrainer",
    "Evidence",
    "ExpertParallelConfig",
    "ExpertParallelTrainer",
    "HandoverError",
    "NodeOffer",
    "NotBootstrappedError",
    "Placement",
    "PlacementConfig",
    "PlacementError",
    "PlacementRequest",
    "PlacementShortage",
    "RankFault",
    "RankState",
    "RankStatus",
    "RayExchange",
    "ResizeHandover",
    "WorkerBootstrapError",
    "WorkerState",
    "bootstrap",
    "cluster_offer",
    "current",
    "decide_culprit",
    "decide_hung",
    "decide_placement",
    "ep_groups",
    "find_placement",
    "make_rendezvous",
    "teardown",
]

_NAMES_OF = {
    "actors": ("ActorRank", "bootstrap", "teardown"),
    "culprit": ("Culprit", "Evidence", "RankFault", "RankState", "RankStatus"),
    "decision": ("decide_culprit", "decide_hung"),
    "elastic": ("ElasticTrainer",),
    "exchange": ("RayExchange", "make_rendezvous"),
    "expert_parallel": ("ExpertParallelConfig", "WorkerBootstrapError"),
    "layout": ("ep_groups",),
    "offer": ("cluster_offer", "find_placement"),
    "placement": ("NodeOffer", "Placement", "PlacementConfig", "PlacementRequest", "decide_placement"),
    "resize": ("HandoverError", "ResizeHandover"),
    "shortage": ("DomainRoom", "PlacementError", "PlacementShortage"),
    "state": ("NotBootstrappedError", "WorkerState", "current"),
    "trainer": ("ExpertParallelTrainer",),
}
__getattr__ = lazy_getattr(__name__, _NAMES_OF)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
