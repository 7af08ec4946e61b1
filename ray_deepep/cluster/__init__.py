"""ray_deepep on Ray: Ray Train runs, raw actors, and faults that name their culprit. The only part that imports ray."""

from .actors import ActorRank, bootstrap, teardown
from .culprit import Culprit, RankFault, RankState, RankStatus, decide_culprit
from .exchange import RayExchange, make_rendezvous
from .expert_parallel import ExpertParallelConfig, WorkerBootstrapError
from .layout import ep_groups
from .state import NotBootstrappedError, WorkerState, current

__all__ = [
    "ActorRank",
    "Culprit",
    "ExpertParallelConfig",
    "NotBootstrappedError",
    "RankFault",
    "RankState",
    "RankStatus",
    "RayExchange",
    "WorkerBootstrapError",
    "WorkerState",
    "bootstrap",
    "current",
    "decide_culprit",
    "ep_groups",
    "make_rendezvous",
    "teardown",
]
