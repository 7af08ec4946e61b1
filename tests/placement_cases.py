"""What tests/test_placement_ray.py runs on Ray. Workers cannot import test modules: register this one by value."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import ray
import ray.train
import torch

from ray_deepep import Buffer
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


def await_health_thread() -> None:
    """Until this worker tells the supervisor where it is; on a busy machine, training starts long before."""
    while not any(thread.name == "ray_deepep health" for thread in threading.enumerate()):
        time.sleep(0.01)


def lose_this_node(waiting: Path) -> None:
    """Kill its Ray daemon and this worker, once file ``waiting`` is there and all have told where they are."""
    while not waiting.exists():
        time.sleep(0.01)
    time.sleep(5.0)  # they tell twice a second, but where other tests compute it takes them longer
    os.kill(os.getppid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def lose_node(config: dict) -> None:
    """Training function of six steps, each with a checkpoint. Node ``doomed`` dies in step 3 of the first attempt."""
    here, rank = ray.get_runtime_context().get_node_id(), current().world_rank
    checkpoint = ray.train.get_checkpoint()
    first = int(Path(checkpoint.path, "step").read_text()) + 1 if checkpoint else 1
    attempt = 1 if checkpoint is None else 2
    Path(config["folder"], f"attempt{attempt}-rank{rank}").write_text(here)
    buffer = Buffer(current().communicator, num_experts=4, hidden=256, num_topk=1, max_tokens=32)
    for step in range(first, 7):
        current().progress.step, current().progress.phase = step, "data"
        if attempt == 1 and step == 3:
            await_health_thread()
            waiting = Path(config["folder"], "the other waits")
            if here == config["doomed"]:
                lose_this_node(waiting)
            waiting.touch()
        buffer.dispatch(torch.ones(8, 256), torch.zeros(8, 1, dtype=torch.int64))
        folder = Path(config["folder"], f"checkpoint{step}")
        folder.mkdir(exist_ok=True)
        (folder / "step").write_text(str(step))
        ray.train.report({"step": step}, checkpoint=ray.train.Checkpoint(folder) if rank == 0 else None)
