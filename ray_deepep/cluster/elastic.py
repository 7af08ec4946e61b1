"""Runs on Ray Train whose number of workers follows the cluster.

    scaling = ScalingConfig(num_workers=(2, 4))
    ElasticTrainer(train_fn, ep_sizes={2: 2, 3: 1, 4: 4}, run_key="a name", scaling_config=scaling)

Ray's own elastic policy counts what nodes have in all, looks anew every 20 s, and replaces healthy workers without
a word to them. This one looks at what is free on nodes that answer, takes only numbers of workers that have an EP
degree, and before it adds workers it asks those that train for a checkpoint (``resize.py``).
"""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Mapping
from typing import Any

from ray.train.v2._internal.execution.controller.state import ReschedulingState
from ray.train.v2._internal.execution.scaling_policy import (
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
    ScalingPolicy,
)

from .offer import cluster_offer
from .placement import PlacementConfig
from .placer import WorkerPlacementError
from .resize import forget_resize, request_resize, resize_answered
from .shortage import PlacementShortage
from .sizes import check_ep_sizes, choose_size, without_workers
from .trainer import ExpertParallelTrainer

_POLL_S = 0.5
_TELL_EVERY_S = 10.0


def _tell(text: str) -> None:
    """A line in the job's log, which has only warnings of the controller's loggers."""
    print(f"elastic: {text}", flush=True)


class ElasticPolicy(ScalingPolicy):
    """Decides in the Train controller; see the module.

    Args:
        scaling_config: Ray's, with ``num_workers=(min, max)``.
        ep_sizes: the EP degree at each number of workers that is allowed.
        run_key: what the workers call the run in the key-value store; unique in the cluster.
        placement: what counts as room, and how long to wait for the least.
    """

    def __init__(
        self, scaling_config: Any, *, ep_sizes: Mapping[int, int], run_key: str, placement: PlacementConfig
    ) -> None:
        super().__init__(scaling_config)
        self._ep_sizes = dict(ep_sizes)
        self._run_key = run_key
        self._placement = placement
        self._own: collections.Counter[str] = collections.Counter()
        self._unseen = False
        self._wish = ""
        self._looked = 0.0
        self._short_since: float | None = None
        self._told = 0.0

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """As many workers as have room, or a wait for the least number.

        Raises WorkerPlacementError when the least number has had no room for ``placement.wait_s``.
        """
        self._maybe_send_resource_request()
        self._forget_wish()
        size = self._possible()
        if not isinstance(size, PlacementShortage):
            self._short_since = None
            return self._resize(size)
        now = time.monotonic()
        if self._short_since is None:
            self._short_since = self._told = now
        waited = now - self._short_since
        if waited >= self._placement.wait_s:
            raise WorkerPlacementError(size, waited)
        if now >= self._told:
            _tell(f"waiting up to {self._placement.wait_s - waited:.0f} s: {size}")
            self._told = now + _TELL_EVERY_S
        time.sleep(_POLL_S)  # the controller would ask again at once
        return NoopDecision()

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        """Ask healthy workers to save where more would have room; replace them once they have."""
        self._maybe_send_resource_request()
        self._own = collections.Counter(worker.metadata.node_id for worker in worker_group_state.workers)
        self._unseen = False
        current = worker_group_state.num_workers
        if self._wish:
            if not resize_answered(self._run_key, self._wish):
                return NoopDecision()
            self._forget_wish()
            size = self._possible()
            # They wait to be replaced, whatever has become of the room since.
            return self._resize(current if isinstance(size, PlacementShortage) else size)
        now = time.monotonic()
        since = max(self._looked, worker_group_state.start_time)
        if current == max(self._ep_sizes) or now - since < self.scaling_config.elastic_resize_monitor_interval_s:
            return NoopDecision()
        self._looked = now
        size = self._possible()
        if not isinstance(size, PlacementShortage) and size > current:
            _tell(f"room for {size} workers instead of {current}; asking for a checkpoint")
            self._wish = request_resize(self._run_key)
        return NoopDecision()

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """A start that failed has left no workers behind."""
        if isinstance(current_state, ReschedulingState):
            self._own.clear()
            self._unseen = False

    async def before_controller_shutdown(self) -> None:
        """Leave nothing behind."""
        self._forget_wish()
        await super().before_controller_shutdown()

    def _possible(self) -> int | PlacementShortage:
        resources = self.scaling_config._resources_per_worker_not_none
        nodes = cluster_offer()
        if self._unseen:
            # Workers that failed at once hold something, and nobody has told where. The placement of the next ones
            # finds out whether others have a part of it, and fails if so.
            nodes = [dataclasses.replace(node, free=node.total) for node in nodes]
        nodes = without_workers(nodes, self._own, resources)
        return choose_size(nodes, self._ep_sizes, resources_per_worker=resources, placement=self._placement)

    def _resize(self, num_workers: int) -> ResizeDecision:
        _tell(f"workers {num_workers}, EP degree {self._ep_sizes[num_workers]}")
        self._unseen = True
        return ResizeDecision(
            num_workers=num_workers, resources_per_worker=self.scaling_config._resources_per_worker_not_none
        )

    def _forget_wish(self) -> None:
        if self._wish:
            self._wish = ""
            forget_resize(self._run_key)

    def _get_num_workers_for_resource_request(self) -> int:
        return max(self._ep_sizes)


class ElasticTrainer(ExpertParallelTrainer):
    """A ``TorchTrainer`` under :class:`ElasticPolicy`.

    Args (besides those of ``TorchTrainer``; ``scaling_config`` has ``num_workers=(min, max)``):
        ep_sizes: the EP degree at each number of workers that is allowed; the same as in ``ExpertParallelConfig``.
        run_key: a name that no other run of the cluster has; the training function gives it to ``ResizeHandover``.
        placement: what counts as room, and how long to wait for the least number of workers.

    Raises:
        InvalidArgumentError, InvalidTypeError: ``ep_sizes`` has a degree that does not divide its number of workers.
    """

    def __init__(
        self,
        *args: Any,
        ep_sizes: Mapping[int, int],
        run_key: str,
        placement: PlacementConfig | None = None,
        **kwargs: Any,
    ) -> None:
        check_ep_sizes(ep_sizes)
        super().__init__(*args, **kwargs)
        self._policy = {"ep_sizes": dict(ep_sizes), "run_key": run_key, "placement": placement or PlacementConfig()}

    def _initialize_and_run_controller(self, **settings: Any) -> Any:
        # Ray makes the policy from the ScalingConfig alone, and has no argument for another.
        settings["scaling_policy"] = ElasticPolicy(self.scaling_config, **self._policy)
        return super()._initialize_and_run_controller(**settings)
