"""Who is to blame for a fault: pure functions of what every rank reported and of what is known about its process.

When one rank of an expert-parallel job stops, all others fail too, each with an error that names whom *it* waited for.
The run must name the cause. The rules, strongest evidence first:

1. a lost node, or a dead process (the cluster says so, or a peer saw it go);
2. a stopped process (SIGSTOP, debugger);
3. a GPU that the driver says is broken;
4. a rank that ran out of memory, met an error of CUDA, passed other arguments than the rest, or raised an error of its
   own, which no other rank's failure explains;
5. a late rank: follow the chains of waits to a rank that waited for nobody;
6. a rank that left early (closed or aborted its communicator);
7. a rank that makes no progress while torch.distributed fails on the others;
8. a rank whose torch.distributed call failed, or which stopped answering, with no better evidence.

Among several by the same rule: the majority of accusations, then the slowest by its beacon, then the first report.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Mapping, Sequence

from .culprit import MAX_SHOWN, Culprit, RankFault, RankState, RankStatus

_OWN_ERROR = ("died", "node_died", "out_of_memory", "device_failed", "mismatch", "raised", "collective", "unresponsive")


def decide_culprit(faults: Sequence[RankFault], statuses: Mapping[int, RankStatus]) -> Culprit | None:
    """The rank to blame, or None where nothing points at one.

    Args:
        faults: fault records of all ranks that have one.
        statuses: every world rank.
    """
    for cause, ranks in _candidates(faults, statuses):
        if ranks:
            return _culprit(_most_blamed(ranks, faults, statuses), cause, faults, statuses)
    return None


def decide_hung(statuses: Mapping[int, RankStatus], deadline_s: float) -> Culprit | None:
    """The slowest rank of a job in which nobody failed and nobody moved for ``deadline_s``; None if somebody moved.

    Only ranks that still run count, and all of them: a rank that hangs soon holds up all others.
    """
    running = {rank: s for rank, s in statuses.items() if s.state is RankState.RUNNING}
    if not running or any(s.beacon is None or s.beacon.stood_s < deadline_s for s in running.values()):
        return None
    return _culprit(min(running, key=lambda rank: (_slowness(running[rank]), rank)), "hung", [], statuses)


def _candidates(faults: Sequence[RankFault], statuses: Mapping[int, RankStatus]) -> tuple[tuple[str, set[int]], ...]:
    """Causes with the ranks that they may be laid to, strongest evidence first."""
    in_state = {state: {rank for rank, s in statuses.items() if s.state is state} for state in RankState}
    seen_dead = {fault.blamed for fault in faults if fault.record.cause == "peer_died"}
    failed_gpu = {rank for rank, s in statuses.items() if any(event.is_hardware for event in s.gpu_events)}
    accused = {s.accuses for s in statuses.values() if s.state is RankState.MISMATCHED and s.accuses is not None}
    return (
        ("node_died", in_state[RankState.NODE_LOST]),
        ("died", in_state[RankState.DEAD]),
        ("stopped", in_state[RankState.STOPPED]),
        ("gpu_failed", failed_gpu),
        ("out_of_memory", in_state[RankState.OUT_OF_MEMORY]),
        ("device_failed", in_state[RankState.DEVICE_FAILED]),
        ("mismatch", accused),
        ("raised", in_state[RankState.RAISED]),
        # After what ranks say themselves: one whose GPU failed looks dead to its peers' kernels.
        ("died", seen_dead),
        ("late", _roots([fault for fault in faults if fault.record.cause == "timeout"])),
        ("closed", _roots([fault for fault in faults if fault.record.cause in ("peer_closed", "aborted")])),
        ("hung", _idle(in_state[RankState.RUNNING], in_state[RankState.COLLECTIVE], statuses)),
        ("unresponsive", in_state[RankState.UNRESPONSIVE]),
        ("collective", in_state[RankState.COLLECTIVE]),
    )


def _roots(faults: Sequence[RankFault]) -> set[int]:
    """Ends of the chains of waits: blamed ranks that did not wait themselves.

    In a circle of waits nobody is such an end; then the wait that began first names it.
    """
    roots = {fault.blamed for fault in faults} - {fault.reporter for fault in faults}
    if not roots and faults:
        roots = {min(faults, key=_age).blamed}
    return roots


def _idle(running: set[int], failed: set[int], statuses: Mapping[int, RankStatus]) -> set[int]:
    """Ranks that run and have stood still for longer than any whose torch.distributed call has failed."""
    stood = {rank: s.beacon.stood_s for rank, s in statuses.items() if s.beacon is not None}
    if not failed & stood.keys():
        return set()
    limit = max(stood[rank] for rank in failed & stood.keys())
    return {rank for rank in running & stood.keys() if stood[rank] >= limit}


def _age(fault: RankFault) -> tuple[int, float, int]:
    """Sorts the earliest wait first: fewest operations done, then longest wait."""
    return fault.record.sequence, -fault.record.elapsed_s, fault.reporter


def _slowness(status: RankStatus | None) -> tuple[float, float]:
    """Sorts the slowest first: fewest steps done, then longest without progress; ranks that never told come last."""
    if status is None or status.beacon is None:
        return math.inf, 0.0
    return status.beacon.step, -status.beacon.stood_s


def _most_blamed(ranks: set[int], faults: Sequence[RankFault], statuses: Mapping[int, RankStatus]) -> int:
    waits = {fault.reporter: fault.blamed for fault in sorted(faults, key=_age, reverse=True)}
    accusations = [_end_of_chain(fault, ranks, waits) for fault in faults]
    votes = collections.Counter(accusations + [s.accuses for s in statuses.values()])
    first = {fault.blamed: _age(fault) for fault in sorted(faults, key=_age, reverse=True)}
    never = (2**63, 0.0, 0)
    return min(ranks, key=lambda rank: (-votes[rank], _slowness(statuses.get(rank)), first.get(rank, never), rank))


def _end_of_chain(fault: RankFault, ranks: set[int], waits: Mapping[int, int]) -> int:
    """The first of ``ranks`` on the chain of waits that begins with ``fault``; its end if there is none."""
    rank, passed = fault.blamed, {fault.reporter}
    while rank not in ranks and rank in waits and rank not in passed:
        passed.add(rank)
        rank = waits[rank]
    return rank


def _culprit(rank: int, cause: str, faults: Sequence[RankFault], statuses: Mapping[int, RankStatus]) -> Culprit:
    blaming = sorted((fault for fault in faults if fault.blamed == rank), key=_age)
    record = blaming[0].record if blaming else None
    status = statuses.get(rank, RankStatus(state=RankState.RUNNING))
    reporters = tuple(sorted({fault.reporter for fault in blaming}))
    victims = reporters or tuple(sorted(r for r in statuses if r != rank))
    shown = {r: statuses[r].beacon for r in (rank, *victims[: MAX_SHOWN - 1]) if r in statuses}
    return Culprit(
        world_rank=rank,
        cause=cause,
        host=status.host or (record.peer_host if record else ""),
        node_id=status.node_id,
        pid=status.pid or (record.peer_pid if record else 0),
        gpu=status.gpu or (record.peer_gpu if record else ""),
        reporters=reporters,
        record=record,
        # A rank that suffers from others has an error that names those; as evidence against it, it would mislead.
        error=status.error if cause in _OWN_ERROR else "",
        beacons={r: beacon for r, beacon in shown.items() if beacon is not None},
        gpu_events=status.gpu_events,
    )
