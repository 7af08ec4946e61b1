"""What communicators and buffers ask of NVSHMEM, asked for or taken by ``auto``; both compiled parts are stand-ins."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import types
from collections.abc import Iterator

import pytest
import torch
from harness import RankContext, Ranks, error_of, shm_problem
from nvshmem_cases import CoreNvshmemError, FakeCore
from test_errors import RECORD

from ray_deepep import (
    Buffer,
    ClosedError,
    CommConfig,
    CommFaultError,
    Communicator,
    InvalidArgumentError,
    NvshmemConfig,
    NvshmemError,
    cuda,
    cuda_heap,
    nvshmem,
    shm,
)

pytestmark = pytest.mark.skipif(bool(shm_problem()), reason=shm_problem())
SEGMENT_BYTES = 4096
GEOMETRY = {"num_experts": 2, "hidden": 8, "num_topk": 1, "max_tokens": 4}


class FakeDeviceBuffer:
    """Of ``ray_deepep._cuda``; keeps what it was made from."""

    symm_address, symm_bytes, segment_bytes = 0, 0, SEGMENT_BYTES
    fails = False
    made: list[dict]

    def __init__(self, domain: object, sizes: object, **heap: object) -> None:
        self.made.append(heap)
        if self.fails:
            raise RuntimeError("no memory for control words")

    def close(self) -> None:
        pass


@dataclasses.dataclass(frozen=True, kw_only=True)
class World:
    comm: Communicator
    core: FakeCore
    device_buffer: type[FakeDeviceBuffer]


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """One rank on "GPU 0", with a communicator over NVSHMEM."""
    core = FakeCore()
    device_buffer = type("DeviceBuffer", (FakeDeviceBuffer,), {"made": []})
    kinds = types.SimpleNamespace(VMM="vmm", IPC="ipc", GIVEN="given")
    fake_cuda = types.SimpleNamespace(
        DeviceSizes=types.SimpleNamespace,
        DeviceBuffer=device_buffer,
        HeapProvider=kinds,
        segment_bytes=lambda sizes: SEGMENT_BYTES,
        vmm_supported=lambda device: True,
    )
    monkeypatch.setenv("NVSHMEM_DISABLE_NVLS", "1")
    monkeypatch.setattr(cuda_heap, "load_core", lambda: fake_cuda)
    monkeypatch.setattr(cuda, "cuda_problem", lambda: "")
    monkeypatch.setattr(cuda, "gpu_uuid", lambda: "GPU-0")
    monkeypatch.setattr(cuda, "Streams", lambda device: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    runtime = functools.partial(nvshmem.NvshmemRuntime, load_core=lambda: core)
    monkeypatch.setattr(nvshmem, "NvshmemRuntime", runtime)
    config = CommConfig(transport="cuda", heap_provider="nvshmem", bootstrap_deadline_s=5.0)
    with Communicator.from_exchange(lambda phase, payload: [payload], rank=0, num_ranks=1, config=config) as comm:
        yield World(comm=comm, core=core, device_buffer=device_buffer)


def test_buffers_get_nvshmems_memory_and_give_it_back(world: World) -> None:
    with Buffer(world.comm, **GEOMETRY):
        (heap,) = world.device_buffer.made
        assert (heap["provider"], heap["segments"]) == ("given", [1000])
        assert world.core.released() == []
    assert world.core.released() == [0]
    with Buffer(world.comm, **GEOMETRY):
        assert world.core.calls[-3:] == [("allocate", SEGMENT_BYTES), ("free", 0), ("allocate", SEGMENT_BYTES)]
        assert world.device_buffer.made[1]["segments"] == [2000]


def test_a_buffer_that_fails_gives_its_memory_back(world: World) -> None:
    world.device_buffer.fails = True
    with pytest.raises(RuntimeError, match="control words"):
        Buffer(world.comm, **GEOMETRY)
    assert world.core.released() == [0]


def test_closing_waits_for_nobody_and_leaves_nvshmem_up(world: World) -> None:
    world.comm.close()
    assert world.core.status() == 2 and ("finalize",) not in world.core.calls
    with pytest.raises(ClosedError):
        world.comm.finalize_nvshmem()


def test_finalize_is_asked_for(world: World) -> None:
    buffer = Buffer(world.comm, **GEOMETRY)
    with pytest.raises(InvalidArgumentError, match="buffers"):
        world.comm.finalize_nvshmem()
    buffer.close()
    assert world.comm.finalize_nvshmem() == ""
    assert world.core.calls[-2:] == [("free", 0), ("finalize",)]
    assert world.comm.finalize_nvshmem() == ""
    with pytest.raises(ClosedError, match="finalized"):
        Buffer(world.comm, **GEOMETRY)


def test_a_fault_abandons_nvshmem(world: World) -> None:
    world.comm.mark_fault(RECORD)
    assert world.core.abandoned() == str(RECORD)
    assert world.comm.finalize_nvshmem() == str(RECORD)
    assert ("finalize",) not in world.core.calls
    with pytest.raises(CommFaultError):
        Buffer(world.comm, **GEOMETRY)


def test_buffers_are_made_on_nvshmems_gpu(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    with pytest.raises(InvalidArgumentError, match="GPU 0, on which NVSHMEM was brought up"):
        Buffer(world.comm, **GEOMETRY)
    assert world.core.blocks == {}


def test_other_providers_leave_nvshmem_alone(world: World) -> None:
    config = CommConfig(transport="cuda", heap_provider="vmm", bootstrap_deadline_s=5.0)
    calls = list(world.core.calls)
    with (
        Communicator.from_exchange(lambda phase, payload: [payload], rank=0, num_ranks=1, config=config) as comm,
        Buffer(comm, **GEOMETRY),
    ):
        assert world.device_buffer.made[-1]["provider"] == "vmm" and world.device_buffer.made[-1]["segments"] == []
    assert world.core.calls == calls


@contextlib.contextmanager
def on_host(host: str, core: FakeCore | Exception) -> Iterator[None]:
    """This rank on a host of that name, with a "GPU" and this NVSHMEM; an exception cannot be loaded."""

    def load_core() -> FakeCore:
        if isinstance(core, Exception):
            raise core
        return core

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NVSHMEM_IB_SL", "")
        patch.delenv("NVSHMEM_IB_SL")
        patch.setenv("NVSHMEM_DISABLE_NVLS", "1")
        patch.setattr(cuda, "cuda_problem", lambda: "")
        patch.setattr(cuda, "gpu_uuid", lambda: f"GPU-{os.getpid()}")
        patch.setattr(cuda, "gpu_index", lambda: 0)
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(shm, "machine_id", lambda: host)
        look = nvshmem.look
        patch.setattr(nvshmem, "look", lambda rank, _=None: look(rank, load_core))
        yield


def auto_between_hosts(context: RankContext, ranks_per_host: int) -> None:
    """It is NVSHMEM as if it were asked for: brought up with its settings, and the heap's provider."""
    core = FakeCore()
    with on_host(f"host {context.rank // ranks_per_host}", core):
        comm = context.new_communicator("auto", nvshmem=NvshmemConfig(service_level=3))
        with comm:
            assert (comm.transport, comm.domains.domain_size) == ("cuda", ranks_per_host)
            assert comm.transport_reason.endswith("nodes; NVSHMEM between nodes")
            assert [call[0] for call in core.calls] == ["init"] and os.environ["NVSHMEM_IB_SL"] == "3"
            options = comm._heap_options()
            assert options["heap_provider"] == "nvshmem" and options["nvshmem"].core is core
            assert comm.finalize_nvshmem() == ""
            error_of(ClosedError, comm._heap_options)


