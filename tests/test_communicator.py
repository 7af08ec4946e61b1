"""Communicators: bringing ranks together, the choice of a transport, and what happens when that fails."""

from __future__ import annotations

import datetime
import itertools
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import Case, assert_dispatched, check_combine, make_world, some_modes, transport_of
from cases import dispatch as dispatch_world
from harness import CASE_CONFIG, RankContext, RankPool, Ranks, case_config, error_of, in_time, shm_problem
from torch.distributed import distributed_c10d

from ray_deepep import (
    BootstrapError,
    Buffer,
    ClosedError,
    CommConfig,
    CommFaultError,
    Communicator,
    ExpertMajor,
    InvalidArgumentError,
    InvalidTypeError,
)
from ray_deepep.rendezvous import store_exchange

GEOMETRY = {"num_experts": 4, "hidden": 24, "num_topk": 3, "max_tokens": 9}
BOOTSTRAP_DEADLINE_S = 2.0
needs_shm = pytest.mark.skipif(bool(shm_problem()), reason=shm_problem())


def check_exchange_rows(comm: Communicator, rank: int, num_ranks: int) -> None:
    """Dispatch and combine over a communicator, compared with the oracle."""
    case = Case(seed=num_ranks, num_tokens=(5, 3, 4, 9)[:num_ranks], num_experts=4 * num_ranks, layout=ExpertMajor(4))
    world = make_world(case, transport_of(comm))
    with Buffer(comm, **{**GEOMETRY, "num_experts": case.num_experts}) as buffer:
        result = dispatch_world(buffer, world, rank)
        assert_dispatched(result, world, rank)
        for mode in some_modes(token_major=False):
            check_combine(buffer, result.handle, world, rank, mode, seed=1)


def check_peers(context: RankContext, transport: str) -> tuple[str, list[int]]:
    with context.new_communicator(transport) as comm:
        check_exchange_rows(comm, context.rank, context.num_ranks)
        assert [p.rank for p in comm.peers] == list(range(context.num_ranks))
        assert (comm.rank, comm.num_ranks, comm.transport, comm.fault) == (
            context.rank,
            context.num_ranks,
            transport,
            None,
        )
        return comm.transport_reason, [p.pid for p in comm.peers]


def test_peers(ranks: Ranks, transport: str) -> None:
    found = ranks.run(3, check_peers, transport)
    assert found == [found[0]] * 3
    reason, pids = found[0]
    assert reason == "asked for"
    assert len(set(pids)) == 3


def check_auto(context: RankContext) -> tuple[str, str]:
    with context.new_communicator("auto") as comm:
        return comm.transport, comm.transport_reason


@needs_shm
def test_auto_on_one_host(ranks: Ranks) -> None:
    for transport, reason in ranks.run(2, check_auto):
        assert transport == "shm"
        assert reason.startswith("all 2 ranks share the memory of ")


def check_explicit_exchange(context: RankContext) -> None:
    """Without a process group on the communicator, as a launcher without torch.distributed would make it."""
    config = CommConfig(transport="auto", **CASE_CONFIG)
    exchange = store_exchange(dist.group.WORLD, context.rank, context.num_ranks, 10.0)
    with Communicator.from_exchange(exchange, rank=context.rank, num_ranks=context.num_ranks, config=config) as comm:
        assert (comm.transport, comm.group) == ("shm", None)
        check_exchange_rows(comm, context.rank, context.num_ranks)


@needs_shm
def test_explicit_exchange(ranks: Ranks) -> None:
    ranks.run(2, check_explicit_exchange)


