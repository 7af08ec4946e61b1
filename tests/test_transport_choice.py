"""Which transport and which domains ranks get, from what they told each other: pure decisions."""

from __future__ import annotations

import dataclasses

import pytest
from harness import error_of

from ray_deepep import InvalidArgumentError, TransportUnavailableError
from ray_deepep.nvshmem_decisions import RankReport
from ray_deepep.rank_info import RankInfo
from ray_deepep.transport_choice import choose_domain_size, choose_transport


def peer(rank: int, **fields: object) -> RankInfo:
    usual = {
        "host": "a",
        "pid": 1,
        "machine": "m",
        "core": "1.0",
        "core_problem": "",
        "config": {},
        "has_group": True,
    }
    return RankInfo(rank=rank, **{**usual, **fields})


CHOICES = {
    "one host": ("auto", [peer(0), peer(1)], "shm", "all 2 ranks share the memory of a"),
    "one host without group": ("auto", [peer(0, has_group=False), peer(1, has_group=False)], "shm", "share the memory"),
    "shm asked for": ("shm", [peer(0), peer(1)], "shm", "asked for"),
    "GPUs on one host": (
        "auto",
        [peer(0, cuda_problem="", gpu="u"), peer(1, cuda_problem="", gpu="v")],
        "cuda",
        "all 2 ranks have GPUs of a",
    ),
    "one rank without GPU": (
        "auto",
        [peer(0, cuda_problem="", gpu="u"), peer(1)],
        "shm",
        "all 2 ranks share the memory",
    ),
    "nvshmem asked for": (
        "nvshmem",
        [peer(0, cuda_problem="", gpu="u"), peer(1, cuda_problem="", gpu="v")],
        "nvshmem",
        "on NVSHMEM's symmetric heap",
    ),
    "reference asked for": ("reference", [peer(0), peer(1)], "reference", "asked for"),
    "two hosts": (
        "auto",
        [peer(0), peer(1, host="b", machine="n")],
        "reference",
        "ranks cannot share memory (hosts a, b); torch.distributed serves any hosts",
    ),
    "one rank without core": (
        "auto",
        [peer(0), peer(1, core="", core_problem="no such file")],
        "reference",
        "rank 1 cannot load the compiled core (no such file)",
    ),
    "two versions": (
        "auto",
        [peer(0), peer(1, core="1.1")],
        "reference",
        "different versions of the compiled core (1.0, 1.1)",
    ),
}


@pytest.mark.parametrize("name", CHOICES)
def test_choose_transport(name: str) -> None:
    wanted, peers, transport, reason = CHOICES[name]
    found, why = choose_transport(wanted, tuple(peers))
    assert found == transport
    assert reason in why


def on_hosts(*hosts: str, **fields: object) -> list[RankInfo]:
    return [peer(rank, host=host, machine=host, **fields) for rank, host in enumerate(hosts)]


def on_gpus(*hosts: str, **fields: object) -> list[RankInfo]:
    """Ranks with everything that NVSHMEM needs."""
    fields = {"has_gpu": True, "cuda_problem": "", "gpu": "u", **fields}
    return [
        dataclasses.replace(peer, nvshmem=RankReport(rank=peer.rank, version="3.4.5"))
        for peer in on_hosts(*hosts, **fields)
    ]


def but(peers: list[RankInfo], rank: int, report: dict[str, object] | None = None, **fields: object) -> list[RankInfo]:
    """The same ranks, one of which tells something else of itself or, ``report``, of its NVSHMEM."""
    if report is not None:
        fields["nvshmem"] = dataclasses.replace(peers[rank].nvshmem, **report)
    return [*peers[:rank], dataclasses.replace(peers[rank], **fields), *peers[rank + 1 :]]


DOMAIN_SIZES = {
    "one host": (0, "auto", on_hosts("a", "a"), 2),
    "two hosts": (0, "auto", on_hosts("a", "a", "b", "b"), 2),
    "two hosts, shm asked for": (0, "shm", on_hosts("a", "a", "a", "b", "b", "b"), 3),
    "two hosts, reference asked for": (0, "reference", on_hosts("a", "a", "b", "b"), 4),
    "one rank on each host": (0, "auto", on_hosts("a", "b"), 2),
    "different counts": (0, "auto", on_hosts("a", "a", "b"), 3),
    "different counts that divide": (0, "auto", on_hosts("a", "a", "b", "c"), 4),
    "ranks not by host": (0, "auto", on_hosts("a", "b", "a", "b"), 4),
    "a host that comes again": (0, "auto", on_hosts("a", "a", "b", "b", "a", "a"), 6),
    "GPUs": (0, "auto", on_hosts("a", "a", "b", "b", has_gpu=True), 4),
    "GPUs, nvshmem asked for": (0, "nvshmem", on_hosts("a", "a", "b", "b", has_gpu=True), 2),
    "GPUs, one rank on each host, nvshmem asked for": (0, "nvshmem", on_gpus("a", "b"), 1),
    "GPUs and NVSHMEM": (0, "auto", on_gpus("a", "a", "b", "b"), 2),
    "GPUs and NVSHMEM, one host": (0, "auto", on_gpus("a", "a", "a", "a"), 4),
    "GPUs and NVSHMEM, one rank on each host": (0, "auto", on_gpus("a", "b", "c", "d"), 1),
    "GPUs and NVSHMEM, different counts": (0, "auto", on_gpus("a", "a", "b"), 3),
    "GPUs and NVSHMEM, ranks not by host": (0, "auto", on_gpus("a", "b", "a", "b"), 4),
    "GPUs, one rank without NVSHMEM": (0, "auto", but(on_gpus("a", "a", "b", "b"), 3, {"problem": "none"}), 4),
    "GPUs and NVSHMEM, shm asked for": (0, "shm", on_gpus("a", "a", "b", "b"), 4),
    "GPUs and NVSHMEM, logical nodes": (2, "auto", on_gpus("a", "a", "a", "a"), 2),
    "logical nodes": (2, "auto", on_hosts("a", "a", "a", "a"), 2),
    "logical nodes of one": (1, "shm", on_hosts("a", "a", "a"), 1),
}


