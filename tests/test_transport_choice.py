"""Which transport and which domains ranks get, from what they told each other: pure decisions."""

from __future__ import annotations

import pytest
from harness import error_of

from ray_deepep import InvalidArgumentError, TransportUnavailableError
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
        "cuda",
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
    "GPUs": ("auto", on_hosts("a", "a", "a", "a", cuda_problem="", gpu="u"), "shm", "each of 2 nodes"),
    "nvshmem": (
        "nvshmem",
        on_hosts("a", "a", "b", "b", cuda_problem="", gpu="u"),
        "cuda",
        "asked for, on NVSHMEM's symmetric heap; NVSHMEM between 2 nodes",
    ),
}


@pytest.mark.parametrize("name", NODES)
def test_choose_transport_of_nodes(name: str) -> None:
    wanted, peers, transport, reason = NODES[name]
    found, why = choose_transport(wanted, peers, 2)
    assert found == transport
    assert reason in why


REFUSED_NODES = {
    "no group": ("shm", on_hosts("a", "a", "b", "b", has_group=False), "2 nodes need a torch process group"),
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
