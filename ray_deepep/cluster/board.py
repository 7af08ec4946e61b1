"""Health reports on their way from the workers to the Train controller, through a small actor between them.

The actor keeps the last word of a worker that can say nothing more, and its clock says how long ago that was.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..health import HealthReport
from . import board_actor

logger = logging.getLogger("ray_deepep")

_MAX_PENDING = 64
"""Reports that a worker may have under way. A board that takes none must not fill the worker's memory."""


def make_board() -> ray.actor.ActorHandle:
    """Start the actor, on this node if it can be; it lives as long as its handles."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    # By value, so that its process does not import this package and torch with it.
    ray.cloudpickle.register_pickle_by_value(board_actor)
    try:
        options = {"num_cpus": 0, "max_restarts": -1, "max_pending_calls": _MAX_PENDING, "scheduling_strategy": here}
        return ray.remote(**options)(board_actor.Board).remote()
    finally:
        ray.cloudpickle.unregister_pickle_by_value(board_actor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BoardSender:
    """Sends the reports of one worker; what ``HealthThread`` calls. Never waits."""

    board: ray.actor.ActorHandle
    attempt: int
    world_rank: int

    def __call__(self, report: HealthReport) -> None:
        self.board.put.remote(self.attempt, self.world_rank, report.to_json())


def read_board(board: ray.actor.ActorHandle | None, attempt: int, timeout_s: float) -> Mapping[int, HealthReport]:
    """Newest report of every world rank that sent one in this attempt; empty where the board does not answer."""
    if board is None:
        return {}
    try:
        found = ray.get(board.read.remote(attempt), timeout=timeout_s)
    except ray.exceptions.RayError as error:
        logger.debug("the board of health reports does not answer: %s", error)
        return {}
    return {rank: HealthReport.from_json(text, silent_s=silent_s) for rank, (silent_s, text) in found.items()}