@pytest.mark.parametrize("name", DOMAIN_SIZES)
def test_choose_domain_size(name: str) -> None:
    wanted, transport, peers, size = DOMAIN_SIZES[name]
    assert choose_domain_size(wanted, transport, peers) == size


def test_domain_size_that_does_not_divide() -> None:
    error = error_of(InvalidArgumentError, lambda: choose_domain_size(3, "shm", on_hosts("a", "a", "a", "a")))
    assert str(error) == "domain_size: must divide the 4 ranks; got 3"


NODES = {
    "two hosts": (
        "auto",
        on_hosts("a", "a", "b", "b"),
        "shm",
        "the 2 ranks of each of 2 nodes share memory; torch.distributed between nodes",
    ),
    "shm asked for": ("shm", on_hosts("a", "a", "b", "b"), "shm", "asked for; the 2 ranks of each of 2 nodes"),
    "a domain over two hosts": (
        "auto",
        on_hosts("a", "a", "b", "c"),
        "reference",
        "ranks 2 to 3 cannot share memory (hosts b, c); torch.distributed serves any hosts",
    ),
    "nvshmem": (
        "nvshmem",
        on_hosts("a", "a", "b", "b", cuda_problem="", gpu="u"),
        "nvshmem",
        "asked for, on NVSHMEM's symmetric heap; NVSHMEM between 2 nodes",
    ),
}


@pytest.mark.parametrize("name", NODES)
def test_choose_transport_of_nodes(name: str) -> None:
    wanted, peers, transport, reason = NODES[name]
    found, why = choose_transport(wanted, peers, 2)
    assert found == transport
    assert reason in why


AUTO_WITH_GPUS = {
    "one host": (on_gpus("a", "a", "a", "a"), "cuda", "all 4 ranks have GPUs of a"),
    "one host without NVSHMEM": (but(on_gpus("a", "a"), 0, nvshmem=None), "cuda", "all 2 ranks have GPUs of a"),
    "two hosts": (
        on_gpus("a", "a", "b", "b"),
        "nvshmem",
        "all 4 ranks have GPUs, 2 on each of 2 nodes; NVSHMEM between nodes",
    ),
    "one rank on each host": (
        on_gpus("a", "b", "c"),
        "nvshmem",
        "all 3 ranks have GPUs, 1 on each of 3 nodes; NVSHMEM between nodes",
    ),
    "NVSHMEM is up with these ranks": (
        but(but(on_gpus("a", "b"), 0, {"status": 2, "pe": 1, "num_pes": 2}), 1, {"status": 2, "pe": 0, "num_pes": 2}),
        "nvshmem",
        "NVSHMEM between nodes",
    ),
    "no NVSHMEM on a rank": (
        but(on_gpus("a", "a", "b", "b"), 3, {"problem": "no libnvshmem_host.so.3"}),
        "reference",
        "ranks cannot share memory (hosts a, b), and NVSHMEM cannot serve them: rank 3 cannot use NVSHMEM (no "
        "libnvshmem_host.so.3); torch.distributed serves any hosts",
    ),
    "NVSHMEM not looked for": (
        but(on_gpus("a", "b"), 1, nvshmem=None),
        "reference",
        "NVSHMEM cannot serve them: rank 1 cannot use NVSHMEM (it did not look for it)",
    ),
    "two versions of NVSHMEM": (
        but(on_gpus("a", "b"), 1, {"version": "3.8.0"}),
        "reference",
        "rank 1 cannot use NVSHMEM (NVSHMEM 3.8.0, but rank 0 has 3.4.5; all need the same)",
    ),
    "NVSHMEM is up for others": (
        but(on_gpus("a", "b"), 0, {"status": 2, "pe": 0, "num_pes": 4}),
        "reference",
        "rank 0 cannot use NVSHMEM (NVSHMEM is up already, on 1 of 2 ranks only",
    ),
    "no CUDA core on a rank": (
        but(on_gpus("a", "a", "b", "b"), 2, cuda_problem="no CUDA core (no such file)", nvshmem=None),
        "reference",
        "and NVSHMEM cannot serve them: rank 2: no CUDA core (no such file); torch.distributed",
    ),
    "a host without GPU": (
        but(on_gpus("a", "b"), 1, cuda_problem="torch sees no GPU", has_gpu=False),
        "reference",
        "and NVSHMEM cannot serve them: rank 1: torch sees no GPU; torch.distributed",
    ),
    "different counts": (
        on_gpus("a", "a", "a", "a", "b", "b"),
        "reference",
        "and NVSHMEM cannot serve them: hosts a and b have 4 and 2 ranks; torch.distributed",
    ),
    "ranks not by host": (
        on_gpus("a", "b", "a", "b"),
        "reference",
        "and NVSHMEM cannot serve them: the ranks of host a do not follow each other; torch.distributed",
    ),
    "no compiled core on a rank": (
        but(on_gpus("a", "b"), 1, core="", core_problem="no such file"),
        "reference",
        "rank 1 cannot load the compiled core (no such file); torch.distributed serves any hosts",
    ),
}


