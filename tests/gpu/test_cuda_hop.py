"""Several nodes of GPUs: NVSHMEM's hop in front of the CUDA core, on logical nodes of the GPUs there are.

tests/gpu/run.sh tests/gpu/test_cuda_hop.py
"""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import time

import device_cases
import pytest
import torch
from cases import FLOAT8, LAYOUTS, PADDED, ROUTINGS, Case, all_modes, check_case
from harness import RankContext, RankPool, Ranks, error_of
from test_cuda_core import fuzz_case
from test_cuda_nvshmem import problem

from ray_deepep import (
    Buffer,
    CommFaultError,
    ExpertMajor,
    Float8Cast,
    InvalidArgumentError,
    MismatchError,
    ReceiveOverflowError,
    TokenMajor,
    shm,
)

pytestmark = pytest.mark.skipif(bool(problem()), reason=problem())
SEED = 505
DEADLINE_S = 5.0
WORLDS = ((2, 1), (4, 2), (4, 1))
"""Ranks, and ranks of a node."""


def world_id(world: tuple[int, int]) -> str:
    num_ranks, size = world
    return f"{num_ranks // size}x{size}"


def check_cases(context: RankContext, size: int, cases: list[Case], modes: list | None = None) -> None:
    device_cases.use_gpu(context.rank)
    for case in cases:
        check_case(context, f"nvshmem/{size}", case, modes)


@pytest.mark.parametrize("world", WORLDS, ids=world_id)
def test_layouts_and_dtypes(ranks: Ranks, world: tuple[int, int]) -> None:
    num_ranks, size = world
    cases = [
        Case(
            seed=SEED,
            num_tokens=(150, 63, 0, 65)[:num_ranks],
            num_experts=num_ranks * 3,
            hidden=256,
            layout=layout,
            dtype=dtype,
            routing="sparse",
        )
        for layout in LAYOUTS
        for dtype in (torch.float32, torch.bfloat16, torch.float16, FLOAT8)
    ]
    ranks.run(num_ranks, check_cases, size, cases, deadline_s=200.0)


def test_routings_and_empty_ranks(ranks: Ranks) -> None:
    cases = [
        Case(seed=SEED, num_tokens=shape, num_experts=16, hidden=64, layout=layout, routing=routing)
        for shape in ((70, 33, 1, 64), (0, 0, 0, 0), (0, 0, 0, 65), (64, 0, 0, 0))
        for layout in (TokenMajor(), ExpertMajor(8), PADDED)
        for routing in ROUTINGS
    ]
    ranks.run(4, check_cases, 2, cases, deadline_s=200.0)


def test_all_combine_modes(ranks: Ranks) -> None:
    for layout in (TokenMajor(), ExpertMajor(16), PADDED):
        case = Case(seed=SEED, num_tokens=(7, 0, 4, 80), num_experts=8, num_topk=4, layout=layout, dtype=torch.bfloat16)
        ranks.run(4, check_cases, 2, [case], all_modes(layout == TokenMajor()), deadline_s=120.0)


def test_fixed_shapes_and_casts(ranks: Ranks) -> None:
    cases = [
        Case(seed=SEED, num_tokens=(60, 3, 0, 5), hidden=256, layout=layout, routing="sparse", **more)
        for layout in (TokenMajor(), ExpertMajor(8))
        for more in ({"spare_rows": 5, "dtype": torch.bfloat16}, {"cast": Float8Cast(), "dtype": torch.bfloat16})
    ]
    ranks.run(4, check_cases, 2, cases, deadline_s=120.0)


@pytest.mark.parametrize("world", (*WORLDS, (8, 4)), ids=world_id)
def test_random_cases(ranks: Ranks, world: tuple[int, int]) -> None:
    num_ranks, size = world
    generator = random.Random(SEED + num_ranks + size)
    ranks.run(num_ranks, check_cases, size, [fuzz_case(generator, num_ranks) for _ in range(30)], deadline_s=250.0)


def auto_between_hosts(context: RankContext, size: int) -> None:
    """Ranks that believe to be on several hosts, ``size`` on each: ``auto`` takes NVSHMEM, and rows arrive."""
    device_cases.use_gpu(context.rank)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shm, "machine_id", lambda: f"host {context.rank // size}")
        comm = context.new_communicator("auto")
    with comm:
        assert (comm.transport, comm.domains.domain_size) == ("cuda", size), comm.transport_reason
        assert comm.transport_reason.endswith("nodes; NVSHMEM between nodes")
        case = Case(seed=SEED, num_tokens=(70, 33, 1, 64)[: context.num_ranks], hidden=64, layout=ExpertMajor(8))
        name = f"nvshmem/{size}"  # its number tells the oracle where sums are rounded
        check_case(dataclasses.replace(context, communicators={name: comm}), name, case)
        # Who closes first is a fault to those that still wait for it.
        torch.distributed.barrier()


