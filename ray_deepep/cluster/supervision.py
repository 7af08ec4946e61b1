"""``FaultSupervisor``: runs in the Train controller, names the culprit of a fault, and puts it where it is looked for.

One ``RAY_DEEPEP_FAULT {json}`` line in the job log, the worker's error in the run's status (from which Ray makes the
attempt's error and, when no retry is left, the exception), and the metric ``ray_deepep_faults``.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Mapping

import torch.distributed as dist
from ray.exceptions import RayActorError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback, WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.util.metrics import Counter

from ..errors import FAULT_LOG_PREFIX, CommFaultError, FaultRecord, RayDeepEPError
from . import worker
from .culprit import Culprit, RankFault, RankState, RankStatus, decide_culprit
from .expert_parallel import ExpertParallelConfig, worker_processes
from .gather import gather, one_line
from .layout import ep_groups, group_of
from .processes import ProcessId, kill_process, on_nodes, process_state

_ANSWER_DEADLINE_S = 1.0
_SETTLE_S = 1.0
"""A fault reaches the ranks within milliseconds of each other, not at once."""
_WORKER_EXIT = re.compile(r"^.*?(?=Worker exit type: )", re.DOTALL)
"""What Ray says before the reason of a death: ids, and that the actor died."""
_COLLECTIVE_WORDS = ("gloo", "NCCL", "ProcessGroup", "Connection closed by peer", "Connection reset by peer")


class WorkerFaultError(RayDeepEPError, RuntimeError):
    """The error of a worker that is to blame for a fault and has none of its own (it was stopped or late)."""

    def __init__(self, culprit: Culprit) -> None:
        self.culprit = culprit
        super().__init__(str(culprit))

    def __reduce__(self):
        return type(self), (self.culprit,)


class FaultSupervisor(ControllerCallback, WorkerGroupCallback):
    """See the module. Loaded through ``RAY_TRAIN_CALLBACKS``; inactive in runs without ``ExpertParallelConfig``."""

    def __init__(self) -> None:
        self._config: ExpertParallelConfig | None = None
        self._run_name = ""
        self._attempt = 0
        self._group = None
        self._reported = False

    def after_controller_start(self, train_run_context) -> None:
        if isinstance(train_run_context.backend_config, ExpertParallelConfig):
            self._config = train_run_context.backend_config
            self._run_name = train_run_context.get_run_config().name
            self._counter = Counter("ray_deepep_faults", "Faults by cause and culprit", tag_keys=("cause", "rank"))

    def after_worker_group_start(self, worker_group) -> None:
        self._group = worker_group
        self._attempt += 1
        self._reported = False

    def after_worker_group_poll_status(self, worker_group_status) -> None:
        if self._config is None or self._reported or not worker_group_status.errors:
            return
        self._reported = True
        statuses = worker_group_status.worker_statuses
        culprit = self._find(statuses)
        if culprit is not None:
            self._report(culprit)
            statuses[culprit.world_rank].error = with_culprit(statuses[culprit.world_rank].error, culprit)

    def _find(self, statuses: Mapping) -> Culprit | None:
        culprit = self._look(statuses)
        if culprit is None or culprit.cause not in ("died", "stopped", "raised"):
            time.sleep(_SETTLE_S)
            culprit = self._look(statuses)
        return culprit

    def _look(self, statuses: Mapping) -> Culprit | None:
        processes = worker_processes(self._group)
        records = self._records(statuses)
        looked_at = {rank: look(status, records.get(rank)) for rank, status in statuses.items()}
        unsure = [
            rank for rank, (state, _) in looked_at.items() if state in (RankState.RUNNING, RankState.UNRESPONSIVE)
        ]
        seen = on_nodes(process_state, [processes[rank] for rank in unsure], _ANSWER_DEADLINE_S)
        by_process = {"gone": RankState.DEAD, "stopped": RankState.STOPPED}
        for rank, word in zip(unsure, seen):
            state, error = looked_at[rank]
            looked_at[rank] = by_process.get(word, state), error
        faults = [
            RankFault(reporter=rank, blamed=self._world_rank(rank, record, processes), record=record)
            for rank, record in records.items()
        ]
        return decide_culprit(faults, {rank: _status(*looked_at[rank], processes[rank]) for rank in statuses})

    def _records(self, statuses: Mapping) -> dict[int, FaultRecord]:
        """Fault records by world rank: from the errors that were raised, and from the workers that still answer."""
        records = {}
        for rank, status in statuses.items():
            error = _user_error(status.error)
            if isinstance(error, CommFaultError):
                records[rank] = error.record
        refs = [self._group.execute_single_async(rank, worker.read_fault) for rank in range(len(statuses))]
        answers = gather(refs, _ANSWER_DEADLINE_S, stop_at_error=False)
        return {rank: record for rank, record in answers.values.items() if record is not None} | records

    def _world_rank(self, reporter: int, record: FaultRecord, processes: list[ProcessId]) -> int:
        """World rank of a record's peer, which counts within the reporter's EP group."""
        for rank, process in enumerate(processes):
            if record.peer_pid and (process.pid, process.host) == (record.peer_pid, record.peer_host):
                return rank
        return group_of(reporter, ep_groups(len(processes), self._config.ep_size))[record.peer]

    def _report(self, culprit: Culprit) -> None:
        line = culprit.to_json(run=self._run_name, attempt=self._attempt)
        print(f"{FAULT_LOG_PREFIX} {line}", flush=True)
        self._counter.inc(tags={"cause": culprit.cause, "rank": str(culprit.world_rank)})
        if culprit.cause == "stopped":
            # It would answer nothing, so the restart would wait for it in vain.
            kill_process_of(culprit)


def kill_process_of(culprit: Culprit) -> None:
    """SIGKILL the culprit's process on its node."""
    process = ProcessId(node_id=culprit.node_id, host=culprit.host, pid=culprit.pid)
    on_nodes(kill_process, [process], _ANSWER_DEADLINE_S)