@pytest.mark.parametrize("name", AUTO_WITH_GPUS)
def test_auto_with_gpus(name: str) -> None:
    peers, transport, reason = AUTO_WITH_GPUS[name]
    found, why = choose_transport("auto", peers, choose_domain_size(0, "auto", peers))
    assert found == transport
    assert reason in why


AUTO_WITH_DOMAINS = {
    "logical nodes": (on_gpus("a", "a", "a", "a"), "nvshmem", "all 4 ranks have GPUs, 2 on each of 2 nodes"),
    "logical nodes without NVSHMEM": (
        but(on_gpus("a", "a", "a", "a"), 1, {"problem": "heap_provider vmm was asked for"}),
        "shm",
        "the 2 ranks of each of 2 nodes share memory; torch.distributed between nodes, since NVSHMEM cannot serve "
        "them: rank 1 cannot use NVSHMEM (heap_provider vmm was asked for)",
    ),
    "a domain over two hosts": (
        on_gpus("a", "a", "b", "c"),
        "reference",
        "ranks 2 to 3 cannot share memory (hosts b, c), and NVSHMEM cannot serve them: hosts a and b have 2 and 1 ",
    ),
    "domains over two hosts": (
        on_gpus("a", "b", "c", "d"),
        "reference",
        "ranks 0 to 1 cannot share memory (hosts a, b); torch.distributed serves any hosts",
    ),
}


@pytest.mark.parametrize("name", AUTO_WITH_DOMAINS)
def test_auto_with_gpus_in_domains_of_two(name: str) -> None:
    peers, transport, reason = AUTO_WITH_DOMAINS[name]
    found, why = choose_transport("auto", peers, 2)
    assert found == transport
    assert reason in why


REFUSED_NODES = {
    "no group": ("shm", on_hosts("a", "a", "b", "b", has_group=False), "2 nodes need a torch process group"),
    "no group, auto": (
        "auto",
        on_gpus("a", "a", "b", "b", has_group=False),
        "2 nodes need a torch process group",
    ),
    "cuda": ("cuda", on_hosts("a", "a", "b", "b", cuda_problem=""), "it serves one domain, and there are 2"),
    "a domain over two hosts": ("shm", on_hosts("a", "b", "b", "b"), "ranks 0 to 1 cannot share memory (hosts a, b)"),
}


@pytest.mark.parametrize("name", REFUSED_NODES)
def test_refused_transport_of_nodes(name: str) -> None:
    wanted, peers, message = REFUSED_NODES[name]
    assert message in str(error_of(TransportUnavailableError, lambda: choose_transport(wanted, peers, 2)))


REFUSALS = {
    "cuda without GPU": (
        "cuda",
        [peer(0, cuda_problem="", gpu="u"), peer(1, cuda_problem="no driver")],
        "transport cuda: rank 1: no driver",
    ),
    "nvshmem without GPU": (
        "nvshmem",
        [peer(0, cuda_problem="", gpu="u"), peer(1, cuda_problem="no driver")],
        "transport nvshmem: rank 1: no driver",
    ),
    "cuda on two hosts": (
        "cuda",
        [peer(0, cuda_problem=""), peer(1, cuda_problem="", host="b", machine="n")],
        "transport cuda: ranks cannot share memory (hosts a, b)",
    ),
    "shm on two hosts": ("shm", [peer(0), peer(1, host="b", machine="n")], "ranks cannot share memory (hosts a, b)"),
    "shm without core": (
        "shm",
        [peer(0, core="", core_problem="no such file")],
        "rank 0 cannot load the compiled core",
    ),
    "shm with two versions": ("shm", [peer(0), peer(1, core="1.1")], "different versions"),
    "reference without group": (
        "reference",
        [peer(0), peer(1, has_group=False)],
        "needs a torch process group on every rank",
    ),
    "auto with nothing": (
        "auto",
        [peer(0, has_group=False), peer(1, has_group=False, host="b", machine="n")],
        "no torch process group to fall back on",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_transport(name: str) -> None:
    wanted, peers, message = REFUSALS[name]
    assert message in str(error_of(TransportUnavailableError, lambda: choose_transport(wanted, tuple(peers))))
