"""What ``ExpertParallelConfig`` runs inside each Ray Train worker: start, the training thread's frame, stop."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from typing import TYPE_CHECKING

import torch.distributed as dist
from ray.train.torch.config import (
    TorchConfigContextManager,
    _set_torch_distributed_env_vars,
    _setup_torch_process_group,
)
from ray.train.v2._internal.execution.context import get_train_context

from ..communicator import Communicator
from ..config import CommConfig
from ..errors import BootstrapError
from . import groups, state
from .board import BoardSender

if TYPE_CHECKING:
    from ..deepspeed import SwapConfig

logger = logging.getLogger("ray_deepep")


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkerSpec:
    """What a worker needs to come up; the same on all ranks but ``world_rank``."""

    world_rank: int
    world_size: int
    ep_groups: tuple[tuple[int, ...], ...]
    """World ranks of every EP group."""
    comm: CommConfig
    swap: bool | SwapConfig
    backend: str
    """torch.distributed backend."""
    init_method: str
    master_addr: str
    master_port: int
    timeout_s: int
    """Deadline of a torch.distributed operation."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkerStart:
    """What came up in a worker."""

    transport: str
    transport_reason: str
    gpu: str
    """UUID of the GPU that it uses; empty if its transport uses none."""

    @classmethod
    def of(cls, communicator: Communicator) -> WorkerStart:
        """From the worker's communicator."""
        return cls(
            transport=communicator.transport,
            transport_reason=communicator.transport_reason,
            gpu=communicator.gpu,
        )


def start_worker(spec: WorkerSpec) -> WorkerStart:
    """Process group, communicator, swap. Collective.

    Runs on the actor's main thread; what is made here is used by the training thread.
    """
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = spec.master_addr, str(spec.master_port)
    # Else NCCL's watchdog ends the process after an error of a kernel, before the worker can say what it was.
    os.environ.setdefault("TORCH_NCCL_RETHROW_CUDA_ERRORS", "0")
    _set_torch_distributed_env_vars()
    TorchConfigContextManager().__enter__()  # all it does: this thread's CUDA device
    _setup_torch_process_group(
        backend=spec.backend,
        world_rank=spec.world_rank,
        world_size=spec.world_size,
        init_method=spec.init_method,
        timeout_s=spec.timeout_s,
    )
    ranks, group = groups.own_ep_group(
        spec.ep_groups, spec.world_rank, spec.timeout_s, deadline_s=spec.comm.bootstrap_deadline_s
    )
    try:
        communicator = Communicator.from_process_group(group, config=spec.comm)
    except BootstrapError as error:
        # Nobody named: torch's store, which is in the process of world rank 0.
        missing = [ranks[rank] for rank in error.missing] or [0]
        raise BootstrapError(error.phase, missing, error.deadline_s, error.detail) from None
    try:
        swap = groups.swap_deepspeed(spec.swap, communicator, ranks, spec.comm)
    except BaseException:
        communicator.close()
        raise
    state.keep_state(
        state.WorkerState(
            world_rank=spec.world_rank,
            world_size=spec.world_size,
            ranks=ranks,
            communicator=communicator,
            swap=swap,
        )
    )
    return WorkerStart.of(communicator)


class TrainingThread(TorchConfigContextManager):
    """Around the training function, on its thread.

    A training function that fails leaves the EP group at once: its peers then fail in milliseconds, not at their
    deadline.
    """

    def __enter__(self) -> None:
        super().__enter__()
        worker = state.own_state()
        if worker is not None:
            worker.set_training(True)

    def __exit__(self, kind, error, traceback) -> bool:
        worker = state.own_state()
        if worker is not None:
            worker.set_training(False)
            if error is not None:
                worker.close()
        return super().__exit__(kind, error, traceback)


def watch_health(send: BoardSender) -> None:
    """Have this worker tell how it is from now on, while the training thread works or waits."""
    worker = state.own_state()
    if worker is not None:
        worker.watch_health(send)


def stop_worker() -> bool:
    """Leave the EP group and the process group; False if the training function still runs, which needs them.

    Then the process is about to be killed, and closing under a running collective would turn its fault into a crash.
    """
    worker = state.own_state()
    if worker is not None and worker.is_training:
        return False
    state.drop_state()
    if dist.is_initialized():
        dist.destroy_process_group()
    return True


def raised_within(deadline_s: float) -> Exception | None:
    """What the training function raised, once it has or has ended or the deadline has passed; runs in the worker."""
    runner, end = get_train_context().execution_context.training_thread_runner, time.monotonic() + deadline_s
    while runner.get_error() is None and runner.is_running() and time.monotonic() < end:
        time.sleep(0.02)
    return runner.get_error()
