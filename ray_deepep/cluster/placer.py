"""``Placer``: runs in the Train controller and pins every worker of an expert-parallel run to the node of its rank.

Ray Train gives each worker one bundle of a placement group, and numbers its workers node by node, in the order of the
bundles. So a label selector per bundle, in the order of the ranks, decides both the node and the rank.
"""

from __future__ import annotations

import logging
from typing import Any

from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback

from .expert_parallel import ExpertParallelConfig
from .offer import find_placement
from .placement import Placement
from .shortage import PlacementError

logger = logging.getLogger("ray_deepep")


class WorkerPlacementError(WorkerGroupStartupFailedError, PlacementError):
    """A :class:`PlacementError` that Ray Train retries, as it does every worker group that fails to start.

    ``FailureConfig(controller_failure_limit=…)`` says how often; Ray's default is without limit.
    """


class Placer(ControllerCallback, WorkerGroupCallback):
    """See the module. Loaded through ``RAY_TRAIN_CALLBACKS``; inactive in runs without ``ExpertParallelConfig``."""

    def __init__(self) -> None:
        self._config: ExpertParallelConfig | None = None
        self._placement: Placement | None = None

    def after_controller_start(self, train_run_context) -> None:
        if isinstance(train_run_context.backend_config, ExpertParallelConfig):
            self._config = train_run_context.backend_config

    def before_worker_group_start(self, worker_group_context) -> None:
        self._placement = None
        if self._config is None or self._config.placement is None:
            return
        if worker_group_context.label_selector or worker_group_context.placement_strategy != "PACK":
            logger.info("placement: left to Ray, because ScalingConfig has a label_selector or placement_strategy")
            return
        try:
            self._placement = find_placement(
                num_workers=worker_group_context.num_workers,
                ep_size=self._config.ep_size_of(worker_group_context.num_workers),
                resources_per_worker=worker_group_context.resources_per_worker,
                config=self._config.placement,
            )
        except PlacementError as error:
            raise WorkerPlacementError(error.shortage, error.waited_s) from None
        # Ray's hook for selectors, on_controller_start_worker_group, knows only one for all workers; this object, made
        # for this start and read right after this call, holds one for each. It is frozen.
        object.__setattr__(worker_group_context, "label_selector", self._placement.label_selectors)

    def after_worker_group_start(self, worker_group: Any) -> None:
        if self._placement is None:
            return
        nodes = [worker.metadata.node_id for worker in worker_group.get_workers()]
        moved = [place.world_rank for place in self._placement.ranks if nodes[place.world_rank] != place.node_id]
        if moved:
            logger.warning("placement: Ray put ranks %s on other nodes than planned; EP groups may span domains", moved)
