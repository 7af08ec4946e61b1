"""Typed errors. Every one says what was wrong, with which value, and which rule it broke.

All carry their data as attributes and survive pickling (Ray ships exceptions between processes), which
exceptions with required arguments only do through ``__reduce__``.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

FAULT_LOG_PREFIX = "RAY_DEEPEP_FAULT"


class RayDeepEPError(Exception):
    """Base of all errors raised by ray_deepep."""


class _ArgumentError(RayDeepEPError):
    def __init__(self, argument: str, value: Any, rule: str) -> None:
        self.argument, self.value, self.rule = argument, value, rule
        super().__init__(f"{argument}: {rule}; got {value!r}")

    def __reduce__(self):
        return type(self), (self.argument, self.value, self.rule)


class InvalidArgumentError(_ArgumentError, ValueError):
    """An argument has a value that breaks a rule. Raised before anything is sent."""


class InvalidTypeError(_ArgumentError, TypeError):
    """An argument has a type or dtype that is not accepted. Raised before anything is sent."""


class MismatchError(RayDeepEPError, ValueError):
    """Ranks called the same collective with arguments that do not fit each other.

    Every rank of the group raises it for the same call, before a row is moved; the communicator stays usable.
    """

    def __init__(self, operation: str, peer: int, field: str, expected: Any, seen: Any, first: int = 0) -> None:
        self.operation, self.peer, self.field, self.expected, self.seen = operation, peer, field, expected, seen
        self.first = first
        super().__init__(f"{operation}: rank {peer} passed {field}={seen}, rank {first} passed {field}={expected}")

    def __reduce__(self):
        return type(self), (self.operation, self.peer, self.field, self.expected, self.seen, self.first)


class ClosedError(RayDeepEPError, RuntimeError):
    """A communicator or buffer was used after ``close()``."""


class HookError(RayDeepEPError, RuntimeError):
    """A low-latency operation was received twice, before an earlier one, or not at all although it had to be.

    Attributes: ``call`` (what was called), ``expected`` (what should be called first; empty if nothing), ``reason``.
    Nothing was sent or received; the calls go on in the right order.
    """

    def __init__(self, call: str, expected: str, reason: str) -> None:
        self.call, self.expected, self.reason = call, expected, reason
        super().__init__(f"{call}: {reason}" + (f"; call {expected} first" if expected else ""))

    def __reduce__(self):
        return type(self), (self.call, self.expected, self.reason)


class RankMaskedError(RayDeepEPError, RuntimeError):
    """Peers went on with low-latency calls without this rank, which they had masked; nothing it does reaches them.

    Attributes: ``operation``, ``by`` (those peers). Call ``Buffer.rejoin()``, and let all peers unmask this rank.
    """

    def __init__(self, operation: str, by: list[int]) -> None:
        self.operation, self.by = operation, list(by)
        who = f"rank{'s' if len(self.by) != 1 else ''} {', '.join(map(str, self.by))}"
        super().__init__(f"{operation}: {who} masked this rank and went on without it; call rejoin()")

    def __reduce__(self):
        return type(self), (self.operation, self.by)


class TransportUnavailableError(RayDeepEPError, RuntimeError):
    """The asked transport cannot serve this group of ranks; the message says why and what would."""


class NvshmemError(RayDeepEPError, RuntimeError):
    """NVSHMEM cannot be used, or a call of it failed.

    Attributes: ``step`` (``load``, ``bring_up``, ``init``, ``allocate``, ``addresses``, ``free`` or ``finalize``),
    ``ranks`` (those where it failed), ``reason``.
    """

    def __init__(self, step: str, ranks: list[int], reason: str) -> None:
        self.step, self.ranks, self.reason = step, list(ranks), reason
        who = f" on rank{'s' if len(ranks) != 1 else ''} {', '.join(map(str, ranks))}" if ranks else ""
        super().__init__(f"NVSHMEM {step}{who}: {reason}")

    def __reduce__(self):
        return type(self), (self.step, self.ranks, self.reason)


class CudaError(RayDeepEPError, RuntimeError):
    """A call of CUDA failed in the compiled core; the message says which, and CUDA's own name for the error."""


class BootstrapError(RayDeepEPError, RuntimeError):
    """Ranks did not come together within the bootstrap deadline.

    Attributes: ``missing`` (ranks that never arrived), ``deadline_s``, ``phase``.
    """

    def __init__(self, phase: str, missing: list[int], deadline_s: float, detail: str = "") -> None:
        self.phase, self.missing, self.deadline_s, self.detail = phase, list(missing), deadline_s, detail
        who = f"rank{'s' if len(missing) != 1 else ''} {', '.join(map(str, missing))}" if missing else "a rank"
        tail = f" ({detail})" if detail else ""
        super().__init__(f"bootstrap: {who} did not reach '{phase}' within {deadline_s:g} s{tail}")

    def __reduce__(self):
        return type(self), (self.phase, self.missing, self.deadline_s, self.detail)


class ClusterUnreachableError(RayDeepEPError, ConnectionError):
    """No Ray cluster answers at an address. Attributes: ``address``, ``reason``."""

    def __init__(self, address: str, reason: str) -> None:
        self.address, self.reason = address, reason
        super().__init__(f"no Ray cluster answers at {address!r}: {reason}")

    def __reduce__(self):
        return type(self), (self.address, self.reason)