@pytest.mark.parametrize("world", WORLDS, ids=world_id)
def test_auto_between_hosts(ranks: Ranks, world: tuple[int, int]) -> None:
    num_ranks, size = world
    ranks.run(num_ranks, auto_between_hosts, size, deadline_s=120.0)


def refuses(context: RankContext) -> None:
    """Bad input is found before anything is sent, arguments that differ before anything is returned."""
    device = device_cases.use_gpu(context.rank)
    comm = context.new_communicator("nvshmem/1", deadline_s=DEADLINE_S)
    with comm, context_buffer(comm) as buffer:
        x, topk_idx = torch.randn(8, 64, device=device), torch.zeros(8, 2, dtype=torch.int64, device=device)
        topk_idx[3, 1] = 4 if context.rank == 0 else 1
        if context.rank == 0:
            error = error_of(InvalidArgumentError, lambda: buffer.dispatch(x, topk_idx))
            assert str(error) == "topk_idx: must be in [-1, 4); got '4'"
        else:
            buffer.dispatch(x, topk_idx)
        topk_idx.zero_()
        alignment = 8 if context.rank == 0 else 16
        error_of((MismatchError, CommFaultError), lambda: dispatch_twice(buffer, x, topk_idx, alignment))


def reports_after_the_fact(context: RankContext) -> None:
    """Fixed shapes: what a handle reports later is in the communicator's ranks and experts, and stops nobody."""
    device = device_cases.use_gpu(context.rank)
    comm = context.new_communicator("nvshmem/1", deadline_s=DEADLINE_S)
    with comm, context_buffer(comm) as buffer:
        x, topk_idx = torch.randn(8, 64, device=device), torch.full((8, 2), -1, device=device)
        topk_idx[:, 0] = 2  # on rank 1
        result = buffer.dispatch(x, topk_idx, max_recv_tokens=4)
        if context.rank == 1:
            error = error_of(ReceiveOverflowError, result.handle.check)
            assert (error.rank, error.needed, error.room) == (1, 16, 4)
        else:
            result.handle.check()
        want = x.clone()
        if context.rank == 0:
            topk_idx[3, 0], want[3] = 900, 0
        result = buffer.dispatch(x, topk_idx, max_recv_tokens=16)
        rows = buffer.dispatch(x, handle=result.handle).x
        assert torch.equal(buffer.combine(rows, result.handle).x, want)
        if context.rank == 0:
            error = error_of(InvalidArgumentError, result.handle.check)
            assert str(error) == "topk_idx: must be in [-1, 4); got '900'"
        else:
            result.handle.check()
        assert torch.equal(buffer.combine(rows, result.handle).x, want)


def context_buffer(comm):
    return Buffer(comm, num_experts=4, hidden=64, num_topk=2, max_tokens=8)


def dispatch_twice(buffer, x: torch.Tensor, topk_idx: torch.Tensor, alignment: int) -> None:
    """A mismatch is seen by the kernels of one call and raised by it or by the next."""
    for _ in range(2):
        buffer.dispatch(x, topk_idx, layout=ExpertMajor(alignment))
        torch.cuda.synchronize()


def test_bad_input() -> None:
    with RankPool(2) as pool:
        pool.run(refuses, deadline_s=120.0)


def test_reports_after_the_fact(ranks: Ranks) -> None:
    ranks.run(2, reports_after_the_fact, deadline_s=120.0)


def lost(context: RankContext, how: int) -> tuple[int, float]:
    """The last rank, on another node, dies or stands still."""
    case = Case(seed=SEED, num_tokens=(50, 40, 30, 20), num_experts=8, hidden=64, layout=TokenMajor())
    world = device_cases.make_world(case, device_cases.use_gpu(context.rank))
    comm = context.new_communicator("nvshmem/2", deadline_s=DEADLINE_S)
    buffer = device_cases.make_buffer(dataclasses.replace(context, communicators={"cuda": comm}), case)
    device_cases.dispatch(buffer, world, context.rank)
    torch.cuda.synchronize()
    torch.distributed.barrier()
    if context.rank == 3:
        os.kill(os.getpid(), how)
    started = time.monotonic()

    def go_on() -> None:
        for _ in range(3):
            device_cases.dispatch(buffer, world, context.rank)
            torch.cuda.synchronize()

    error = error_of(CommFaultError, go_on)
    elapsed_s = time.monotonic() - started
    assert torch.ones(8, device="cuda").sum().item() == 8
    buffer.close()
    comm.close()
    return error.record.peer, elapsed_s


@pytest.mark.skipif("CUDA_MPS_PIPE_DIRECTORY" in os.environ, reason="MPS ends its clients when one is killed")
@pytest.mark.parametrize("how", (signal.SIGKILL, signal.SIGSTOP))
def test_a_lost_rank_of_another_node_is_named(how: int) -> None:
    with RankPool(4) as pool:
        outcomes = pool.outcomes(lost, how, deadline_s=90.0, doomed=(3,))
    for outcome in outcomes[:3]:
        assert outcome.value, outcome.error or outcome.lost
        assert outcome.value[0] == 3 and outcome.value[1] < DEADLINE_S + 2
