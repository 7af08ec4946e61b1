"""Who is to blame for a fault: a pure function of what every rank reported and of what is known about its process.

When one rank of an expert-parallel job stops, all others fail too, each with an error that names whom *it* waited for.
The run must name the cause. The rules, strongest evidence first:

1. a dead process (the cluster says so, or a peer saw it go);
2. a stopped process (SIGSTOP, debugger);
3. a rank that raised an error of its own, which no other rank's failure explains;
4. a late rank: follow the chain of waits to the rank that waited for nobody, by majority, then the earliest wait;
5. a rank that left early (closed or aborted its communicator);
6. a rank whose torch.distributed call failed, or which stopped answering, with no better evidence.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import json
from collections.abc import Mapping, Sequence

from ..errors import FaultRecord


class RankState(enum.Enum):
    """How a rank stood when the fault was looked at."""

    RUNNING = "running"
    FINISHED = "finished"
    DEAD = "dead"
    """Its process is gone."""
    STOPPED = "stopped"
    """Its process exists and does not run (SIGSTOP)."""
    RAISED = "raised"
    """The training function raised an error of its own."""
    FAULTED = "faulted"
    """It raised ``CommFaultError``: it suffered from another rank."""
    COLLECTIVE = "collective"
    """A torch.distributed call failed on it, most often because of another rank."""
    UNRESPONSIVE = "unresponsive"
    """It did not answer a health check for long."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankStatus:
    """What is known about one world rank."""

    state: RankState
    error: str = ""
    """Its error, in one line; empty if it has none."""
    host: str = ""
    node_id: str = ""
    pid: int = 0
    gpu: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankFault:
    """A :class:`FaultRecord` with world ranks instead of ranks of an EP group."""

    reporter: int
    """World rank that reports."""
    blamed: int
    """World rank that it waited for."""
    record: FaultRecord


@dataclasses.dataclass(frozen=True, kw_only=True)
class Culprit:
    """The rank to blame, and why."""

    world_rank: int
    cause: str
    """``died``, ``stopped``, ``raised``, ``late``, ``closed``, ``collective`` or ``unresponsive``."""
    host: str
    node_id: str
    pid: int
    gpu: str
    reporters: tuple[int, ...]
    """World ranks whose fault records blame it, ascending."""
    record: FaultRecord | None
    """The earliest of these records; its ``rank`` and ``peer`` count within the EP group."""
    error: str
    """The culprit's own error, in one line."""

    def __str__(self) -> str:
        where = f" (pid {self.pid} on {self.host or 'an unknown host'})" if self.pid else ""
        what = {
            "died": "died",
            "stopped": "is stopped (SIGSTOP): its process exists and does not run",
            "raised": "raised an error",
            "late": "was late: it runs and sent no signal within the deadline",
            "closed": "left while others still waited for it",
            "collective": "failed in torch.distributed; no rank reported whom it waited for",
            "unresponsive": "does not answer",
        }[self.cause]
        text = f"rank {self.world_rank}{where} {what}"
        if self.error:
            text += f": {self.error}"
        if self.record is not None:
            ranks = ", ".join(map(str, self.reporters))
            waited = f"{self.record.elapsed_s:.1f} s in {self.record.operation} #{self.record.sequence}"
            text += f"; rank{'s' if len(self.reporters) > 1 else ''} {ranks} waited for it {waited}"
        return text

    def to_json(self, **extra: object) -> str:
        """One line of JSON: the fields, the text, and ``extra``."""
        fields = dataclasses.asdict(self) | {"text": str(self)} | extra
        fields["rank"] = fields.pop("world_rank")
        return json.dumps(fields, sort_keys=True)


def decide_culprit(faults: Sequence[RankFault], statuses: Mapping[int, RankStatus]) -> Culprit | None:
    """The rank to blame, or None where nothing points at one.

    Args:
        faults: fault records of all ranks that have one.
        statuses: every world rank.
    """
    in_state = {state: {rank for rank, s in statuses.items() if s.state is state} for state in RankState}
    seen_dead = {fault.blamed for fault in faults if fault.record.cause == "peer_died"}
    late = _roots([fault for fault in faults if fault.record.cause == "timeout"])
    closed = _roots([fault for fault in faults if fault.record.cause in ("peer_closed", "aborted")])
    candidates = (
        ("died", in_state[RankState.DEAD] or seen_dead),
        ("stopped", in_state[RankState.STOPPED]),
        ("raised", in_state[RankState.RAISED]),
        ("late", late),
        ("closed", closed),
        ("unresponsive", in_state[RankState.UNRESPONSIVE]),
        ("collective", in_state[RankState.COLLECTIVE]),
    )
    for cause, ranks in candidates:
        if ranks:
            return _culprit(_most_blamed(ranks, faults), cause, faults, statuses)
    return None


def _roots(faults: Sequence[RankFault]) -> set[int]:
    """Ends of the chains of waits: blamed ranks that did not wait themselves.

    In a circle of waits nobody is such an end; then the wait that began first names it.
    """
    waiting = {fault.reporter for fault in faults}
    roots = {fault.blamed for fault in faults} - waiting
    if not roots and faults:
        roots = {min(faults, key=_age).blamed}
    return roots


def _age(fault: RankFault) -> tuple[int, float, int]:
    """Sorts the earliest wait first: fewest operations done, then longest wait."""
    return fault.record.sequence, -fault.record.elapsed_s, fault.reporter


def _most_blamed(ranks: set[int], faults: Sequence[RankFault]) -> int:
    votes = collections.Counter(fault.blamed for fault in faults if fault.blamed in ranks)
    first = {fault.blamed: _age(fault) for fault in sorted(faults, key=_age, reverse=True)}
    never = (2**63, 0.0, 0)
    return min(ranks, key=lambda rank: (-votes[rank], first.get(rank, never), rank))


def _culprit(rank: int, cause: str, faults: Sequence[RankFault], statuses: Mapping[int, RankStatus]) -> Culprit:
    blaming = sorted((fault for fault in faults if fault.blamed == rank), key=_age)
    record = blaming[0].record if blaming else None
    status = statuses.get(rank, RankStatus(state=RankState.RUNNING))
    return Culprit(
        world_rank=rank,
        cause=cause,
        host=status.host or (record.peer_host if record else ""),
        node_id=status.node_id,
        pid=status.pid or (record.peer_pid if record else 0),
        gpu=status.gpu or (record.peer_gpu if record else ""),
        reporters=tuple(sorted({fault.reporter for fault in blaming})),
        record=record,
        # A rank that suffers from others has an error that names those; as evidence against it, it would mislead.
        error=status.error if cause in ("died", "raised", "collective", "unresponsive") else "",
    )