class UnknownJobError(RayDeepEPError, LookupError):
    """A cluster has no job of that name. Attributes: ``job_id``, ``url`` (of the cluster), ``known`` (jobs it has)."""

    def __init__(self, job_id: str, url: str, known: list[str]) -> None:
        self.job_id, self.url, self.known = job_id, url, list(known)
        has = f"its jobs: {', '.join(self.known)}" if self.known else "it has none"
        super().__init__(f"{url} has no job {job_id!r}; {has}")

    def __reduce__(self):
        return type(self), (self.job_id, self.url, self.known)


class MissingPackageError(RayDeepEPError, ImportError):
    """Something was asked for that needs a package which cannot be imported.

    Attributes: ``package``, ``purpose``, ``reason`` (Python's own words).
    """

    def __init__(self, package: str, purpose: str, reason: str) -> None:
        self.package, self.purpose, self.reason = package, purpose, reason
        super().__init__(f"{purpose} need the package {package}: pip install {package} ({reason})")

    def __reduce__(self):
        return type(self), (self.package, self.purpose, self.reason)


class SharedGpuError(RayDeepEPError, RuntimeError):
    """Several ranks were given the same GPU, most often because their processes see each other's GPUs.

    Attributes: ``shared``, tuples of ranks by the UUID of their GPU.
    """

    def __init__(self, shared: dict[str, tuple[int, ...]]) -> None:
        self.shared = dict(shared)
        super().__init__(
            f"{describe_shared_gpus(shared)}; give each rank a GPU of its own (num_gpus=1, use_gpu=True), "
            "or set RAY_DEEPEP_ALLOW_SHARED_GPUS=1 if it is on purpose"
        )

    def __reduce__(self):
        return type(self), (self.shared,)


def describe_shared_gpus(shared: dict[str, tuple[int, ...]]) -> str:
    """Ranks by the UUID of the GPU that they share, in words."""
    return ", ".join(f"ranks {' and '.join(map(str, ranks))} use the same GPU {gpu}" for gpu, ranks in shared.items())


class ReceiveOverflowError(RayDeepEPError, RuntimeError):
    """A dispatch brought more rows than fit. With ``max_recv_tokens`` the rest was dropped; with the buffer's
    ``max_rows`` nothing was moved, and the buffer serves on.

    Attributes: ``rank`` (a rank with too little room), ``needed`` (rows that it needed), ``room``, ``limit``
    (the argument that set the room).
    """

    def __init__(self, rank: int, needed: int, room: int, limit: str = "max_recv_tokens") -> None:
        self.rank, self.needed, self.room, self.limit = rank, needed, room, limit
        super().__init__(f"{limit}: rank {rank} needed {needed} rows; got {room}")

    def __reduce__(self):
        return type(self), (self.rank, self.needed, self.room, self.limit)


class HeapFullError(RayDeepEPError, RuntimeError):
    """``Buffer.symm_empty`` found no room; every number is bytes, and ``largest`` is the largest free piece."""

    def __init__(self, asked: int, free: int, largest: int, symm_bytes: int) -> None:
        self.asked, self.free, self.largest, self.symm_bytes = asked, free, largest, symm_bytes
        super().__init__(
            f"symm_empty: asked for {asked} bytes; {free} of symm_bytes={symm_bytes} are free,"
            f" the largest piece has {largest}"
        )

    def __reduce__(self):
        return type(self), (self.asked, self.free, self.largest, self.symm_bytes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FaultRecord:
    """Why an operation failed: what waited, for whom, and what was seen."""

    operation: str
    """``dispatch``, ``combine``, ``low_latency_dispatch``, ``low_latency_combine`` or ``allocate``."""
    sequence: int
    """Sequence number of the operation in its buffer, from 1."""
    phase: str
    """Step that waited, such as ``wait_published``."""
    cause: str
    """``timeout`` (no signal within the deadline), ``peer_died`` (its process is gone), ``peer_closed`` (it closed
    the communicator) or ``aborted`` (it was interrupted while it waited, or its own waits were ended)."""
    rank: int
    """Rank that reports."""
    peer: int
    """Rank that is to blame; -1: a process outside the group, which hosts torch's store."""
    expected: int
    """Signal value waited for."""
    seen: int
    """Signal value last seen."""
    elapsed_s: float
    """Seconds waited."""
    deadline_s: float
    """Seconds allowed."""
    peer_host: str = ""
    peer_pid: int = 0
    peer_gpu: str = ""
    """UUID of the peer's GPU; empty on the CPU core."""

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> FaultRecord:
        """Inverse of :meth:`to_json`."""
        return cls(**json.loads(text))

    def __str__(self) -> str:
        where = f" (pid {self.peer_pid} on {self.peer_host})" if self.peer_pid else ""
        peer = f"rank {self.peer}{where}" if self.peer >= 0 else "a process of no rank, which hosts torch's store,"
        what = {
            "timeout": f"{peer} sent no signal for {self.elapsed_s:.1f} s",
            "peer_died": f"{'the process of ' if self.peer >= 0 else ''}{peer} is gone",
            "peer_closed": f"{peer} closed its communicator",
            "aborted": f"{peer} aborted the communicator",
        }.get(self.cause, self.cause)
        return (
            f"{self.operation} #{self.sequence} on rank {self.rank}, {self.phase}: {what}"
            f" (expected signal {self.expected}, seen {self.seen}, deadline {self.deadline_s:g} s)"
        )


class CommFaultError(RayDeepEPError, RuntimeError):
    """A collective failed because of another rank; ``record`` names it. The communicator refuses further use."""

    def __init__(self, record: FaultRecord) -> None:
        self.record = record
        super().__init__(str(record))

    def __reduce__(self):
        return type(self), (self.record,)
