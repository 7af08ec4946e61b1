"""``ExpertParallelConfig``: one argument that turns a Ray Train run into an expert-parallel one.

    TorchTrainer(train_fn, torch_config=ExpertParallelConfig(), scaling_config=ScalingConfig(num_workers=8))

Each worker gets its torch process group as Ray would make it, a communicator of its EP group, and DeepSpeed with
swapped MoE layers; ``ray_deepep.cluster.current()`` gives them to the training function. Faults name their culprit
(see ``supervision.py``), and a worker that does not come up is named within the bootstrap deadline.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ray._common.network_utils import build_address
from ray.train._internal.utils import get_address_and_port
from ray.train.torch.config import TorchConfig, _TorchBackend
from ray.train.v2._internal.constants import RAY_TRAIN_CALLBACKS_ENV_VAR
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError

from .. import env
from ..config import CommConfig
from ..errors import BootstrapError, InvalidArgumentError, InvalidTypeError
from ..fields import check_choice, check_duration, check_int, check_positive, check_str, known_fields
from . import worker
from .gather import first_error, gather, refuse_shared_gpus
from .groups import check_swap
from .layout import ep_groups
from .nodes import lost_nodes
from .placement import PlacementConfig
from .processes import ProcessId, kill_process, on_nodes
from .sizes import check_ep_sizes

if TYPE_CHECKING:
    from ..deepspeed import SwapConfig

logger = logging.getLogger("ray_deepep")

_CALLBACKS = ("ray_deepep.cluster.supervision.FaultSupervisor", "ray_deepep.cluster.placer.Placer")
_STOP_DEADLINE_S = 5.0
_NODE_DEADLINE_S = 5.0
_REACH_DEADLINE_S = 1.0


class WorkerBootstrapError(WorkerGroupStartupFailedError, BootstrapError):
    """A :class:`BootstrapError` that Ray Train retries, as it does every worker group that fails to start.

    ``FailureConfig(controller_failure_limit=…)`` says how often; Ray's default is without limit.
    """


@known_fields
@dataclasses.dataclass
class ExpertParallelConfig(TorchConfig):
    """Ray Train's torch configuration plus expert parallelism.

    Args (besides ``backend``, ``init_method`` and ``timeout_s`` of ``TorchConfig``):
        comm: settings of the communicators; those of the process that makes the config count, not the workers'.
        ep_size: ranks of one EP group, a divisor of the number of workers; None: all workers are one group. Groups are
            consecutive ranks, as in DeepSpeed, and must be those that the model asks DeepSpeed for.
        ep_sizes: the EP degree at each number of workers, for runs whose number may change (``ElasticTrainer``); takes
            the place of ``ep_size``.
        swap: whether to swap DeepSpeed's MoE layers, or how.
        placement: how EP groups are kept inside NVLink domains; None: Ray places the workers as it likes. It also does
            so where ``ScalingConfig`` has a ``label_selector`` or a ``placement_strategy`` other than ``PACK``.
        hang_deadline_s: if no rank goes on to another step, phase or operation for so many seconds, the slowest one
            is taken to hang, and Ray starts the workers again. It must be longer than the longest phase that is meant,
            such as writing a checkpoint, and of use where the training function sets ``current().progress``. 0: only
            the deadlines of collectives find ranks that hang.
        fault_log: a file to which faults are written too, one JSON line each; the node of Ray's controller must see it.
            Empty: the job's log has them alone.

    Raises:
        InvalidArgumentError, InvalidTypeError: a field breaks its rule.
    """

    comm: CommConfig = dataclasses.field(default_factory=CommConfig)
    ep_size: int | None = None
    ep_sizes: Mapping[int, int] | None = None
    swap: bool | SwapConfig = True
    placement: PlacementConfig | None = dataclasses.field(default_factory=PlacementConfig)
    hang_deadline_s: float = dataclasses.field(default_factory=env.hang_deadline_s)
    fault_log: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.comm, CommConfig):
            raise InvalidTypeError("comm", type(self.comm).__name__, "must be a CommConfig")
        if self.placement is not None and not isinstance(self.placement, PlacementConfig):
            raise InvalidTypeError("placement", type(self.placement).__name__, "must be a PlacementConfig, or None")
        if self.ep_size is not None:
            check_int("ep_size", self.ep_size, least=1)
        if self.ep_sizes is not None:
            check_ep_sizes(self.ep_sizes)
        check_swap(self.swap)
        check_duration("hang_deadline_s", self.hang_deadline_s)
        check_str("fault_log", self.fault_log)
        if self.backend is not None:
            check_str("backend", self.backend)
        check_choice("init_method", self.init_method, ("env", "tcp"))
        check_positive("timeout_s", self.timeout_s)
        register_callbacks()

    def ep_size_of(self, num_workers: int) -> int | None:
        """Ranks of one EP group among ``num_workers``; None: all of them.

        Raises InvalidArgumentError where ``ep_sizes`` does not have that number.
        """
        if self.ep_sizes is None:
            return self.ep_size
        if num_workers not in self.ep_sizes:
            raise InvalidArgumentError("ep_sizes", dict(self.ep_sizes), f"has no EP degree for {num_workers} workers")
        return self.ep_sizes[num_workers]

    @property
    def backend_cls(self):
        return ExpertParallelBackend

    @property
    def train_func_context(self):
        return worker.TrainingThread

    def to_dict(self) -> dict[str, Any]:
        """Fields as Ray shows them with the run."""
        swap = self.swap if isinstance(self.swap, bool) else dataclasses.asdict(self.swap)
        placement = None if self.placement is None else dataclasses.asdict(self.placement)
        fields = {
            "comm": dataclasses.asdict(self.comm),
            "ep_size": self.ep_size,
            "ep_sizes": None if self.ep_sizes is None else {str(n): size for n, size in self.ep_sizes.items()},
            "swap": swap,
            "placement": placement,
            "hang_deadline_s": self.hang_deadline_s,
            "fault_log": self.fault_log,
        }
        return super().to_dict() | fields


class ExpertParallelBackend(_TorchBackend):
    """Runs in the Train controller. A singleton in Ray's hands: it keeps nothing between calls."""

    def on_start(self, worker_group, backend_config: ExpertParallelConfig) -> None:
        """Bring all workers up, or raise within the bootstrap deadline, naming who is missing."""
        try:
            _start(worker_group, backend_config)
        except Exception:
            # Ray keeps no reference to a group that fails here, and would leave its actors and its placement group.
            worker_group.shutdown()
            raise

    def on_shutdown(self, worker_group, backend_config: ExpertParallelConfig) -> None:
        """Tear down the workers that can; end those that cannot. A stopped process would outlive an actor call."""
        processes = worker_processes(worker_group)
        lost = lost_nodes({process.node_id for process in processes}, _REACH_DEADLINE_S)
        ranks = [rank for rank, process in enumerate(processes) if process.node_id not in lost]
        refs = [worker_group.execute_single_async(rank, worker.stop_worker) for rank in ranks]
        answers = gather(refs, _STOP_DEADLINE_S, stop_at_error=False)
        for index, error in answers.errors.items():
            if index not in answers.dead:
                logger.warning("rank %d did not stop cleanly: %s", ranks[index], error)
        silent = [ranks[index] for index in answers.missing]
        for rank, done in zip(silent, on_nodes(kill_process, [processes[r] for r in silent], _NODE_DEADLINE_S)):
            if done:
                logger.warning("killed rank %d (%s), which did not answer", rank, processes[rank])


