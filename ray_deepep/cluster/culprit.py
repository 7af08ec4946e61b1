"""What is known about the ranks of a job when it fails, and the verdict. ``decision.py`` gets from one to the other."""

from __future__ import annotations

import dataclasses
import enum
import json
from collections.abc import Mapping
from typing import Any

from ..errors import FaultRecord
from ..gpu_events import GpuEvent
from ..progress import Beacon

MAX_SHOWN = 8
"""Ranks whose beacons a report shows; a job may have thousands."""


class RankState(enum.Enum):
    """How a rank stood when the fault was looked at."""

    RUNNING = "running"
    FINISHED = "finished"
    NODE_LOST = "node_lost"
    """Its whole node is gone."""
    DEAD = "dead"
    """Its process is gone."""
    STOPPED = "stopped"
    """Its process exists and does not run (SIGSTOP)."""
    OUT_OF_MEMORY = "out_of_memory"
    """It raised for want of memory, of the GPU or of the host, or Ray ended it for that."""
    DEVICE_FAILED = "device_failed"
    """The training function met an error of CUDA, such as a failed assertion in a kernel."""
    MISMATCHED = "mismatched"
    """It raised ``MismatchError``, as all ranks of its EP group do."""
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
    """UUID of its GPU; empty if it uses none."""
    beacon: Beacon | None = None
    """What was last heard of its progress; None if it never told."""
    gpu_events: tuple[GpuEvent, ...] = ()
    accuses: int | None = None
    """World rank whose arguments differ, by its ``MismatchError``."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankFault:
    """A :class:`FaultRecord` with world ranks instead of ranks of an EP group."""

    reporter: int
    """World rank that reports."""
    blamed: int
    """World rank that it waited for."""
    record: FaultRecord


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evidence:
    """All that a verdict is found by; as JSON it can be kept, and judged again."""

    faults: tuple[RankFault, ...]
    """Fault records of all ranks that have one."""
    statuses: Mapping[int, RankStatus]
    """Every world rank."""

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(dataclasses.asdict(self), default=lambda state: state.value)

    @classmethod
    def from_json(cls, text: str) -> Evidence:
        """Inverse of :meth:`to_json`; what a rank's status lacks has its default."""
        fields = json.loads(text)
        faults = [RankFault(**fault | {"record": FaultRecord(**fault["record"])}) for fault in fields["faults"]]
        return cls(faults=tuple(faults), statuses={int(r): _status_of(s) for r, s in fields["statuses"].items()})


def _status_of(fields: Mapping[str, Any]) -> RankStatus:
    beacon = fields.get("beacon")
    parsed = {
        "state": RankState(fields["state"]),
        "beacon": None if beacon is None else Beacon(**beacon),
        "gpu_events": tuple(GpuEvent(**event) for event in fields.get("gpu_events", ())),
    }
    return RankStatus(**dict(fields) | parsed)


_WHAT: Mapping[str, str] = {
    "died": "died",
    "node_died": "is gone with its node",
    "stopped": "is stopped (SIGSTOP): its process exists and does not run",
    "gpu_failed": "has a GPU that failed",
    "out_of_memory": "ran out of memory",
    "device_failed": "met an error of its GPU's",
    "mismatch": "passed arguments that differ from the others'",
    "raised": "raised an error",
    "late": "was late: it runs and sent no signal within the deadline",
    "closed": "left while others still waited for it",
    "hung": "hangs: it runs and makes no progress",
    "collective": "failed in torch.distributed; no rank reported whom it waited for",
    "unresponsive": "does not answer",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Culprit:
    """The rank to blame, and why."""

    world_rank: int
    cause: str
    """``died``, ``node_died``, ``stopped``, ``gpu_failed``, ``out_of_memory``, ``device_failed``, ``mismatch``,
    ``raised``, ``late``, ``closed``, ``hung``, ``collective`` or ``unresponsive``."""
    host: str
    node_id: str
    pid: int
    gpu: str
    """UUID of its GPU; empty if it uses none."""
    reporters: tuple[int, ...]
    """World ranks whose fault records blame it, ascending."""
    record: FaultRecord | None
    """The earliest of these records; its ``rank`` and ``peer`` count within the EP group."""
    error: str
    """The culprit's own error, in one line."""
    beacons: Mapping[int, Beacon] = dataclasses.field(default_factory=dict)
    """By world rank, the culprit's and some of its victims'."""
    gpu_events: tuple[GpuEvent, ...] = ()
    """Of its GPU."""

    def __str__(self) -> str:
        text = f"rank {self.world_rank}{self._where()} {_WHAT[self.cause]}"
        if self.error:
            text += f": {self.error}"
        if self.gpu_events:
            text += f"; its GPU reported {', '.join(map(str, dict.fromkeys(self.gpu_events)))}"
        beacon = self.beacons.get(self.world_rank)
        if beacon is not None:
            text += f"; it was last at {beacon}"
        if self.record is not None:
            record, several = self.record, len(self.reporters) > 1
            ranks = f"rank{'s' if several else ''} {', '.join(map(str, self.reporters))}"
            waited = f"{record.elapsed_s:.1f} s in {record.operation} #{record.sequence}, {record.phase}"
            text += f"; {ranks} waited for it {waited} (signal {record.expected} expected, {record.seen} seen)"
        return text

    def _where(self) -> str:
        if not self.pid:
            return ""
        node = f", node {self.node_id[:12]}" if self.node_id else ""
        gpu = f", GPU {self.gpu}" if self.gpu else ""
        return f" (pid {self.pid} on {self.host or 'an unknown host'}{node}{gpu})"

    def to_json(self, **extra: object) -> str:
        """One line of JSON: the fields, those of the record again that say what was waited for, the text, ``extra``."""
        fields = dataclasses.asdict(self) | {"text": str(self)} | extra
        fields["rank"] = fields.pop("world_rank")
        for name in ("operation", "sequence", "phase", "expected", "seen", "elapsed_s"):
            fields[name] = None if self.record is None else getattr(self.record, name)
        return json.dumps(fields, sort_keys=True)
