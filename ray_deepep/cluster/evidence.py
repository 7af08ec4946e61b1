"""What the Train controller can find out about its workers: states, fault records, processes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist
from ray.exceptions import RayActorError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback, WorkerHealthCheckFailedError

from ..errors import CommFaultError, FaultRecord
from . import worker
from .culprit import Culprit, RankFault, RankState, RankStatus, decide_culprit
from .expert_parallel import worker_processes
from .gather import gather, one_line
from .layout import ep_groups, group_of
from .processes import ProcessId, on_nodes, process_state

ANSWER_DEADLINE_S = 1.0
_WORKER_EXIT = re.compile(r"^.*?(?=Worker exit type: )", re.DOTALL)
"""What Ray says before the reason of a death: ids, and that the actor died."""
_COLLECTIVE_WORDS = ("gloo", "NCCL", "ProcessGroup", "Connection closed by peer", "Connection reset by peer")


def find_culprit(worker_group: Any, statuses: Mapping[int, Any], ep_size: int | None) -> Culprit | None:
    """Who is to blame by what is known now; takes up to two answer deadlines.

    Args:
        worker_group: Ray's.
        statuses: Ray's ``WorkerStatus`` by world rank.
        ep_size: as in ``ExpertParallelConfig``.
    """
    processes = worker_processes(worker_group)
    records = _records(worker_group, statuses)
    looked_at = {rank: look(status, records.get(rank)) for rank, status in statuses.items()}
    unsure = [rank for rank, (state, _) in looked_at.items() if state in (RankState.RUNNING, RankState.UNRESPONSIVE)]
    by_process = {"gone": RankState.DEAD, "stopped": RankState.STOPPED}
    for rank, word in zip(unsure, on_nodes(process_state, [processes[rank] for rank in unsure], ANSWER_DEADLINE_S)):
        state, error = looked_at[rank]
        looked_at[rank] = by_process.get(word, state), error
    groups = ep_groups(len(processes), ep_size)
    faults = [
        RankFault(reporter=rank, blamed=_blamed(record, group_of(rank, groups), processes), record=record)
        for rank, record in records.items()
    ]
    return decide_culprit(faults, {rank: _status(*looked_at[rank], processes[rank]) for rank in statuses})


def look(status: Any, record: FaultRecord | None) -> tuple[RankState, str]:
    """State and error, in one line, of a rank by its poll status (Ray's ``WorkerStatus``) and its fault record."""
    if status.error is None:
        return (RankState.RUNNING if status.running else RankState.FINISHED), ""
    if isinstance(status.error, WorkerHealthCheckFailedError):
        failure = status.error.health_check_failure
        state = RankState.DEAD if isinstance(failure, RayActorError) else RankState.UNRESPONSIVE
        return state, one_line(_WORKER_EXIT.sub("", str(failure)))
    error = user_error(status.error)
    if error is None:
        return RankState.UNRESPONSIVE, one_line(status.error)
    text = f"{type(error).__name__}: {one_line(error)}"
    if record is not None:
        return RankState.FAULTED, text
    if isinstance(error, dist.DistError) or any(word in str(error) for word in _COLLECTIVE_WORDS):
        return RankState.COLLECTIVE, text
    return RankState.RAISED, text


def user_error(error: Exception | None) -> BaseException | None:
    """What the training function raised, None if it raised nothing."""
    return error._base_exc if isinstance(error, UserExceptionWithTraceback) else None


def stopped_ranks(worker_group: Any, ranks: Sequence[int]) -> list[int]:
    """Those of ``ranks`` whose process exists and does not run."""
    processes = worker_processes(worker_group)
    states = on_nodes(process_state, [processes[rank] for rank in ranks], ANSWER_DEADLINE_S)
    return [rank for rank, state in zip(ranks, states) if state == "stopped"]


def _records(worker_group: Any, statuses: Mapping[int, Any]) -> dict[int, FaultRecord]:
    """Fault records by world rank: from the errors that were raised, and from the workers that still answer."""
    refs = [worker_group.execute_single_async(rank, worker.read_fault) for rank in range(len(statuses))]
    answers = gather(refs, ANSWER_DEADLINE_S, stop_at_error=False)
    records = {rank: record for rank, record in answers.values.items() if record is not None}
    for rank, status in statuses.items():
        error = user_error(status.error)
        if isinstance(error, CommFaultError):
            records[rank] = error.record
    return records


def _blamed(record: FaultRecord, ranks: Sequence[int], processes: Sequence[ProcessId]) -> int:
    """World rank of a record's peer, which counts within the reporter's EP group ``ranks``."""
    for rank, process in enumerate(processes):
        if record.peer_pid and (process.pid, process.host) == (record.peer_pid, record.peer_host):
            return rank
    return ranks[record.peer]


def _status(state: RankState, error: str, process: ProcessId) -> RankStatus:
    return RankStatus(state=state, error=error, **dataclasses.asdict(process))