@pytest.mark.parametrize(("num_ranks", "ranks_per_host"), ((2, 1), (4, 2)))
def test_auto_takes_nvshmem_between_hosts(ranks: Ranks, num_ranks: int, ranks_per_host: int) -> None:
    ranks.run(num_ranks, auto_between_hosts, ranks_per_host)


def auto_without(context: RankContext, heap_provider: str, reason: str) -> None:
    core = ImportError("no such file") if heap_provider == "auto" and context.rank == 1 else FakeCore()
    with on_host(f"host {context.rank}", core), context.new_communicator("auto", heap_provider=heap_provider) as comm:
        assert (comm.transport, comm.domains.num_nodes) == ("reference", 1)
        assert reason in comm.transport_reason, comm.transport_reason
        assert isinstance(core, Exception) or core.calls == []


@pytest.mark.parametrize(
    ("heap_provider", "reason"),
    (
        ("auto", "NVSHMEM cannot serve them: rank 1 cannot use NVSHMEM (no such file; pip install"),
        ("vmm", "NVSHMEM cannot serve them: rank 0 cannot use NVSHMEM (heap_provider vmm was asked for)"),
    ),
)
def test_auto_without_nvshmem(ranks: Ranks, heap_provider: str, reason: str) -> None:
    ranks.run(2, auto_without, heap_provider, reason)


def auto_that_fails(context: RankContext) -> list[str]:
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    core = FakeCore(init_error=CoreNvshmemError("init", 7, 0, "no network") if context.rank == 1 else None)
    logging.getLogger("ray_deepep").addHandler(handler)
    try:
        with on_host(f"host {context.rank}", core):
            error = error_of(NvshmemError, lambda: context.new_communicator("auto"))
    finally:
        logging.getLogger("ray_deepep").removeHandler(handler)
    assert "no network" in error.reason and core.abandoned()
    return records


def test_an_nvshmem_that_auto_took_and_that_fails(ranks: Ranks) -> None:
    """It is an error, for who has started it must start new processes; and the way around it is said once."""
    told = ranks.run(2, auto_that_fails)
    assert sum("transport reference does without it" in line for line in told[0]) == 1 and told[1] == []


def auto_on_one_host(context: RankContext) -> None:
    core = FakeCore()
    with on_host("host", core), context.new_communicator("auto") as comm:
        assert comm.transport == "cuda" and comm._heap_options()["heap_provider"] == "auto" and core.calls == []


def test_auto_leaves_nvshmem_alone_on_one_host(ranks: Ranks) -> None:
    ranks.run(2, auto_on_one_host)
