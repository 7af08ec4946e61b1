"""What the tests of ``ray_deepep.cluster`` run on Ray: an actor class, a stand-in for Ray's worker group, a Train run.

Actors cannot import test modules: register this one with ``ray.cloudpickle.register_pickle_by_value``.
"""

import contextlib
import io
import json
import os
import signal
import threading
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import ray
import torch
import torch.distributed

from ray_deepep import Buffer, CommFaultError, run_files
from ray_deepep.cluster import current
from train import ray_main

ROOT = Path(__file__).parents[1]
TINY = ("--preset", "tiny", "--workers", "2", "--backend", "ray_deepep")


def json_in(text: str) -> dict:
    """The first JSON object of a command's output. Ray prints there too, of what earlier tests killed."""
    begin = 0 if text.startswith("{") else text.index("\n{") + 1
    return json.JSONDecoder().raw_decode(text, begin)[0]


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
    """One `train.ray_main` on the Ray that this process is connected to: a driver of its own would spend seconds on
    imports. What drivers print of faults: test_jobs_ray.py and the example."""

    def __init__(self, out: Path, *arguments: str) -> None:
        self.out = out
        before = len(self._noted())
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            self.status = ray_main.main([*TINY, "--out", str(out), *arguments])
        self.text = printed.getvalue()
        self.faults = self._noted()[before:]
        """As the run's folder has them."""

    def _noted(self) -> list[dict]:
        path = self.out / run_files.FAULTS
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

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


def attempt_details(dashboard: str, name: str) -> list[str]:
    """Status texts of all attempts of Train runs whose name begins with `name`, as the dashboard has them."""
    with urllib.request.urlopen(f"{dashboard}/api/train/v2/runs/v1", timeout=30) as answer:
        runs = json.load(answer)["train_runs"]
    attempts = [attempt for run in runs if run["name"].startswith(name) for attempt in run["attempts"]]
    return [attempt["status_detail"] or "" for attempt in attempts]
