"""What one worker holds: its communicators and its swap, kept on the actor that they belong to.

The state is an attribute of the actor instance, so it lives exactly as long as the actor and there is one per worker,
whatever thread asks for it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import ray
import torch.distributed as dist

from ..communicator import Communicator
from ..errors import FaultRecord, RayDeepEPError
from ..gpu_events import watch_gpu
from ..health import SEND_EVERY_S, HealthReport, HealthThread
from ..progress import Progress

if TYPE_CHECKING:
    from ..deepspeed import Swap

logger = logging.getLogger("ray_deepep")

_REPORTS_PER_S = 1000
_ATTRIBUTE = "_ray_deepep_state"


class NotBootstrappedError(RayDeepEPError, RuntimeError):
    """``current()`` was called where no communicator was brought up."""


class WorkerState:
    """A worker's part of the job.

    Attributes:
        world_rank, world_size: this worker's place in the job.
        ranks: world ranks of its EP group, ascending.
        communicator: of that EP group.
        swap: DeepSpeed's swapped MoE layers, or None where none was asked for.
        owns_process_group: whether ``close()`` also ends torch.distributed in this process.
    """

    def __init__(
        self,
        *,
        world_rank: int,
        world_size: int,
        ranks: tuple[int, ...],
        communicator: Communicator,
        swap: Swap | None = None,
        owns_process_group: bool = False,
    ) -> None:
        self.world_rank, self.world_size = world_rank, world_size
        self.ranks = ranks
        self.communicator = communicator
        self.swap = swap
        self.owns_process_group = owns_process_group
        self._health: HealthThread | None = None
        self._training = threading.Event()
        self._close_lock = threading.Lock()

    @property
    def fault(self) -> FaultRecord | None:
        """The fault that ended this worker's communicator, or None."""
        return self.communicator.fault

    @property
    def progress(self) -> Progress:
        """Where the training function says what it is at: ``current().progress.phase = "data"``, ``.step = 7``."""
        return self.communicator.progress

    @property
    def is_training(self) -> bool:
        """Whether a training function is running in this worker."""
        return self._training.is_set()

    def set_training(self, training: bool) -> None:
        """Mark the training function as started or ended."""
        (self._training.set if training else self._training.clear)()

    def watch_health(self, send: Callable[[HealthReport], None] | None) -> None:
        """Start this worker's health thread, which gives its reports to ``send``; once."""
        with self._close_lock:
            if self._health is None and not self.communicator.closed:
                uuid = self.communicator.peers[self.communicator.rank].gpu
                watch = watch_gpu(uuid, log=logger.info if self.world_rank == 0 else logger.debug)
                # The board takes some thousand reports a second.
                every_s = max(SEND_EVERY_S, self.world_size / _REPORTS_PER_S)
                self._health = HealthThread(self.communicator, send, gpu_watch=watch, send_every_s=every_s)
                self._health.start()

    def close(self) -> None:
        """Give DeepSpeed its own layers back and leave the EP group. Never waits for a peer; safe to call twice."""
        with self._close_lock:
            if self._health is not None:
                self._health.stop()
            if self.swap is not None:
                self.swap.close()
            self.communicator.close()
            if self.owns_process_group and dist.is_initialized():
                dist.destroy_process_group()


def current() -> WorkerState:
    """The state of the actor that calls: in a training function under ``ExpertParallelConfig``, or in a method of an
    actor that went through ``bootstrap``.

    Raises:
        NotBootstrappedError: there is none here.
    """
    state = find_state(_own_actor())
    if state is None:
        raise NotBootstrappedError(
            "no communicator in this process: pass torch_config=ExpertParallelConfig() to the TorchTrainer, "
            "or call ray_deepep.cluster.bootstrap(actors) first"
        )
    return state


def find_state(actor: Any) -> WorkerState | None:
    """The state kept on an actor instance, or None."""
    return getattr(actor, _ATTRIBUTE, None)


def own_state() -> WorkerState | None:
    """As :func:`current`, None instead of an error."""
    return find_state(_own_actor())


def keep_state(state: WorkerState, actor: Any = None) -> None:
    """Keep ``state`` on an actor instance (this process's own if None), in place of a closed one."""
    setattr(_own_actor() if actor is None else actor, _ATTRIBUTE, state)


def drop_state(actor: Any = None) -> None:
    """Close and forget the state of an actor instance (this process's own if None), if it has one."""
    actor = _own_actor() if actor is None else actor
    state = find_state(actor)
    if state is not None:
        state.close()
        delattr(actor, _ATTRIBUTE)


def _own_actor() -> Any:
    """The actor instance of this process, None outside an actor. Ray keeps it where only its own code looks."""
    worker = ray._private.worker.global_worker
    if not worker.connected or worker.mode != ray.WORKER_MODE:
        return None
    return worker.actors.get(worker.actor_id)
