"""``ExpertParallelTrainer``: Ray Train's ``TorchTrainer`` that starts nothing it has no use for."""

from __future__ import annotations

from typing import Any

from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.execution.callback import WorkerGroupCallback

from ..errors import InvalidArgumentError


class ExpertParallelTrainer(TorchTrainer):
    """A ``TorchTrainer``, with the same arguments; a plain one serves as well.

    Without ``datasets``, Ray Train still starts a process for them with each attempt of a run: 3 s of processor time
    and 200 MB on the head's node. This one does not.
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        if self.datasets:
            return callbacks
        return [_NoDatasets() if isinstance(callback, DatasetsCallback) else callback for callback in callbacks]


class _NoDatasets(WorkerGroupCallback):
    """In place of what would start a process for datasets."""

    def before_init_train_context(self, workers: list[Any]) -> dict[str, list[Any]]:
        return {"dataset_shard_provider": [_NoShards()] * len(workers)}


class _NoShards:
    """What ``ray.train.get_dataset_shard`` asks."""

    def get_dataset_shard(self, dataset_info: Any) -> Any:
        raise InvalidArgumentError("dataset_name", dataset_info.dataset_name, "the trainer was given no datasets")
