"""What the Train controller can find out about its workers: states, fault records, processes, nodes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from ray.exceptions import RayActorError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback, WorkerHealthCheckFailedError

from ..errors import CommFaultError, FaultRecord, MismatchError
from ..health import HealthReport
from .culprit import Evidence, RankFault, RankState, RankStatus
from .expert_parallel import worker_processes
from .gather import one_line
from .layout import ep_groups, group_of
from .nodes import lost_nodes
from .processes import ProcessId, on_nodes, process_state

ANSWER_DEADLINE_S = 1.0
_WORKER_EXIT = re.compile(r"^.*?(?=Worker exit type: )", re.DOTALL)
"""What Ray says before the reason of a death: ids, and that the actor died."""
_KILLED_FOR_MEMORY = "NODE_OUT_OF_MEMORY"
"""Ray's exit type of a worker that it ended because its node ran out of memory."""
_NO_MEMORY = ("CUDA error: out of memory", "DefaultCPUAllocator: can't allocate memory")
"""Where memory is short and torch raises a plain RuntimeError."""
_COLLECTIVE_WORDS = ("gloo", "NCCL", "ProcessGroup", "Connection closed by peer", "Connection reset by peer")
_MAX_CAUSES = 10
_BY_WORD: Mapping[str | None, RankState] = {"gone": RankState.DEAD, "stopped": RankState.STOPPED}
"""What ``process_state`` says, where it says more than that the process runs."""


def gather_evidence(
    worker_group: Any, statuses: Mapping[int, Any], reports: Mapping[int, HealthReport], ep_size: int | None
) -> Evidence:
    """All that is known now; takes up to two answer deadlines.

    Args:
        worker_group: Ray's.
        statuses: Ray's ``WorkerStatus`` by world rank.
        reports: what the workers' health threads told last, by world rank.
        ep_size: as in ``ExpertParallelConfig``.
    """
    processes = worker_processes(worker_group)
    groups = ep_groups(len(processes), ep_size)
    records = {rank: record for rank in statuses if (record := _record(statuses[rank], reports.get(rank)))}
    looked_at = {rank: look(status, records.get(rank)) for rank, status in statuses.items()}
    states = _by_process({rank: state for rank, (state, _) in looked_at.items()}, records, processes, groups)
    faults = tuple(
        RankFault(reporter=rank, blamed=_blamed(record, group_of(rank, groups), processes), record=record)
        for rank, record in records.items()
    )
    known = {
        rank: rank_status(
            states[rank],
            processes[rank],
            error=looked_at[rank][1],
            report=reports.get(rank),
            accuses=_accused(status, group_of(rank, groups)),
        )
        for rank, status in statuses.items()
    }
    return Evidence(faults=faults, statuses=known)


def rank_status(
    state: RankState,
    process: ProcessId,
    *,
    error: str = "",
    report: HealthReport | None = None,
    accuses: int | None = None,
) -> RankStatus:
    """A rank's status from its parts."""
    told = {} if report is None else {"beacon": report.beacon, "gpu": report.gpu, "gpu_events": report.gpu_events}
    return RankStatus(state=state, error=error, accuses=accuses, **dataclasses.asdict(process), **told)


def look(status: Any, record: FaultRecord | None) -> tuple[RankState, str]:
    """State and error, in one line, of a rank by its poll status (Ray's ``WorkerStatus``) and its fault record."""
    if status.error is None:
        if record is not None and status.running:
            return RankState.FAULTED, ""
        return (RankState.RUNNING if status.running else RankState.FINISHED), ""
    if isinstance(status.error, WorkerHealthCheckFailedError):
        return _look_at_death(status.error.health_check_failure)
    error = user_error(status.error)
    if error is None:
        return RankState.UNRESPONSIVE, one_line(status.error)
    state = _state_of(error)
    if record is not None and state in (RankState.RAISED, RankState.COLLECTIVE, RankState.FAULTED):
        state = RankState.FAULTED
    return state, f"{type(error).__name__}: {one_line(error)}"


def user_error(error: Exception | None) -> BaseException | None:
    """What the training function raised, None if it raised nothing."""
    return error._base_exc if isinstance(error, UserExceptionWithTraceback) else None


