"""Low-latency calls when a rank does not come: masks by hand and by time-out, the way back; else faults."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import time
from collections.abc import Mapping

import pytest
import torch
import torch.distributed as dist
from device_cases import use_gpu
from harness import RankContext, RankPool, Ranks, error_of, in_time, shm_problem
from low_latency_cases import Case, World, check_combined, check_dispatch, combine, dispatch, make_buffer, step
from on_device import OnDevice

from ray_deepep import BootstrapError, Buffer, CommFaultError, FaultRecord, HookError, RankMaskedError

FULL = Case(seed=7, num_tokens=(9, 4, 11), num_experts=9, num_topk=4, reduce="exact")
WITHOUT_2 = dataclasses.replace(FULL, absent=frozenset({2}), reduce="fast")
TIMEOUT_S = 1.5
LONG_S = 15.0
SIZES = {"num_experts": 6, "num_topk": 3}
MASKING = {"on_timeout": "mask", "timeout_s": TIMEOUT_S}


def masked_steps(buffer: Buffer, rank: int, num_steps: int = 8, **options: object) -> None:
    """Steps without rank 2: its rows and contributions are absent, all else is right."""
    world = World(WITHOUT_2)
    for _ in range(num_steps):
        got = dispatch(buffer, world, rank, **options)
        check_dispatch(world, rank, got)
        check_combined(world, rank, combine(buffer, world, rank, got, **options))


def welcome_back(buffer: Buffer, rank: int) -> None:
    """What each rank does when rank 2 comes back."""
    if rank == 2:
        buffer.rejoin()
    else:
        end = time.monotonic() + LONG_S
        while buffer.returning_ranks != (2,):
            assert time.monotonic() < end, "rank 2 does not come back"
            time.sleep(0.01)
        buffer.mask_rank(2, False)
        assert buffer.masked_ranks == ()
    for _ in range(6):
        step(buffer, World(FULL), rank)


def masks_by_hand(context: RankContext, transport: str) -> None:
    rank, full = context.rank, World(FULL)
    with make_buffer(context, transport, FULL) as buffer:
        step(buffer, full, rank)
        assert buffer.masked_ranks == ()
        dist.barrier()  # a rank that is masked before it has received its combine may lose it
        if rank != 2:
            buffer.mask_rank(2)
            assert buffer.masked_ranks == (2,) and buffer.returning_ranks == ()
            masked_steps(buffer, rank)
        dist.barrier()
        if rank == 2:
            for _ in range(2):
                error = error_of(RankMaskedError, lambda: dispatch(buffer, full, rank))
                assert error.by == [0, 1]
        welcome_back(buffer, rank)


def test_mask_by_hand_and_back(ranks: Ranks, transport: str) -> None:
    ranks.run(3, masks_by_hand, transport)


def unmasks_early(context: RankContext, transport: str) -> None:
    """Rank 2 slept through it all: masked, left behind, and unmasked again."""
    rank, full = context.rank, World(FULL)
    with make_buffer(context, transport, FULL) as buffer:
        if rank != 2:
            buffer.mask_rank(2)
            masked_steps(buffer, rank)
            buffer.mask_rank(2, False)
        dist.barrier()
        if rank == 2:
            error_of(RankMaskedError, lambda: dispatch(buffer, full, rank))
            buffer.rejoin()
        for _ in range(3):
            step(buffer, full, rank)


def test_rank_that_missed_its_mask(ranks: Ranks, transport: str) -> None:
    ranks.run(3, unmasks_early, transport)


def nobody_lets_it_in(context: RankContext, transport: str) -> None:
    with make_buffer(context, transport, FULL) as buffer:
        if context.rank == 0:
            buffer.mask_rank(2)
        if context.rank == 2:
            error = error_of(BootstrapError, lambda: buffer.rejoin(0.3))
            assert (error.phase, error.missing) == ("rejoin", [0, 1])
        dist.barrier()


def test_rejoin_names_who_did_not_unmask(ranks: Ranks, transport: str) -> None:
    ranks.run(3, nobody_lets_it_in, transport)


def stops_and_returns(context: RankContext, transport: str) -> None:
    """Rank 2 is stopped with an operation sent, is given up by a time-out, and returns."""
    rank, full = context.rank, World(FULL)
    with make_buffer(context, transport, FULL) as buffer:
        step(buffer, full, rank)
        sent = dispatch(buffer, full, rank, return_recv_hook=True, **MASKING)
        if rank == 2:
            os.kill(os.getpid(), signal.SIGSTOP)
            # Its peers are far ahead: what they had sent is gone.
            error_of(RankMaskedError, sent.hook)
            error_of(RankMaskedError, lambda: dispatch(buffer, full, rank))
        else:
            sent.hook()
            check_dispatch(full, rank, sent)
            start = time.monotonic()
            masked_steps(buffer, rank, 20, **MASKING)
            # One wait for all; 40 if every operation waited.
            assert time.monotonic() - start < 10 * TIMEOUT_S
            assert buffer.masked_ranks == (2,)
            # The hook's operation of rank 2 had come; the time-out was the next one's.
            assert buffer.low_latency_stats.wait_ns[2] >= TIMEOUT_S * 0.9e9
            if rank == 0:
                os.kill(buffer.comm.peers[2].pid, signal.SIGCONT)
        welcome_back(buffer, rank)


def test_stopped_rank_is_masked_and_returns(ranks: Ranks, transport: str) -> None:
    ranks.run(3, stops_and_returns, transport)


def is_killed(context: RankContext, transport: str) -> tuple[int, ...]:
    """Rank 2 is killed between a dispatch and its combine."""
    rank, full = context.rank, World(dataclasses.replace(FULL, reduce="fast"))
    sizes = {"num_experts": 9, "num_topk": 4}
    buffer = own_buffer(context, transport, sizes)
    comm = buffer.comm
    step(buffer, full, rank)
    got = dispatch(buffer, full, rank, **MASKING)
    check_dispatch(full, rank, got)
    if rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    # Rank 2's tokens come last in every group, so rows of the others stand where they would without it.
    home = combine(buffer, full, rank, got, **MASKING)
    check_combined(World(WITHOUT_2), rank, home)
    masked_steps(buffer, rank, **MASKING)
    comm.close()
    return tuple(home.absent.nonzero().flatten().tolist())


def test_killed_rank_is_masked(transport: str) -> None:
    with RankPool(3) as pool:
        outcomes = pool.outcomes(is_killed, transport, deadline_s=30.0)
        assert [outcomes[0].value, outcomes[1].value] == [(2,), (2,)], outcomes


def is_killed_and_nobody_asked(context: RankContext) -> list[str]:
    comm = context.new_communicator("shm", deadline_s=LONG_S)
    sizes = {"num_experts": 9, "hidden": 128, "num_topk": 4, "max_tokens": 0, "low_latency_max_tokens": 12}
    buffer, full = Buffer(comm, **sizes), World(FULL)
    sent = dispatch(buffer, full, context.rank, return_recv_hook=True)
    if context.rank == 2:
        sent.hook()
        os.kill(os.getpid(), signal.SIGKILL)
    sent.hook()
    first = error_of(CommFaultError, lambda: combine(buffer, full, context.rank, sent))
    again = error_of(CommFaultError, lambda: dispatch(buffer, full, context.rank))
    assert again.record == first.record
    return first.record.to_json()


@pytest.mark.skipif(bool(shm_problem()), reason=shm_problem())
def test_killed_rank_is_a_fault_unless_masks_are_asked_for() -> None:
    with RankPool(3) as pool:
        outcomes = pool.outcomes(is_killed_and_nobody_asked, deadline_s=30.0)
        for rank in (0, 1):
            record = FaultRecord.from_json(outcomes[rank].value)
            assert (record.operation, record.sequence) == ("low_latency_combine", 2)
            assert (record.peer, record.cause, record.peer_pid) == (2, "peer_died", pool.processes[2].pid)
            assert record.elapsed_s < LONG_S / 2, "a dead process shows at once"


def own_buffer(
    context: RankContext, transport: str, sizes: Mapping[str, int] = SIZES, **config: object
) -> Buffer | OnDevice:
    """On a communicator of its own, which a fault may end."""
    if transport == "cuda":
        use_gpu(context.rank)
    comm = context.new_communicator(transport, **config)
    buffer = Buffer(comm, hidden=128, max_tokens=0, low_latency_max_tokens=12, **sizes)
    return OnDevice(buffer) if transport == "cuda" else buffer


TWO = Case(seed=8, num_tokens=(5, 3), num_experts=6)


def never_calls_its_hook(context: RankContext, transport: str) -> float:
    buffer, world, rank = own_buffer(context, transport, deadline_s=TIMEOUT_S), World(TWO), context.rank
    for _ in range(2):
        sent = dispatch(buffer, world, rank, return_recv_hook=True)
        if rank == 0:
            sent.hook()
    elapsed_s = 0.0
    if rank == 1:
        error_of(HookError, lambda: dispatch(buffer, world, rank))
    else:
        record = error_of(CommFaultError, lambda: dispatch(buffer, world, rank)).record
        assert (record.peer, record.cause, record.sequence) == (1, "timeout", 3)
        elapsed_s = record.elapsed_s
    dist.barrier()
    buffer.comm.close()
    return elapsed_s


def test_rank_that_never_calls_its_hook(ranks: Ranks, transport: str) -> None:
    in_time(lambda: max(ranks.run(2, never_calls_its_hook, transport)), TIMEOUT_S + 1.0)


def closes(context: RankContext, transport: str) -> None:
    buffer, world = own_buffer(context, transport), World(TWO)
    step(buffer, world, context.rank)
    if context.rank == 1:
        buffer.close()
    else:
        record = error_of(CommFaultError, lambda: dispatch(buffer, world, 0)).record
        assert (record.peer, record.cause) == (1, "peer_closed")
        error_of(CommFaultError, lambda: dispatch(buffer, world, 0))
    dist.barrier()
    buffer.comm.close()


def test_rank_that_closes(ranks: Ranks, transport: str) -> None:
    ranks.run(2, closes, transport)


def masks_while_it_waits(context: RankContext, transport: str) -> None:
    """Another thread masks the late rank, and the wait ends without a fault."""
    world = World(dataclasses.replace(TWO, absent=frozenset({1})))
    with make_buffer(context, transport, TWO) as buffer:
        if context.rank == 0:
            timer = threading.Timer(0.2, lambda: buffer.mask_rank(1))
            timer.start()
            start = time.monotonic()
            got = dispatch(buffer, world, 0, timeout_s=LONG_S)
            assert time.monotonic() - start < LONG_S / 2
            check_dispatch(world, 0, got)
            timer.join()
        dist.barrier()


def test_mask_ends_a_wait(ranks: Ranks, transport: str) -> None:
    ranks.run(2, masks_while_it_waits, transport)


def is_masked_after_it_came(context: RankContext, transport: str) -> None:
    """What had come whole before the mask is received all the same; the next send is refused."""
    world, rank = World(TWO), context.rank
    with make_buffer(context, transport, TWO) as buffer:
        sent = dispatch(buffer, world, rank, return_recv_hook=True)
        if rank == 0:
            sent.hook()
            buffer.mask_rank(1)
        dist.barrier()
        if rank == 1:
            sent.hook()
            error = error_of(RankMaskedError, lambda: combine(buffer, world, rank, sent))
            assert error.by == [0]
        check_dispatch(world, rank, sent)
        dist.barrier()


def test_operation_that_came_before_the_mask(ranks: Ranks, transport: str) -> None:
    ranks.run(2, is_masked_after_it_came, transport)


def follows_a_mask(context: RankContext, transport: str) -> None:
    """A rank that others have given up is not waited for again."""
    rank = context.rank
    with make_buffer(context, transport, FULL) as buffer:
        if rank == 0:
            buffer.mask_rank(2)
        if rank != 2:
            start = time.monotonic()
            masked_steps(buffer, rank, 2, on_timeout="mask", timeout_s=LONG_S)
            assert time.monotonic() - start < LONG_S / 2
            assert buffer.masked_ranks == (2,)
        dist.barrier()


def test_mask_of_one_rank_is_taken_over(ranks: Ranks, transport: str) -> None:
    ranks.run(3, follows_a_mask, transport)


def rank_0_is_gone(context: RankContext, transport: str) -> None:
    """Agreement is checked among those that are there."""
    case = dataclasses.replace(FULL, absent=frozenset({0}))
    world, rank = World(case), context.rank
    with make_buffer(context, transport, FULL) as buffer:
        if rank != 0:
            buffer.mask_rank(0)
            x = world.x[rank].to(torch.bfloat16) if rank == 2 else world.x[rank]
            error = error_of(ValueError, lambda: buffer.low_latency_dispatch(x, world.topk_idx[rank]))
            assert "rank 2 passed dtype=bfloat16, rank 1 passed dtype=float32" in str(error)
            step(buffer, world, rank)
        dist.barrier()


def test_without_rank_0(ranks: Ranks, transport: str) -> None:
    ranks.run(3, rank_0_is_gone, transport)
