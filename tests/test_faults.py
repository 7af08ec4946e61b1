"""Faults of the CPU core: whatever a rank does in or before a collective, the others learn who it was, in time."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import torch
from harness import RankContext, RankPool, error_of, in_time, shm_problem
from torch.distributed import distributed_c10d

from ray_deepep import Buffer, CommFaultError, Communicator, FaultRecord, TokenMajor
from ray_deepep.rendezvous import store_exchange

DEADLINE_S = 1.5
pytestmark = pytest.mark.skipif(bool(shm_problem()), reason=shm_problem())


def make_buffer(context: RankContext) -> Buffer:
    comm = context.new_communicator("shm", deadline_s=DEADLINE_S)
    return Buffer(comm, num_experts=2 * context.num_ranks, hidden=16, num_topk=2, max_tokens=64)


def dispatch(buffer: Buffer):
    topk_idx = torch.randint(0, buffer.geometry.num_experts, (32, 2))
    return buffer.dispatch(torch.randn(32, 16), topk_idx, layout=TokenMajor())


def misbehave(how: str, buffer: Buffer) -> None:
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if how == "close":
        buffer.comm.close()
    time.sleep(60.0)  # killed by the test once all others have answered


def victim_and_culprit(context: RankContext, culprit: int, how: str, operation: str) -> dict:
    buffer = make_buffer(context)
    dispatch(buffer)
    result = dispatch(buffer) if operation == "combine" else None
    if context.rank == culprit:
        misbehave(how, buffer)
        return {}
    start = time.monotonic()
    if operation == "combine":
        error = error_of(CommFaultError, lambda: buffer.combine(result.x, result.handle))
    else:
        error = error_of(CommFaultError, lambda: dispatch(buffer))
    elapsed = time.monotonic() - start
    again = time.monotonic()
    second = error_of(CommFaultError, lambda: dispatch(buffer))
    return {
        "record": error.record.to_json(),
        "elapsed_s": elapsed,
        "refused_s": time.monotonic() - again,
        "same": second.record == error.record,
    }


CAUSES = {"kill": "peer_died", "stop": "timeout", "slow": "timeout", "close": "peer_closed"}


CASES = [(3, 1, how, operation) for how in CAUSES for operation in ("dispatch", "combine")]
CASES += [(2, 0, "kill", "dispatch"), (2, 1, "stop", "combine"), (4, 3, "kill", "combine"), (4, 0, "slow", "dispatch")]


@pytest.mark.parametrize(("num_ranks", "culprit", "how", "operation"), CASES)
def test_culprit_is_named_within_the_deadline(num_ranks: int, culprit: int, how: str, operation: str) -> None:
    # A dead process shows at once, not at the deadline.
    longest_s = DEADLINE_S + (0.0 if how == "kill" else 1.0)
    in_time(lambda: slowest_to_name(num_ranks, culprit, how, operation), longest_s)


def slowest_to_name(num_ranks: int, culprit: int, how: str, operation: str) -> float:
    """Seconds that the slowest rank took to name the culprit, as all do."""
    with RankPool(num_ranks) as pool:
        outcomes = pool.outcomes(victim_and_culprit, culprit, how, operation, deadline_s=20.0, doomed=[culprit])
    for rank in set(range(num_ranks)) - {culprit}:
        value = outcomes[rank].value
        assert value, outcomes[rank].error or outcomes[rank].lost
        record = FaultRecord.from_json(value["record"])
        assert (record.peer, record.rank, record.cause) == (culprit, rank, CAUSES[how])
        assert (record.operation, record.peer_pid) == (operation, pool.processes[culprit].pid)
        assert value["refused_s"] < DEADLINE_S / 2, "what has failed waits no more"
        assert value["same"]
    return max(outcome.value["elapsed_s"] for rank, outcome in enumerate(outcomes) if rank != culprit)


def killed_while_it_waits(context: RankContext) -> str:
    """Rank 1 is killed inside dispatch while it waits for rank 0; what it had published is still good."""
    buffer = make_buffer(context)
    dispatch(buffer)
    if context.rank == 1:
        # What a shell starts in the background ignores SIGINT, and so do its children.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
    if context.rank == 0:
        time.sleep(0.8)
    result = dispatch(buffer)
    error = error_of(CommFaultError, lambda: buffer.combine(result.x, result.handle))
    return error.record.to_json()


def test_killed_inside_dispatch_is_named_by_the_next_operation() -> None:
    with RankPool(2) as pool:
        outcomes = pool.outcomes(killed_while_it_waits, deadline_s=20.0)
        record = FaultRecord.from_json(outcomes[0].value)
        assert (record.peer, record.cause, record.operation) == (1, "peer_died", "combine")


def victim_of_a_victim(context: RankContext) -> str:
    """Rank 2 is late for all. Rank 0 gives up on it and leaves; rank 1 comes later and must not blame rank 0."""
    buffer = make_buffer(context)
    dispatch(buffer)
    if context.rank == 2:
        time.sleep(60.0)  # killed by the test once the others have answered
    if context.rank == 1:
        time.sleep(DEADLINE_S / 2)
    error = error_of(CommFaultError, lambda: dispatch(buffer))
    buffer.comm.close()
    return error.record.to_json()


def test_victims_are_not_blamed() -> None:
    with RankPool(3) as pool:
        outcomes = pool.outcomes(victim_of_a_victim, deadline_s=20.0, doomed=[2])
        for rank in (0, 1):
            assert FaultRecord.from_json(outcomes[rank].value).peer == 2, outcomes[rank].value


def ticks_while_waiting(context: RankContext) -> int:
    """Threads of the waiting rank go on: the core does not hold the interpreter while it waits."""
    buffer = make_buffer(context)
    dispatch(buffer)
    if context.rank == 1:
        time.sleep(1.0)
        dispatch(buffer)
        return 0
    ticks = []
    stop = threading.Event()

    def tick() -> None:
        while not stop.wait(0.01):
            ticks.append(1)

    thread = threading.Thread(target=tick)
    thread.start()
    dispatch(buffer)
    stop.set()
    thread.join()
    buffer.comm.close()
    return len(ticks)


def test_interpreter_is_free_while_a_rank_waits() -> None:
    with RankPool(2) as pool:
        assert pool.run(ticks_while_waiting)[0] > 20


def interrupted(context: RankContext) -> str:
    buffer = make_buffer(context)
    dispatch(buffer)
    store = distributed_c10d._get_default_store()
    if context.rank == 0:
        # What a shell starts in the background ignores SIGINT, and so do its children.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        start = time.monotonic()
        error_of(KeyboardInterrupt, lambda: dispatch(buffer))
        assert time.monotonic() - start < DEADLINE_S
        store.set("interrupted", "")
        return ""
    # Had rank 1 published before, rank 0 would have had nothing to wait for.
    store.wait(["interrupted"])
    dispatch(buffer)
    return error_of(CommFaultError, lambda: dispatch(buffer)).record.to_json()


def test_interrupt_ends_a_wait_and_peers_learn_it() -> None:
    with RankPool(2) as pool:
        outcomes = pool.outcomes(interrupted, deadline_s=20.0)
        assert not outcomes[0].error and not outcomes[0].lost, outcomes[0]
        record = FaultRecord.from_json(outcomes[1].value)
        assert (record.peer, record.cause) == (0, "aborted")


def survivors_go_on(context: RankContext) -> float:
    """After rank 1 died, ranks 0 and 2 come up again without it, in the same processes."""
    buffer = make_buffer(context)
    dispatch(buffer)
    if context.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    error_of(CommFaultError, lambda: dispatch(buffer))
    buffer.comm.close()
    survivors = [0, 2]
    rank = survivors.index(context.rank)
    exchange = store_exchange(torch.distributed.group.WORLD, rank, 2, 10.0)
    with Communicator.from_exchange(exchange, rank=rank, num_ranks=2) as comm:
        fresh = Buffer(comm, num_experts=2, hidden=8, num_topk=1, max_tokens=4)
        x = torch.full((4, 8), float(context.rank))
        result = fresh.dispatch(x, torch.tensor([[0], [1], [0], [1]]))
        return float(result.x.sum())


def test_survivors_make_a_new_communicator() -> None:
    with RankPool(3) as pool:
        outcomes = pool.outcomes(survivors_go_on, deadline_s=30.0)
        assert [outcomes[0].value, outcomes[2].value] == [32.0, 32.0], outcomes


def shared_memory_names() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if "deepep" in name}


def killed_during_work(context: RankContext) -> None:
    buffer = make_buffer(context)
    dispatch(buffer)
    os.kill(os.getpid(), signal.SIGKILL)


def test_nothing_is_left_when_every_rank_is_killed() -> None:
    with RankPool(2) as pool:
        pool.outcomes(killed_during_work, deadline_s=20.0)
    assert shared_memory_names() == set()


def test_one_try_in_time_is_enough_and_none_is_a_failure() -> None:
    late = iter((3.0, 1.5, 3.0))
    in_time(lambda: next(late), 2.0)
    with pytest.raises(AssertionError, match=r"less than 2 s is allowed, and it took 3\.00, 2\.00, 2\.50 s"):
        in_time(iter((3.0, 2.0, 2.5)).__next__, 2.0)
