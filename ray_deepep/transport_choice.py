"""Which transport serves a group of ranks, in which domains: pure functions of what all ranks know, so all agree."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .errors import InvalidArgumentError, NvshmemError, TransportUnavailableError
from .nvshmem_decisions import RankReport, decide_bring_up

if TYPE_CHECKING:
    from .rank_info import RankInfo


def choose_domain_size(wanted: int, transport: str, peers: Sequence[RankInfo]) -> int:
    """Ranks of a domain: those wanted, or (0) those of each host, where hosts have equally many ranks, one host after
    the other, and rows can go between them; else all. ``transport`` is the one asked for.

    Rows can go between CPU hosts with at least two ranks each, and between GPU hosts where ``nvshmem`` is asked for or
    ``auto`` finds NVSHMEM on all ranks.

    Raises:
        InvalidArgumentError: the ranks cannot be cut into domains of that size.
    """
    num_ranks = len(peers)
    if wanted:
        if num_ranks % wanted:
            raise InvalidArgumentError("domain_size", wanted, f"must divide the {num_ranks} ranks")
        return wanted
    if _hosts_problem(peers):
        return num_ranks
    size = Counter(peer.machine for peer in peers)[peers[0].machine]
    if any(peer.has_gpu for peer in peers) and transport == "auto":
        return num_ranks if _nvshmem_problem(peers) else size
    for_cpus = transport in ("auto", "shm") and not any(peer.has_gpu for peer in peers)
    return size if transport == "nvshmem" or (for_cpus and size > 1) else num_ranks


def choose_transport(wanted: str, peers: Sequence[RankInfo], domain_size: int | None = None) -> tuple[str, str]:
    """Transport for these ranks, in domains of ``domain_size`` (None: one domain), and the reason, in words.

    ``nvshmem`` is the CUDA core on NVSHMEM's symmetric heap, which also takes rows between domains.

    Raises:
        TransportUnavailableError: the wanted transport cannot serve them.
    """
    domain_size = domain_size or len(peers)
    problem = _core_problem(peers, domain_size)
    if wanted == "auto":
        return _choose_auto(peers, domain_size, problem)
    num_nodes = len(peers) // domain_size
    no_cuda = problem or _cuda_problem(peers)
    if wanted in ("cuda", "nvshmem") and no_cuda:
        advice = "transport auto takes what serves all ranks, ray-deepep doctor says what a machine lacks"
        raise TransportUnavailableError(f"transport {wanted}: {no_cuda}; {advice}")
    if wanted == "nvshmem":
        between = f"; NVSHMEM between {num_nodes} nodes" if num_nodes > 1 else ""
        return "nvshmem", f"asked for, on NVSHMEM's symmetric heap{between}"
    if wanted == "cuda" and num_nodes > 1:
        problem = f"it serves one domain, and there are {num_nodes}; transport nvshmem serves several"
        raise TransportUnavailableError(f"transport cuda: {problem}")
    if wanted == "reference" and not _all_have_group(peers):
        raise TransportUnavailableError("transport reference needs a torch process group on every rank")
    if wanted == "shm" and problem:
        raise _unavailable(wanted, peers, problem)
    if wanted == "shm" and num_nodes > 1:
        return "shm", f"asked for; {_shared_memory(peers, domain_size)}"
    return wanted, "asked for"


def _choose_auto(peers: Sequence[RankInfo], domain_size: int, problem: str) -> tuple[str, str]:
    """The first that serves: CUDA in one domain, NVSHMEM beyond it, shared memory, torch.distributed; ``problem`` is
    why the compiled cores cannot."""
    num_ranks, num_nodes = len(peers), len(peers) // domain_size
    if not problem and num_nodes == 1 and not _cuda_problem(peers):
        return "cuda", f"all {num_ranks} ranks have GPUs of {peers[0].host}"
    no_nvshmem = _nvshmem_problem(peers)
    if not problem and num_nodes > 1 and not no_nvshmem:
        where = f"{domain_size} on each of {num_nodes} nodes"
        return "nvshmem", f"all {num_ranks} ranks have GPUs, {where}; NVSHMEM between nodes"
    # CPU hosts need not hear of NVSHMEM.
    missing = no_nvshmem or _hosts_problem(peers) if any(peer.has_gpu for peer in peers) else ""
    if problem:
        if missing and problem == _sharing_problem(peers, domain_size):
            problem += f", and NVSHMEM cannot serve them: {missing}"
        if not _all_have_group(peers):
            raise _unavailable("auto", peers, problem)
        return "reference", f"{problem}; torch.distributed serves any hosts"
    why = _shared_memory(peers, domain_size)
    if num_nodes > 1 and missing:
        why += f", since NVSHMEM cannot serve them: {missing}"
    return "shm", why


def _unavailable(wanted: str, peers: Sequence[RankInfo], problem: str) -> TransportUnavailableError:
    fallback = "there is no torch process group to fall back on"
    if _all_have_group(peers):
        fallback = "transport reference would serve them"
    return TransportUnavailableError(f"transport {wanted}: {problem}; {fallback}")


def _shared_memory(peers: Sequence[RankInfo], domain_size: int) -> str:
    """How transport ``shm`` serves these ranks."""
    num_nodes = len(peers) // domain_size
    if num_nodes == 1:
        return f"all {domain_size} ranks share the memory of {peers[0].host}"
    return f"the {domain_size} ranks of each of {num_nodes} nodes share memory; torch.distributed between nodes"


def _all_have_group(peers: Sequence[RankInfo]) -> bool:
    return all(peer.has_group for peer in peers)


def _core_problem(peers: Sequence[RankInfo], domain_size: int) -> str:
    """Why the compiled cores cannot serve these ranks; empty if the CPU core can."""
    without_core = [p for p in peers if not p.core]
    versions = sorted({p.core for p in peers})
    num_nodes = len(peers) // domain_size
    if without_core:
        return f"rank {without_core[0].rank} cannot load the compiled core ({without_core[0].core_problem})"
    if len(versions) > 1:
        return f"ranks run different versions of the compiled core ({', '.join(versions)})"
    problem = _sharing_problem(peers, domain_size)
    if not problem and num_nodes > 1 and not _all_have_group(peers):
        return f"{num_nodes} nodes need a torch process group on every rank"
    return problem


def _sharing_problem(peers: Sequence[RankInfo], domain_size: int) -> str:
    """Which domain has ranks that cannot share memory; empty if none has."""
    for first in range(0, len(peers), domain_size):
        domain = peers[first : first + domain_size]
        if len({p.machine for p in domain}) > 1:
            hosts = sorted({p.host for p in domain})
            which = "" if len(domain) == len(peers) else f" {first} to {first + domain_size - 1}"
            return f"ranks{which} cannot share memory (hosts {', '.join(hosts)})"
    return ""


def _hosts_problem(peers: Sequence[RankInfo]) -> str:
    """Why the ranks of each host are no domains; empty if they are."""
    counts = Counter(peer.machine for peer in peers)
    hosts = {peer.machine: peer.host for peer in peers}
    first = peers[0].machine
    seen: set[str] = set()
    for machine, _ in itertools.groupby(peer.machine for peer in peers):
        if machine in seen:
            return f"the ranks of host {hosts[machine]} do not follow each other"
        seen.add(machine)
    for machine, count in counts.items():
        if count != counts[first]:
            return f"hosts {hosts[first]} and {hosts[machine]} have {counts[first]} and {count} ranks"
    return ""


def _cuda_problem(peers: Sequence[RankInfo]) -> str:
    without_cuda = [p for p in peers if p.cuda_problem]
    return f"rank {without_cuda[0].rank}: {without_cuda[0].cuda_problem}" if without_cuda else ""


def _nvshmem_problem(peers: Sequence[RankInfo]) -> str:
    """Why these ranks cannot bring NVSHMEM up together; empty if nothing speaks against it."""
    if problem := _cuda_problem(peers):
        return problem
    try:
        decide_bring_up([p.nvshmem or RankReport(rank=p.rank, problem="it did not look for it") for p in peers])
    except NvshmemError as error:
        return f"rank {error.ranks[0]} cannot use NVSHMEM ({error.reason})"
    return ""
