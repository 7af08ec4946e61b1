"""Faults and mismatches among several nodes: every rank of every node names the culprit, by its rank in the world."""

from __future__ import annotations

import json
import os
import signal
import threading
import time

import pytest
import torch
from cases import check_still_works
from harness import RankContext, RankPool, Ranks, error_of, in_time, shm_problem
from test_faults import CAUSES, dispatch, misbehave
from test_mismatch import GEOMETRY, IDX, MISMATCHES, X, check_mismatch
from torch.distributed import distributed_c10d

from ray_deepep import Buffer, CommFaultError, FaultRecord, InvalidArgumentError, MismatchError, Padded
from ray_deepep.bounded_store import StoreLostError
from ray_deepep.fault_board import FaultBoard

pytestmark = pytest.mark.skipif(bool(shm_problem()), reason=shm_problem())

DEADLINE_S = 1.5
LONG_S = 20.0


def make_buffer(context: RankContext, size: int, deadline_s: float = DEADLINE_S) -> Buffer:
    comm = context.new_communicator(f"shm/{size}", deadline_s=deadline_s)
    return Buffer(comm, num_experts=2 * context.num_ranks, hidden=16, num_topk=2, max_tokens=64)


def deadline_of(num_ranks: int) -> float:
    """With many ranks on few cores, a victim may itself be late by the shorter one."""
    return DEADLINE_S if num_ranks <= 4 else 2 * DEADLINE_S


def victim_and_culprit(context: RankContext, size: int, culprit: int, how: str, operation: str) -> dict:
    buffer = make_buffer(context, size, deadline_of(context.num_ranks))
    result = dispatch(buffer)
    if context.rank == culprit:
        misbehave(how, buffer)
        return {}
    start = time.monotonic()
    call = {"combine": lambda: buffer.combine(result.x, result.handle), "dispatch": lambda: dispatch(buffer)}
    error = error_of(CommFaultError, call[operation])
    elapsed = time.monotonic() - start
    second = error_of(CommFaultError, lambda: dispatch(buffer))
    buffer.comm.close()
    return {"record": error.record.to_json(), "elapsed_s": elapsed, "same": second.record == error.record}


CASES = [(4, 2, 3, how, operation) for how in CAUSES for operation in ("dispatch", "combine")]
CASES += [(4, 2, 0, "kill", "combine"), (6, 2, 2, "stop", "dispatch"), (6, 3, 4, "kill", "dispatch")]
CASES += [(4, 1, 2, "stop", "dispatch"), (4, 1, 1, "close", "combine")]


@pytest.mark.parametrize(("num_ranks", "size", "culprit", "how", "operation"), CASES)
def test_culprit_is_named_on_all_nodes(num_ranks: int, size: int, culprit: int, how: str, operation: str) -> None:
    # Of a death ranks of its domain tell the others, before any deadline.
    longest_s = deadline_of(num_ranks) + (0.0 if how == "kill" else 1.0)
    in_time(lambda: slowest_to_name(num_ranks, size, culprit, how, operation), longest_s)


def slowest_to_name(num_ranks: int, size: int, culprit: int, how: str, operation: str) -> float:
    """Seconds that the slowest rank took to name the culprit, as all do."""
    with RankPool(num_ranks) as pool:
        outcomes = pool.outcomes(victim_and_culprit, size, culprit, how, operation, deadline_s=20.0, doomed=[culprit])
    for rank in set(range(num_ranks)) - {culprit}:
        value = outcomes[rank].value
        assert value, outcomes[rank].error or outcomes[rank].lost
        record = FaultRecord.from_json(value["record"])
        assert (record.peer, record.rank, record.cause) == (culprit, rank, CAUSES[how]), value["record"]
        assert (record.operation, record.peer_pid) == (operation, pool.processes[culprit].pid)
        assert value["same"]
    return max(outcome.value["elapsed_s"] for rank, outcome in enumerate(outcomes) if rank != culprit)


