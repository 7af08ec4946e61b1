"""``ExpertParallelTrainer``, without a Ray: what Ray Train is told to start."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("ray", reason="ray_deepep.cluster needs Ray")

from ray.train import ScalingConfig
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.execution.callback import WorkerGroupCallback

from ray_deepep import InvalidArgumentError
from ray_deepep.cluster import ElasticTrainer, ExpertParallelConfig, ExpertParallelTrainer


def callbacks_of(trainer: ExpertParallelTrainer) -> list:
    return trainer._create_default_callbacks()


def for_datasets(callbacks: list) -> list:
    return [callback for callback in callbacks if isinstance(callback, DatasetsCallback)]


def shard_providers(callbacks: list, num_workers: int) -> list:
    """What the workers' contexts get, as Ray's worker group asks for it."""
    workers = [SimpleNamespace(metadata=None)] * num_workers
    asked = [callback.before_init_train_context(workers) for callback in callbacks if _makes_contexts(callback)]
    return [provider for answer in asked for provider in answer.get("dataset_shard_provider", ())]


def _makes_contexts(callback: object) -> bool:
    return isinstance(callback, WorkerGroupCallback) and not isinstance(callback, DatasetsCallback)


@pytest.mark.parametrize("elastic", (False, True))
def test_no_process_for_no_datasets(elastic: bool) -> None:
    scaling = ScalingConfig(num_workers=(1, 2) if elastic else 2)
    arguments = {"torch_config": ExpertParallelConfig(), "scaling_config": scaling}
    if elastic:
        trainer = ElasticTrainer(print, ep_sizes={1: 1, 2: 2}, run_key="r", **arguments)
    else:
        trainer = ExpertParallelTrainer(print, **arguments)
    callbacks = callbacks_of(trainer)
    assert for_datasets(callbacks) == []
    first, second = shard_providers(callbacks, 2)
    assert first is second
    with pytest.raises(InvalidArgumentError, match="dataset_name: the trainer was given no datasets; got 'train'"):
        first.get_dataset_shard(SimpleNamespace(dataset_name="train"))


def test_datasets_are_served_as_ever() -> None:
    trainer = ExpertParallelTrainer(
        print, scaling_config=ScalingConfig(num_workers=1), datasets={"train": lambda: None}
    )
    callbacks = callbacks_of(trainer)
    assert len(for_datasets(callbacks)) == 1
    assert shard_providers(callbacks, 1) == []
