"""Bringing torch.distributed up for a run, and the few collective helpers the trainer needs.

A group that already exists (Ray Train made it) is used and left alone. Under torchrun the group comes from its
environment; a process started alone becomes a group of one.
"""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from train.config import RunConfig
from train.errors import ConfigError

_GLOO_GRACE_S = 0.05


@dataclass(frozen=True, kw_only=True)
class World:
    """This process's place in the job."""

    rank: int
    """Index in the job."""
    world_size: int
    """Processes in the job."""
    device: torch.device
    """Where this process computes."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0


@contextmanager
def join_world(config: RunConfig) -> Iterator[World]:
    """Join the process group, making it if there is none; a group made here is destroyed after a run that ended well.

    After an exception it is left as it is: destroying a group whose peer died can wait for that peer.
    """
    device_type = _device_type(config.device)
    owned = not dist.is_initialized()
    if owned:
        _init_process_group(device_type, config.dist_timeout_s)
    _skip_shared_memory_op()
    # DeepSpeed insists on this variable, even where a process has one device and nothing to look up.
    os.environ.setdefault("LOCAL_RANK", "0")
    device = torch.device("cpu")
    if device_type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    yield World(rank=dist.get_rank(), world_size=dist.get_world_size(), device=device)
    if owned:
        deepspeed.comm.destroy_process_group()
        if device_type == "cpu":
            # DeepSpeed keeps its groups, so gloo's threads live on. One that still has work to put away when Python
            # ends aborts the process.
            time.sleep(_GLOO_GRACE_S)


def _device_type(wanted: str) -> str:
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise ConfigError("run.device", wanted, "torch sees no GPU here; use cpu, or auto")
    chosen = "cuda" if available and wanted != "cpu" else "cpu"
    accelerator = get_accelerator().device_name()
    if accelerator != chosen:
        raise ConfigError("run.device", wanted, f"DeepSpeed uses {accelerator}: start with DS_ACCELERATOR={chosen}")
    return chosen


def _init_process_group(device_type: str, timeout_s: float) -> None:
    # NCCL refuses ranks that share a GPU, as under torchrun with more of them than there are.
    alone = device_type == "cuda" and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) <= torch.cuda.device_count()
    backend = "nccl" if alone else "gloo"
    timeout = datetime.timedelta(seconds=timeout_s)
    if dist.is_torchelastic_launched():
        if device_type == "cuda":
            torch.cuda.set_device(dist.get_node_local_rank() % torch.cuda.device_count())
        dist.init_process_group(backend, timeout=timeout)
        return
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)


def _skip_shared_memory_op() -> None:
    """Keep DeepSpeed from compiling its CPU shared-memory op, which takes a minute on a first run.

    Only `inference_all_reduce` uses it, so training loses nothing. DeepSpeed keeps this table editable.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


@contextmanager
def cpu_threads(num_threads: int) -> Iterator[None]:
    """Inside, torch uses this many threads; 0 leaves its own number."""
    before = torch.get_num_threads()
    if num_threads:
        torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def mean_over_ranks(values: list[float], world: World) -> list[float]:
    """Average each number over all ranks, in fp64; the same result everywhere."""
    if world.world_size == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=world.device)
    dist.all_reduce(tensor)
    return (tensor / world.world_size).tolist()


def on_main(world: World, function: Callable[[], Any]) -> Any:
    """Run `function` on rank 0 and give its result to every rank; what it raises there is raised on all ranks."""
    outcome: list[Any] = [None, None]
    if world.is_main:
        try:
            outcome[0] = function()
        except Exception as error:  # re-raised below, on every rank
            outcome[1] = error
    if world.world_size > 1:
        dist.broadcast_object_list(outcome, src=0, device=world.device)
    result, error = outcome
    if error is not None:
        raise error
    return result


def gather_objects(world: World, value: Any) -> list[Any]:
    """Every rank's `value`, in rank order."""
    if world.world_size == 1:
        return [value]
    gathered: list[Any] = [None] * world.world_size
    dist.all_gather_object(gathered, value)
    return gathered
