"""``heap_provider="nvshmem"``: what communicators and buffers ask of NVSHMEM; both compiled parts are stand-ins."""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Iterator

import pytest
import torch
from harness import shm_problem
from nvshmem_cases import FakeCore
from test_errors import RECORD

from ray_deepep import (
    Buffer,
    ClosedError,
    CommConfig,
    CommFaultError,
    Communicator,
    InvalidArgumentError,
    cuda,
    cuda_heap,
    nvshmem,
)

pytestmark = pytest.mark.skipif(bool(shm_problem()), reason=shm_problem())
SEGMENT_BYTES = 4096
GEOMETRY = {"num_experts": 2, "hidden": 8, "num_topk": 1, "max_tokens": 4}


class FakeDeviceBuffer:
    """Of ``ray_deepep._cuda``; keeps what it was made from."""

    symm_address, symm_bytes = 0, 0
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
