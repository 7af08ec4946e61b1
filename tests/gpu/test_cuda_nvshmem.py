"""The CUDA core on NVSHMEM's symmetric heap: same results, and what NVSHMEM itself must do on real GPUs.

tests/gpu/run.sh tests/gpu/test_cuda_nvshmem.py
RAY_DEEPEP_HEAP_PROVIDER=nvshmem tests/gpu/run.sh tests/gpu/test_cuda_core.py    # any other test on NVSHMEM's heap
"""

from __future__ import annotations

import dataclasses
import os
import signal
import time

import device_cases
import pytest
import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
from harness import RankContext, RankPool, Ranks, error_of
from test_cuda_heap import make_buffer, make_case, over_provider, provider_cases

from ray_deepep import CommConfig, CommFaultError, Communicator, NvshmemError, TokenMajor, nvshmem
from ray_deepep.cuda import cuda_problem


def problem() -> str:
    if cuda_problem():
        return f"transport cuda: {cuda_problem()}"
    try:
        nvshmem.load()
    except (ImportError, OSError) as error:
        return f"no NVSHMEM core: {error}"
    return ""


pytestmark = pytest.mark.skipif(bool(problem()), reason=problem())


def new_communicator(context: RankContext) -> Communicator:
    device_cases.use_gpu(context.rank)
    return context.new_communicator("cuda", heap_provider="nvshmem")


@pytest.mark.parametrize("num_ranks", (1, 2, 4))
def test_same_results(ranks: Ranks, num_ranks: int) -> None:
    ranks.run(num_ranks, over_provider, "nvshmem", provider_cases(num_ranks), deadline_s=180.0)


def again(context: RankContext) -> None:
    """Finalize and come up again, with a new id; and join what a communicator before left up."""
    world = device_cases.make_world(make_case(context.num_ranks, TokenMajor()), device_cases.use_gpu(context.rank))
    # Pools are shared by cases, so NVSHMEM may be up from one before.
    for finalize in (True, True, False, False):
        with new_communicator(context) as comm:
            alone = dataclasses.replace(context, communicators={"cuda": comm})
            for _ in range(2):
                with make_buffer(alone, make_case(context.num_ranks, TokenMajor())) as buffer:
                    result = device_cases.dispatch(buffer, world, context.rank)
                    device_cases.assert_dispatched(result, world, context.rank)
            if finalize:
                assert comm.finalize_nvshmem() == ""
                assert nvshmem.load().status() == 0
        if not finalize:
            assert nvshmem.load().status() >= 2


@pytest.mark.parametrize("num_ranks", (1, 2))
def test_finalize_join_and_bring_up_again(ranks: Ranks, num_ranks: int) -> None:
    ranks.run(num_ranks, again, deadline_s=180.0)


def beside_torch(context: RankContext) -> None:
    """torch's symmetric memory brings NVSHMEM up first: it is joined, and stays up when this library leaves."""
    device = device_cases.use_gpu(context.rank)
    symmetric_memory.set_backend("NVSHMEM")
    symmetric_memory.enable_symm_mem_for_group(dist.group.WORLD.group_name)
    of_torch = symmetric_memory.empty(64, device=device)
    symmetric_memory.rendezvous(of_torch, group=dist.group.WORLD.group_name)
    core = nvshmem.load()
    assert core.status() >= 2 and core.num_pes() == context.num_ranks
    case = make_case(context.num_ranks, TokenMajor())
    world = device_cases.make_world(case, device)
    with new_communicator(context) as comm:
        with make_buffer(dataclasses.replace(context, communicators={"cuda": comm}), case) as buffer:
            result = device_cases.dispatch(buffer, world, context.rank)
            device_cases.assert_dispatched(result, world, context.rank)
        assert comm.finalize_nvshmem() == ""
    assert core.status() >= 2
    assert of_torch.fill_(3.0).sum().item() == 192.0


@pytest.mark.skipif(not symmetric_memory.is_nvshmem_available(), reason="torch was built without NVSHMEM")
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch makes teams, which NVSHMEM refuses on a shared GPU")
def test_beside_torchs_symmetric_memory() -> None:
    with RankPool(2) as pool:
        pool.run(beside_torch, deadline_s=120.0)


def killed(context: RankContext) -> str:
    """Rank 1 dies with NVSHMEM up. The other gets a fault, leaves NVSHMEM at once, and its GPU stays usable."""
    case = make_case(context.num_ranks, TokenMajor())
    comm = new_communicator(context)
    world = device_cases.make_world(case, torch.device("cuda", torch.cuda.current_device()))
    buffer = make_buffer(dataclasses.replace(context, communicators={"cuda": comm}), case)
    device_cases.dispatch(buffer, world, context.rank)
    torch.cuda.synchronize()
    if context.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    error_of(CommFaultError, lambda: device_cases.dispatch(buffer, world, context.rank))
    started = time.monotonic()
    buffer.close()
    reason = comm.finalize_nvshmem()
    comm.close()
    assert time.monotonic() - started < 5.0
    assert torch.ones(8, device="cuda").sum().item() == 8
    config = CommConfig(transport="cuda", heap_provider="nvshmem")
    error = error_of(
        NvshmemError,
        lambda: Communicator.from_exchange(lambda phase, payload: [payload], rank=0, num_ranks=1, config=config),
    )
    assert "given up" in error.reason
    return reason


@pytest.mark.skipif("CUDA_MPS_PIPE_DIRECTORY" in os.environ, reason="MPS ends its clients when one is killed")
def test_a_killed_rank_does_not_hang_the_other() -> None:
    with RankPool(2) as pool:
        outcome = pool.outcomes(killed, deadline_s=90.0, doomed=(1,))[0]
    assert outcome.value, outcome.error or outcome.lost
    assert "rank 1" in outcome.value