def dies_in_the_exchange(context: RankContext, how: str) -> str:
    """Rank 1 met all others, and then is lost before its rows are."""
    buffer = make_buffer(context, 2)
    dispatch(buffer)
    if context.rank == 1:
        buffer._transport._hop.exchange = lambda send, recv: misbehave(how, buffer)
    error = error_of(CommFaultError, lambda: dispatch(buffer))
    buffer.comm.close()
    return error.record.to_json()


@pytest.mark.parametrize("how", ("kill", "stop"))
def test_lost_in_the_exchange(how: str) -> None:
    """Rank 3 waits for its rows, rank 0 in the domain for its routing, rank 2 for rank 3."""
    with RankPool(4) as pool:
        outcomes = pool.outcomes(dies_in_the_exchange, how, deadline_s=20.0, doomed=[1])
        for rank in (0, 2, 3):
            assert outcomes[rank].value, outcomes[rank].error or outcomes[rank].lost
            record = FaultRecord.from_json(outcomes[rank].value)
            assert (record.peer, record.cause) == (1, CAUSES[how]), outcomes[rank].value


def late_chain(context: RankContext) -> str:
    """Rank 3 is late. Rank 1 comes last of the others, when they have waited for it: not it is to blame."""
    buffer = make_buffer(context, 2)
    dispatch(buffer)
    if context.rank == 3:
        time.sleep(60.0)  # killed by the test once the others have answered
    if context.rank == 1:
        time.sleep(DEADLINE_S / 2)
    error = error_of(CommFaultError, lambda: dispatch(buffer))
    buffer.comm.close()
    return error.record.to_json()


def test_victims_of_another_node_are_not_blamed() -> None:
    with RankPool(4) as pool:
        outcomes = pool.outcomes(late_chain, deadline_s=20.0, doomed=[3])
        for rank in (0, 1, 2):
            assert FaultRecord.from_json(outcomes[rank].value).peer == 3, outcomes[rank].value


def interrupted(context: RankContext) -> str:
    """Rank 2 waits for rank 3 in its node, and is interrupted: the others learn it at once, rank 3 too, which comes
    later and waits for rows of rank 1, a victim that will not send them."""
    buffer = make_buffer(context, 2, deadline_s=LONG_S)
    dispatch(buffer)
    store = distributed_c10d._get_default_store()
    if context.rank == 2:
        # What a shell starts in the background ignores SIGINT, and so do its children.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        error_of(KeyboardInterrupt, lambda: dispatch(buffer))
        store.set("hop_interrupted", "")
    if context.rank == 3:
        store.wait(["hop_interrupted"])
    start = time.monotonic()
    record = error_of(CommFaultError, lambda: dispatch(buffer)).record
    assert context.rank != 3 or time.monotonic() - start < LONG_S / 2, "it waited"
    buffer.comm.close()
    return record.to_json()


def test_interrupt_is_told_to_all_nodes() -> None:
    with RankPool(4) as pool:
        for outcome in pool.outcomes(interrupted, deadline_s=2 * LONG_S):
            assert outcome.value, outcome.error or outcome.lost
            record = FaultRecord.from_json(outcome.value)
            assert (record.peer, record.cause) == (2, "aborted"), outcome.value


def slow_but_in_time(context: RankContext) -> None:
    """Late by less than the deadline, by turns: no fault, and nothing shown on the board is left for later."""
    buffer = make_buffer(context, 2, deadline_s=10.0)
    for late in range(context.num_ranks):
        if context.rank == late:
            time.sleep(0.5)
        dispatch(buffer)
    assert buffer.comm.fault_board.found() is None
    assert not buffer.comm.fault_board._store.ask(1.0, lambda store: store.check([f"wait/{context.rank}"]))
    buffer.comm.close()


def test_slow_but_in_time(ranks: Ranks) -> None:
    ranks.run(4, slow_but_in_time)


@pytest.mark.parametrize("name", MISMATCHES)
def test_mismatch_is_raised_on_every_rank(ranks: Ranks, name: str) -> None:
    mismatch = MISMATCHES[name]
    want = (mismatch.operation, 3, mismatch.field, mismatch.expected, mismatch.seen)
    for rank, found in enumerate(ranks.run(4, check_mismatch, "shm/2", name)):
        assert found == [want, want], f"rank {rank}"