def _start(worker_group, config: ExpertParallelConfig) -> None:
    num_workers = len(worker_group)
    groups = ep_groups(num_workers, config.ep_size_of(num_workers))
    # Alive and answering first: inside a collective, one stopped worker makes all of them silent.
    addresses = _call_all(worker_group, "reach", [(get_address_and_port,)] * num_workers, config)
    address, port = addresses[0]
    spec = worker.WorkerSpec(
        world_rank=0,
        world_size=num_workers,
        ep_groups=groups,
        comm=config.comm,
        swap=config.swap,
        backend=config.backend or ("nccl" if worker_group.get_resources_per_worker().get("GPU", 0) > 0 else "gloo"),
        init_method="env://" if config.init_method == "env" else f"tcp://{build_address(address, port)}",
        master_addr=address,
        master_port=port,
        timeout_s=config.timeout_s,
    )
    calls = [(worker.start_worker, dataclasses.replace(spec, world_rank=rank)) for rank in range(num_workers)]
    starts: list[worker.WorkerStart] = _call_all(worker_group, "start", calls, config)
    refuse_shared_gpus([start.gpu for start in starts], config.comm)
    reason = starts[0].transport, starts[0].transport_reason
    sizes = f"{len(groups)} EP group{'s' if len(groups) > 1 else ''} of {len(groups[0])}"
    logger.info("expert parallel: %d workers, %s, transport %s: %s", num_workers, sizes, *reason)


def _call_all(worker_group, phase: str, calls: list[tuple], config: ExpertParallelConfig) -> list[Any]:
    """One call on each rank, all answers in rank order.

    Raises:
        WorkerBootstrapError: a worker died or did not answer in time.
        Exception: what a worker raised.
    """
    deadline_s = config.comm.bootstrap_deadline_s
    refs = [worker_group.execute_single_async(rank, *call) for rank, call in enumerate(calls)]
    answers = gather(refs, deadline_s)
    error = first_error(answers, phase=phase, deadline_s=deadline_s, who=worker_processes(worker_group))
    if isinstance(error, BootstrapError):
        raise WorkerBootstrapError(error.phase, error.missing, error.deadline_s, error.detail) from None
    if error is not None:
        raise error
    return [answers.values[rank] for rank in range(len(calls))]


def worker_processes(worker_group) -> list[ProcessId]:
    """Each rank's process."""
    return [ProcessId.of(worker.metadata) for worker in worker_group.get_workers()]


def register_callbacks() -> None:
    """Have Ray Train load fault supervision and placement in every run of this process.

    Its environment variable is the one way that needs no edit of the user's ``RunConfig``. Both do nothing in runs
    without ``ExpertParallelConfig``.
    """
    paths = env.ray_train_callbacks()
    missing = [path for path in _CALLBACKS if path not in paths]
    if missing:
        os.environ[RAY_TRAIN_CALLBACKS_ENV_VAR] = ",".join([*paths, *missing])
