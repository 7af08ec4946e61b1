"""What the tests of ``ray_deepep.cluster`` run on Ray: an actor class, a stand-in for Ray's worker group, a Train run.

Actors cannot import test modules: register this one with ``ray.cloudpickle.register_pickle_by_value``.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import ray
import torch
import torch.distributed

from ray_deepep import Buffer, CommFaultError
from ray_deepep.cluster import current

ROOT = Path(__file__).parents[1]
TINY = ("--preset", "tiny", "--workers", "2", "--backend", "ray_deepep")


class Worker:
    """What a user's actor may look like."""

    def pid(self) -> int:
        return os.getpid()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def place(self) -> tuple:
        state = current()
        return state.world_rank, state.ranks, state.communicator.rank, state.communicator.num_ranks

    def add_up(self) -> float:
        """Every token to all experts and back; with weights of one, K times itself."""
        with Buffer(current().communicator, num_experts=4, hidden=256, num_topk=4, max_tokens=32) as buffer:
            x = torch.full((8, 256), 1.0 + current().world_rank)
            arrived = buffer.dispatch(x, torch.arange(4).repeat(8, 1))
            per_rank = buffer.combine(arrived.x, arrived.handle).x
            return float(per_rank.mean()) / current().communicator.num_ranks

    def dispatch_until_fault(self) -> CommFaultError:
        with Buffer(current().communicator, num_experts=4, hidden=256, num_topk=1, max_tokens=32) as buffer:
            try:
                while True:
                    buffer.dispatch(torch.ones(8, 256), torch.zeros(8, 1, dtype=torch.int64))
            except CommFaultError as error:
                return error


def stop_in_torchs_bootstrap(actor) -> None:
    """Let this actor's process stop itself when it is to make a process group."""
    torch.distributed.init_process_group = lambda *args, **settings: os.kill(os.getpid(), signal.SIGSTOP)


def new_actor():
    return ray.remote(num_cpus=0.5)(Worker).remote()


class FakeWorkerGroup:
    """As much of Ray Train's worker group as the backend calls, over raw actors."""

    def __init__(self, actors, pids=(7, 7)) -> None:
        self.actors = actors
        self.pids = pids
        self.was_shut_down = False

    def __len__(self) -> int:
        return len(self.actors)

    def execute_single_async(self, rank, function, *args):
        return self.actors[rank].__ray_call__.remote(lambda actor, *a: function(*a), *args)

    def get_workers(self):
        node_id = ray.get_runtime_context().get_node_id()
        metadata = [SimpleNamespace(node_id=node_id, hostname="h", pid=pid) for pid in self.pids]
        return [SimpleNamespace(metadata=m) for m in metadata]

    def get_resources_per_worker(self):
        return {"CPU": 1}

    def shutdown(self) -> None:
        self.was_shut_down = True


class Run:
    """One `python -m train.ray_main` on the cluster of this file."""

    def __init__(self, cluster, out: Path, *arguments: str, **env: str) -> None:
        self.out = out
        command = [sys.executable, "-m", "train.ray_main", *TINY, "--out", str(out), *arguments]
        environment = os.environ | {"RAY_ADDRESS": cluster["gcs"]} | env
        begin = time.monotonic()
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
        self.seconds = time.monotonic() - begin
        self.status = done.returncode
        self.text = done.stdout + done.stderr
        self.faults = [json.loads(line.partition("RAY_DEEPEP_FAULT ")[2]) for line in self.lines("RAY_DEEPEP_FAULT")]

    def lines(self, word: str) -> list[str]:
        return [line for line in self.text.splitlines() if word in line]


class SharedMemoryWatch:
    """Notes what appears in /dev/shm while a run goes."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        while not self._end.wait(0.05):
            self.names |= set(os.listdir("/dev/shm"))

    def __enter__(self) -> "SharedMemoryWatch":
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._end.set()
        self._thread.join()


def attempt_details(cluster, name: str) -> list[str]:
    """Status texts of all attempts of Train runs whose name begins with `name`, as the dashboard has them."""
    with urllib.request.urlopen(f"{cluster['dashboard']}/api/train/v2/runs/v1", timeout=30) as answer:
        runs = json.load(answer)["train_runs"]
    attempts = [attempt for run in runs if run["name"].startswith(name) for attempt in run["attempts"]]
    return [attempt["status_detail"] or "" for attempt in attempts]
