"""ray_deepep on Ray: Ray Train runs, raw actors, and faults that name their culprit. The only part that imports ray."""

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

__all__ = [
    "ActorRank",
    "Culprit",
    "DomainRoom",
    "ElasticTrainer",
    "Evidence",
    "ExpertParallelConfig",
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