def silent_states(worker_group: Any, ranks: Sequence[int]) -> dict[int, RankState]:
    """Those of ``ranks`` that are ``NODE_LOST``, ``DEAD`` or ``STOPPED``, by their nodes and processes."""
    processes = worker_processes(worker_group)
    lost = lost_nodes({processes[rank].node_id for rank in ranks}, ANSWER_DEADLINE_S)
    found = {rank: RankState.NODE_LOST for rank in ranks if processes[rank].node_id in lost}
    rest = [rank for rank in ranks if rank not in found]
    words = on_nodes(process_state, [processes[rank] for rank in rest], ANSWER_DEADLINE_S)
    return found | {rank: _BY_WORD[word] for rank, word in zip(rest, words) if word in _BY_WORD}


def _look_at_death(failure: Exception) -> tuple[RankState, str]:
    text = one_line(_WORKER_EXIT.sub("", str(failure)))
    if not isinstance(failure, RayActorError):
        return RankState.UNRESPONSIVE, text
    return (RankState.OUT_OF_MEMORY if _KILLED_FOR_MEMORY in str(failure) else RankState.DEAD), text


def _state_of(error: BaseException) -> RankState:
    """What an error of the training function says about its rank, by itself and by what it was raised from."""
    chain = list(_causes(error))
    if any(isinstance(e, MemoryError | torch.OutOfMemoryError) for e in chain) or any(
        text in str(e) for e in chain for text in _NO_MEMORY
    ):
        return RankState.OUT_OF_MEMORY
    if any(isinstance(e, CommFaultError) for e in chain):
        return RankState.FAULTED
    if any(isinstance(e, torch.AcceleratorError) or "CUDA error: " in str(e) for e in chain):
        return RankState.DEVICE_FAILED
    if any(isinstance(e, MismatchError) for e in chain):
        return RankState.MISMATCHED
    if isinstance(error, dist.DistError) or any(word in str(error) for word in _COLLECTIVE_WORDS):
        return RankState.COLLECTIVE
    return RankState.RAISED


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    for _ in range(_MAX_CAUSES):
        if error is None:
            return
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _record(status: Any, report: HealthReport | None) -> FaultRecord | None:
    """The fault of a rank: what it raised, or what its health thread found."""
    for error in _causes(user_error(status.error)):
        if isinstance(error, CommFaultError):
            return error.record
    return report.faults[0] if report is not None and report.faults else None


def _by_process(
    states: Mapping[int, RankState],
    records: Mapping[int, FaultRecord],
    processes: Sequence[ProcessId],
    groups: Sequence[Sequence[int]],
) -> dict[int, RankState]:
    """States as their processes and nodes show them, where the workers themselves do not say."""
    states = dict(states)
    unsure = [rank for rank, state in states.items() if state in (RankState.RUNNING, RankState.UNRESPONSIVE)]
    words = dict(zip(unsure, on_nodes(process_state, [processes[rank] for rank in unsure], ANSWER_DEADLINE_S)))
    states |= {rank: _BY_WORD[word] for rank, word in words.items() if word in _BY_WORD}
    seen_dead = {
        _blamed(record, group_of(rank, groups), processes)
        for rank, record in records.items()
        if record.cause == "peer_died"
    }
    maybe_dead = [
        rank
        for rank, state in states.items()
        if state in (RankState.DEAD, RankState.UNRESPONSIVE)
        # Ray's last poll may be older than the loss of the node, which then answers nothing either.
        or (state is RankState.RUNNING and (rank in seen_dead or words[rank] is None))
    ]
    lost = lost_nodes({processes[rank].node_id for rank in maybe_dead}, ANSWER_DEADLINE_S)
    return states | {rank: RankState.NODE_LOST for rank in maybe_dead if processes[rank].node_id in lost}


def _accused(status: Any, ranks: Sequence[int]) -> int | None:
    """World rank that a ``MismatchError`` names, which counts within the EP group ``ranks``."""
    for error in _causes(user_error(status.error)):
        if isinstance(error, MismatchError):
            return ranks[error.peer]
    return None


def _blamed(record: FaultRecord, ranks: Sequence[int], processes: Sequence[ProcessId]) -> int:
    """World rank of a record's peer, which counts within the reporter's EP group ``ranks``."""
    for rank, process in enumerate(processes):
        if record.peer_pid and (process.pid, process.host) == (record.peer_pid, record.peer_host):
            return rank
    # Not of the EP group: torch's store, which Ray puts into the process of world rank 0.
    return ranks[record.peer] if record.peer >= 0 else 0
