"""What tests/test_placement_ray.py runs on Ray. Workers cannot import test modules: register this one by value."""

import json
from pathlib import Path

import ray
import ray.train

from ray_deepep.cluster import current


def note_place(config: dict) -> None:
    """Training function: each worker writes where it runs and in which EP group."""
    context = ray.train.get_context()
    place = {
        "node_id": ray.get_runtime_context().get_node_id(),
        "ranks": list(current().ranks),
        "local_rank": context.get_local_rank(),
    }
    Path(config["folder"], f"{context.get_world_rank()}.json").write_text(json.dumps(place))