def check_mismatch_of(context: RankContext, odd: tuple[int, ...]) -> tuple:
    with context.buffer("shm/2", **GEOMETRY) as buffer:
        x = X.half() if context.rank in odd else X
        error = error_of(MismatchError, lambda: buffer.dispatch(x, IDX))
        check_still_works(buffer, context.rank)
    return error.peer, error.expected, error.seen, error.first


ODD = {
    "a node": ((2, 3), (2, "float32", "float16", 0)),
    "the first node": ((0, 1), (2, "float16", "float32", 0)),
    "a hop group": ((1, 3), (1, "float32", "float16", 0)),
    "two of different nodes": ((1, 2), (1, "float32", "float16", 0)),
}


@pytest.mark.parametrize("name", ODD)
def test_who_is_named(ranks: Ranks, name: str) -> None:
    odd, want = ODD[name]
    assert ranks.run(4, check_mismatch_of, odd) == [want] * 4


def check_other_geometry(context: RankContext) -> str:
    geometry = {**GEOMETRY, "hidden": 256 if context.rank == 2 else 128}
    error = error_of(MismatchError, lambda: context.buffer("shm/2", **geometry))
    with context.buffer("shm/2", **GEOMETRY) as buffer:
        check_still_works(buffer, context.rank)
    return str(error)


def test_other_geometry(ranks: Ranks) -> None:
    assert ranks.run(4, check_other_geometry) == ["allocate: rank 2 passed hidden=256, rank 0 passed hidden=128"] * 4


def check_same_location_twice(context: RankContext) -> str:
    """Found at the source, before anything is sent."""
    with context.buffer("shm/2", **GEOMETRY) as buffer:
        message = ""
        if context.rank == 3:
            locations = torch.zeros(4, 2, dtype=torch.int32)
            call = lambda: buffer.dispatch(X, IDX, layout=Padded(6), locations=locations)  # noqa: E731
            message = str(error_of(InvalidArgumentError, call))
        check_still_works(buffer, context.rank)
        return message


def test_same_location_twice(ranks: Ranks) -> None:
    messages = ranks.run(4, check_same_location_twice)
    assert messages[3] == "locations: must differ between the routes of one expert; got '0 twice for expert 0'"


def check_parts(context: RankContext) -> list[str]:
    """What the core refuses; the hop never asks for it."""
    with context.buffer("shm/1", **GEOMETRY) as buffer:
        core, domain = buffer._transport._domain._core, buffer._transport._domain._buffer
        messages = []
        for parts in ([], [3], [3, 2], [4, 4]):
            args = core.DispatchArgs()
            args.num_tokens, args.part_tokens = 4, parts
            messages.append(str(error_of(core.CoreArgumentError, lambda a=args: domain.begin_dispatch(a)).args))
        check_still_works(buffer, context.rank)
        return messages


def test_parts_must_fit(ranks: Ranks) -> None:
    rule = "must be 2 parts of the 4 tokens"
    want = [
        str(("part_tokens", seen, rule)) for seen in ("0 parts of 0", "1 parts of 3", "2 parts of 5", "2 parts of 8")
    ]
    assert ranks.run(2, check_parts) == [want, want]


def board_without_a_store(context: RankContext) -> None:
    """Whoever hosts the store may be gone: nothing is found, and the own record stays."""
    board = FaultBoard("gone", context.rank, context.communicator("shm/1").peers)

    class Gone:
        def ask(self, seconds: float, question: object) -> None:
            raise StoreLostError(silent=False, detail="connection closed")

    board._store = Gone()
    record = FaultRecord(
        operation="dispatch",
        sequence=1,
        phase="exchange",
        cause="timeout",
        rank=context.rank,
        peer=0,
        expected=1,
        seen=0,
        elapsed_s=1.0,
        deadline_s=1.0,
    )
    settled = board.settle(record)
    assert (settled.peer, settled.cause) == (0, "timeout")
    assert json.loads(settled.to_json())["peer_pid"] == context.communicator("shm/1").peers[0].pid
    assert board.found() is None
    board.show_wait(1)
    board.hide_wait()


def test_board_without_a_store(ranks: Ranks) -> None:
    ranks.run(2, board_without_a_store)