def look(status, record: FaultRecord | None) -> tuple[RankState, str]:
    """State and error, in one line, of a rank by its poll status (Ray's ``WorkerStatus``) and its fault record."""
    if status.error is None:
        return (RankState.RUNNING if status.running else RankState.FINISHED), ""
    text = one_line(status.error)
    if isinstance(status.error, WorkerHealthCheckFailedError):
        failure = status.error.health_check_failure
        state = RankState.DEAD if isinstance(failure, RayActorError) else RankState.UNRESPONSIVE
        return state, one_line(_WORKER_EXIT.sub("", str(failure)))
    error = _user_error(status.error)
    if error is None:
        return RankState.UNRESPONSIVE, text
    text = f"{type(error).__name__}: {one_line(error)}"
    if record is not None:
        return RankState.FAULTED, text
    if isinstance(error, dist.DistError) or any(word in str(error) for word in _COLLECTIVE_WORDS):
        return RankState.COLLECTIVE, text
    return RankState.RAISED, text


def with_culprit(error: Exception | None, culprit: Culprit) -> Exception:
    """The culprit's error with the verdict in front, of the same type, so that Ray treats it as before."""
    if isinstance(error, UserExceptionWithTraceback):
        return UserExceptionWithTraceback(error._base_exc, f"{culprit}\n{error._traceback_str}")
    if isinstance(error, WorkerHealthCheckFailedError):
        return WorkerHealthCheckFailedError(f"{culprit}\n{error._message}", error.health_check_failure)
    return WorkerFaultError(culprit)


def _user_error(error: Exception | None) -> BaseException | None:
    """What the training function raised, None if it raised nothing."""
    return error._base_exc if isinstance(error, UserExceptionWithTraceback) else None


def _status(state: RankState, error: str, process: ProcessId) -> RankStatus:
    return RankStatus(state=state, error=error, **dataclasses.asdict(process))
