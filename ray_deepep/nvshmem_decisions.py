"""What the ranks of a group do about NVSHMEM, decided from what all of them said: needs neither NVSHMEM nor a GPU.

Every rank computes the same answer, so either all make a collective call or none does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from .errors import MismatchError, NvshmemError

NOT_UP, HALF_UP, READY = 0, 1, 2
"""Of NVSHMEM's status: nothing yet; ranks have met but there is no GPU; from this on it can be used."""


def version_problem(built: str, loaded: str) -> str:
    """Why a core built for one release of NVSHMEM cannot run with the loaded one; empty if they are the same."""
    if built == loaded:
        return ""
    return (
        f"built for NVSHMEM {built}, but {loaded} is loaded, whose data has another shape;"
        f" pip install nvidia-nvshmem-cu13=={built}, or build ray_deepep again"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankReport:
    """What a rank says of its NVSHMEM before anything is called."""

    rank: int
    problem: str = ""
    """Why it cannot use NVSHMEM; empty if it can."""
    version: str = ""
    status: int = NOT_UP
    pe: int = -1
    """Its PE, and their number, where NVSHMEM is up already."""
    num_pes: int = 0
    unique_id: str = ""
    """Hexadecimal, of rank 0 where it is not up yet."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BringUp:
    """What all ranks do."""

    join: bool
    """NVSHMEM is up on all of them: join it."""
    unique_id: bytes
    """Otherwise, 128 bytes with which they find each other."""


def decide_bring_up(reports: Sequence[RankReport]) -> BringUp:
    """Whether these ranks, in rank order, bring NVSHMEM up or join it.

    Raises:
        NvshmemError: they can do neither; names the ranks in the way, and why.
    """
    num_ranks = len(reports)
    if broken := [r for r in reports if r.problem]:
        raise NvshmemError("bring_up", [r.rank for r in broken], broken[0].problem)
    if other := [r for r in reports if r.version != reports[0].version]:
        reason = f"NVSHMEM {other[0].version}, but rank 0 has {reports[0].version}; all need the same"
        raise NvshmemError("bring_up", [r.rank for r in other], reason)
    if half := [r for r in reports if r.status == HALF_UP]:
        reason = "an earlier attempt failed half way; start these processes again"
        raise NvshmemError("bring_up", [r.rank for r in half], reason)
    up = [r for r in reports if r.status >= READY]
    if not up:
        return BringUp(join=False, unique_id=bytes.fromhex(reports[0].unique_id))
    if len(up) < num_ranks:
        reason = f"NVSHMEM is up already, on {len(up)} of {num_ranks} ranks only; it must be on all or none"
        raise NvshmemError("bring_up", [r.rank for r in up], reason)
    if larger := [r for r in up if r.num_pes != num_ranks]:
        reason = f"NVSHMEM is up already with {larger[0].num_pes} PEs; this group has {num_ranks} ranks"
        raise NvshmemError("bring_up", [r.rank for r in larger], reason)
    check_pes([r.pe for r in up])
    return BringUp(join=True, unique_id=b"")


def check_pes(rank_to_pe: Sequence[int]) -> tuple[int, ...]:
    """The PEs by rank, where each has one of its own.

    They need not be in rank order: whoever initialised NVSHMEM first has chosen.

    Raises:
        NvshmemError: two ranks have one PE, or a rank has one outside the group: they joined different NVSHMEMs.
    """
    num_ranks = len(rank_to_pe)
    wrong = [
        rank for rank, pe in enumerate(rank_to_pe) if not 0 <= pe < num_ranks or list(rank_to_pe).index(pe) != rank
    ]
    if wrong:
        reason = f"PEs by rank are {list(rank_to_pe)}, not each of 0 to {num_ranks - 1} once: not one group's NVSHMEM"
        raise NvshmemError("bring_up", wrong, reason)
    return tuple(rank_to_pe)


def decide_initialised(outcomes: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
    """PE of each rank from what ranks say after init: ``{"pe", "error"}`` each.

    Raises:
        NvshmemError: it failed somewhere.
    """
    if failed := [rank for rank, outcome in enumerate(outcomes) if outcome["error"]]:
        raise NvshmemError("init", failed, outcomes[failed[0]]["error"])
    return check_pes([outcome["pe"] for outcome in outcomes])


def decide_frees(requests: Sequence[Mapping[str, Any]]) -> list[int]:
    """Blocks that all ranks have released, in the order in which all free them, before an allocation that ranks ask for
    with ``{"num_bytes", "released"}`` each.

    Raises:
        MismatchError: they ask for different sizes.
    """
    for rank, request in enumerate(requests):
        if request["num_bytes"] != requests[0]["num_bytes"]:
            raise MismatchError("allocate", rank, "heap_bytes", requests[0]["num_bytes"], request["num_bytes"])
    return sorted(set.intersection(*(set(request["released"]) for request in requests)))


def decide_abandon(*, fault: str, gone: Sequence[int], abandoned: str) -> str:
    """Why a rank must not take part in a collective end of NVSHMEM, which hangs with a dead peer; empty if it may."""
    if abandoned:
        return abandoned
    if gone:
        return f"the process of rank {', '.join(map(str, gone))} is gone"
    return fault
