"""Which transport serves a group of ranks, in which domains: pure functions of what all ranks know, so all agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .errors import InvalidArgumentError, TransportUnavailableError

if TYPE_CHECKING:
    from .rank_info import RankInfo


def choose_domain_size(wanted: int, transport: str, peers: Sequence[RankInfo]) -> int:
    """Ranks of a domain: those wanted, or (0) those of each host where all are CPU hosts, or ``nvshmem`` is asked for,
    with equally many ranks, at least two, one host after the other; else all. ``transport`` is the one asked for.

    Raises:
        InvalidArgumentError: the ranks cannot be cut into domains of that size.
    """
    num_ranks = len(peers)
    if wanted:
        if num_ranks % wanted:
            raise InvalidArgumentError("domain_size", wanted, f"must divide the {num_ranks} ranks")
        return wanted
    size = 1
    while size < num_ranks and peers[size].machine == peers[0].machine:
        size += 1
    equal = num_ranks % size == 0 and all(peer.machine == peers[peer.rank // size * size].machine for peer in peers)
    hosts = {peer.machine for peer in peers}
    one_each = equal and len(hosts) == num_ranks // size
    for_cpus = transport in ("auto", "shm") and not any(peer.has_gpu for peer in peers)
    return size if size > 1 and one_each and (for_cpus or transport == "nvshmem") else num_ranks


def choose_transport(wanted: str, peers: Sequence[RankInfo], domain_size: int | None = None) -> tuple[str, str]:
    """Transport for these ranks, in domains of ``domain_size`` (None: one domain), and the reason, in words.

    Raises:
        TransportUnavailableError: the wanted transport cannot serve them.
    """
    domain_size = domain_size or len(peers)
    num_nodes = len(peers) // domain_size
    problem = _core_problem(peers, domain_size)
    has_group = all(p.has_group for p in peers)
    if not problem and num_nodes > 1 and not has_group:
        problem = f"{num_nodes} nodes need a torch process group on every rank"
    no_cuda = problem or _cuda_problem(peers)
    if wanted in ("cuda", "nvshmem") and no_cuda:
        advice = "transport auto takes what serves all ranks, ray-deepep doctor says what a machine lacks"
        raise TransportUnavailableError(f"transport {wanted}: {no_cuda}; {advice}")
    if wanted == "nvshmem":
        between = f"; NVSHMEM between {num_nodes} nodes" if num_nodes > 1 else ""
        return "cuda", f"asked for, on NVSHMEM's symmetric heap{between}"
    if wanted == "cuda" and num_nodes > 1:
        problem = f"it serves one domain, and there are {num_nodes}; transport nvshmem serves several"
        raise TransportUnavailableError(f"transport cuda: {problem}")
    if wanted == "cuda" or (wanted == "auto" and not no_cuda and num_nodes == 1):
        return "cuda", "asked for" if wanted == "cuda" else f"all {len(peers)} ranks have GPUs of {peers[0].host}"
    if wanted == "reference" or (wanted == "auto" and problem and has_group):
        if not has_group:
            raise TransportUnavailableError("transport reference needs a torch process group on every rank")
        return "reference", "asked for" if wanted == "reference" else f"{problem}; torch.distributed serves any hosts"
    if problem:
        fallback = (
            "transport reference would serve them" if has_group else "there is no torch process group to fall back on"
        )
        raise TransportUnavailableError(f"transport {wanted}: {problem}; {fallback}")
    why = f"all {domain_size} ranks share the memory of {peers[0].host}"
    if num_nodes > 1:
        why = f"the {domain_size} ranks of each of {num_nodes} nodes share memory; torch.distributed between nodes"
    return "shm", f"asked for; {why}" if wanted == "shm" and num_nodes > 1 else "asked for" if wanted == "shm" else why


def _core_problem(peers: Sequence[RankInfo], domain_size: int) -> str:
    """Why the CPU core cannot serve these ranks; empty if it can."""
    without_core = [p for p in peers if not p.core]
    versions = sorted({p.core for p in peers})
    if without_core:
        return f"rank {without_core[0].rank} cannot load the compiled core ({without_core[0].core_problem})"
    if len(versions) > 1:
        return f"ranks run different versions of the compiled core ({', '.join(versions)})"
    for first in range(0, len(peers), domain_size):
        domain = peers[first : first + domain_size]
        if len({p.machine for p in domain}) > 1:
            hosts = sorted({p.host for p in domain})
            which = "" if len(domain) == len(peers) else f" {first} to {first + domain_size - 1}"
            return f"ranks{which} cannot share memory (hosts {', '.join(hosts)})"
    return ""


def _cuda_problem(peers: Sequence[RankInfo]) -> str:
    without_cuda = [p for p in peers if p.cuda_problem]
    return f"rank {without_cuda[0].rank}: {without_cuda[0].cuda_problem}" if without_cuda else ""