def check_subgroups(context: RankContext, transport: str) -> None:
    """Expert-data parallelism: several EP groups side by side, whose ranks are not the world's."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    mine, other = groups[context.rank % 2], groups[1 - context.rank % 2]
    error = error_of(InvalidArgumentError, lambda: Communicator.from_process_group(other))
    assert str(error) == "group: must contain this rank; got 'a group without this rank'"
    config = case_config(transport)
    with Communicator.from_process_group(mine, config=config) as comm:
        assert (comm.rank, comm.num_ranks) == (context.rank // 2, 2)
        check_exchange_rows(comm, comm.rank, comm.num_ranks)


def test_subgroups(ranks: Ranks, transport: str) -> None:
    ranks.run(4, check_subgroups, transport)


def check_several_communicators(context: RankContext, transport: str) -> None:
    """Two of one group at once; closing one leaves the other usable, and a third can be made."""
    first, second = context.new_communicator(transport), context.new_communicator(transport)
    check_exchange_rows(second, context.rank, context.num_ranks)
    check_exchange_rows(first, context.rank, context.num_ranks)
    first.close()
    check_exchange_rows(second, context.rank, context.num_ranks)
    with context.new_communicator(transport) as third:
        check_exchange_rows(third, context.rank, context.num_ranks)
    second.close()


def test_several_communicators(ranks: Ranks, transport: str) -> None:
    ranks.run(2, check_several_communicators, transport)


def check_close(context: RankContext, transport: str) -> None:
    comm = context.new_communicator(transport)
    buffer = Buffer(comm, **GEOMETRY)
    released = Buffer(comm, **GEOMETRY)
    released.close()
    x, topk_idx = torch.ones(2, 24), torch.zeros(2, 1, dtype=torch.int64)
    result = buffer.dispatch(x, topk_idx)
    assert not comm.closed
    comm.close()
    comm.close()
    assert comm.closed and buffer.closed
    assert str(error_of(ClosedError, lambda: buffer.dispatch(x, topk_idx))) == "dispatch: the buffer is closed"
    assert (
        str(error_of(ClosedError, lambda: buffer.combine(result.x, result.handle))) == "combine: the buffer is closed"
    )
    assert str(error_of(ClosedError, lambda: Buffer(comm, **GEOMETRY))) == "allocate: the communicator is closed"


def test_close(ranks: Ranks, transport: str) -> None:
    ranks.run(2, check_close, transport)


def check_config_mismatch(context: RankContext, transport: str) -> str:
    deadline_s = 5.0 if context.rank == 1 else 4.0
    error = error_of(InvalidArgumentError, lambda: context.new_communicator(transport, deadline_s=deadline_s))
    with context.new_communicator(transport) as comm:
        check_exchange_rows(comm, context.rank, context.num_ranks)
    return str(error)


def test_config_mismatch(ranks: Ranks, transport: str) -> None:
    message = "config: deadline_s must be the same on all ranks; got 'rank 1: [5.0], rank 0: [4.0]'"
    assert ranks.run(3, check_config_mismatch, transport) == [message] * 3


def check_missing_at_bootstrap(context: RankContext, absent: list[int]) -> dict | None:
    if context.rank in absent:
        return None
    start = time.monotonic()
    error = error_of(
        BootstrapError, lambda: context.new_communicator("auto", bootstrap_deadline_s=BOOTSTRAP_DEADLINE_S)
    )
    elapsed_s = time.monotonic() - start
    return {"missing": error.missing, "phase": error.phase, "text": str(error), "elapsed_s": elapsed_s}


@pytest.mark.parametrize(("absent", "who"), (([1], "rank 1"), ([0], "rank 0"), ([0, 2], "ranks 0, 2")))
def test_missing_at_bootstrap(ranks: Ranks, absent: list[int], who: str) -> None:
    """Ranks meet before they choose a transport, so this is the same for all."""

    def slowest_s() -> float:
        found = ranks.run(3, check_missing_at_bootstrap, absent)
        for rank in {0, 1, 2} - set(absent):
            assert found[rank]["missing"] == absent
            assert found[rank]["phase"] == "meet"
            assert found[rank]["text"] == f"bootstrap: {who} did not reach 'meet' within {BOOTSTRAP_DEADLINE_S:g} s"
        # An attempt ends on all ranks at once, when the first of them has waited for its deadline.
        slowest_s = max(found[rank]["elapsed_s"] for rank in {0, 1, 2} - set(absent))
        assert slowest_s >= BOOTSTRAP_DEADLINE_S
        return slowest_s

    in_time(slowest_s, BOOTSTRAP_DEADLINE_S + 1)


def check_missing_buffer(context: RankContext, transport: str, absent: int, attempt: int) -> dict | None:
    comm = context.new_communicator(transport, bootstrap_deadline_s=BOOTSTRAP_DEADLINE_S)
    store, gave_up = distributed_c10d._get_default_store(), f"gave up on {absent} with {transport}, attempt {attempt}"
    if context.rank == absent:
        # Stays up until the other has given up on it.
        store.wait([gave_up], datetime.timedelta(seconds=3 * BOOTSTRAP_DEADLINE_S))
        return None
    start = time.monotonic()
    error = error_of(BootstrapError, lambda: Buffer(comm, **GEOMETRY))
    store.set(gave_up, "")
    return {"missing": error.missing, "phase": error.phase, "elapsed_s": time.monotonic() - start}


@pytest.mark.parametrize("absent", (0, 1))
def test_missing_at_allocation(ranks: Ranks, transport: str, absent: int) -> None:
    attempts = itertools.count()

    def elapsed_s() -> float:
        found = ranks.run(2, check_missing_buffer, transport, absent, next(attempts))[1 - absent]
        assert (found["missing"], found["phase"]) == ([absent], "allocate")
        assert found["elapsed_s"] >= BOOTSTRAP_DEADLINE_S
        return found["elapsed_s"]

    in_time(elapsed_s, BOOTSTRAP_DEADLINE_S + 1)


def check_late_for_buffer(context: RankContext) -> str:
    """Rank 1 comes when rank 0 has given up, and finds its offer still there."""
    comm = context.new_communicator("shm", bootstrap_deadline_s=0.5, deadline_s=10.0)
    store = distributed_c10d._get_default_store()
    if context.rank == 0:
        error_of(BootstrapError, lambda: Buffer(comm, **GEOMETRY))
        store.set("gave up on a late rank", "")
        return str(error_of(ClosedError, lambda: Buffer(comm, **GEOMETRY)))
    store.wait(["gave up on a late rank"], datetime.timedelta(seconds=20))

    def use_buffer() -> None:
        buffer = Buffer(comm, **GEOMETRY)
        buffer.dispatch(torch.zeros(2, 24), torch.tensor([[0], [2]]))

    start = time.monotonic()
    error = error_of(CommFaultError, use_buffer)
    assert time.monotonic() - start < 5.0, "it must not wait for the deadline"
    return f"{error.record.cause} {error.record.peer}"


@needs_shm
def test_no_buffer_from_offers_of_a_failed_attempt(ranks: Ranks) -> None:
    assert ranks.run(2, check_late_for_buffer) == ["allocate: the communicator is closed", "peer_died 0"]


@needs_shm
def test_close_leaves_even_if_a_buffer_does_not_close(ranks: Ranks) -> None:
    ranks.run(1, check_close_with_stubborn_buffer)


def check_close_with_stubborn_buffer(context: RankContext) -> None:
    comm = context.new_communicator("shm")
    buffer = Buffer(comm, **GEOMETRY)
    close_domain, closed = comm._domain.close, []
    comm._domain.close = lambda: closed.append(close_domain())
    close_buffer = buffer.close

    def fail() -> None:
        close_buffer()
        raise RuntimeError("the device is gone")

    buffer.close = fail
    assert str(error_of(RuntimeError, comm.close)) == "the device is gone"
    assert comm.closed and len(closed) == 1


def check_without_process_group(context: RankContext) -> str:
    return str(error_of(InvalidArgumentError, Communicator.from_process_group))


def test_without_process_group() -> None:
    with RankPool(1, init_group=False) as pool:
        (message,) = pool.run(check_without_process_group)
    assert message == "group: torch.distributed must be initialised first; got None"


BAD_EXCHANGES = {
    "too few payloads": (lambda phase, payload: [payload], "exchange: must return one payload per rank (2); got 1"),
    "wrong order": (
        lambda phase, payload: [payload, payload],
        "exchange: must return payloads in rank order; got [0, 0]",
    ),
    "no payloads": (lambda phase, payload: None, "exchange: must return a list of payloads; got 'NoneType'"),
    "strange payloads": (
        lambda phase, payload: [payload, b"{}"],
        "exchange: must return the payloads of ranks with this version of ray_deepep, unchanged; got ",
    ),
    "broken payloads": (
        lambda phase, payload: [payload, b"\xff"],
        "exchange: must return the payloads of ranks with this version of ray_deepep, unchanged; got ",
    ),
    "no function": (None, "exchange: must be a function of phase and payload; got 'NoneType'"),
}


@pytest.mark.parametrize("name", BAD_EXCHANGES)
def test_bad_exchange(name: str) -> None:
    exchange, message = BAD_EXCHANGES[name]
    kinds = (InvalidArgumentError, InvalidTypeError)
    error = error_of(kinds, lambda: Communicator.from_exchange(exchange, rank=0, num_ranks=2))
    assert str(error).startswith(message)


@pytest.mark.parametrize(
    ("rank", "num_ranks", "message"),
    (
        (0, 0, "num_ranks: must be >= 1; got 0"),
        (2, 2, "rank: must be in [0, 2); got 2"),
        (-1, 2, "rank: must be in [0, 2); got -1"),
        ("0", 1, "rank: must be an int; got 'str'"),
        (0, 1.0, "num_ranks: must be an int; got 'float'"),
    ),
)
def test_bad_rank(rank: Any, num_ranks: Any, message: str) -> None:
    def exchange(phase: str, payload: bytes) -> list[bytes]:
        raise AssertionError("nothing may be sent")

    kinds = (InvalidArgumentError, InvalidTypeError)
    error = error_of(kinds, lambda: Communicator.from_exchange(exchange, rank=rank, num_ranks=num_ranks))
    assert str(error) == message


def test_bad_config() -> None:
    def call() -> Communicator:
        return Communicator.from_exchange(lambda phase, payload: [payload], rank=0, num_ranks=1, config={})

    assert str(error_of(InvalidTypeError, call)) == "config: must be a CommConfig; got 'dict'"
