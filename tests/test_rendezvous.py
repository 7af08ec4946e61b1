"""The exchange over a process group's store: attempts that fail leave nothing behind for the next ones to read."""

from __future__ import annotations

import datetime
import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from harness import RankContext, RankPool, Ranks, error_of, in_time, store_of_rank_0

from ray_deepep import BootstrapError, Buffer
from ray_deepep.rendezvous import store_exchange

DEADLINE_S = 1.0
PATIENT_S = 20.0


def exchange_of(context: RankContext, deadline_s: float):
    return store_exchange(dist.group.WORLD, context.rank, context.num_ranks, deadline_s)


def exchange(context: RankContext, text: str, deadline_s: float) -> list[str]:
    """Two phases of one attempt; what all ranks said in both."""
    call = exchange_of(context, deadline_s)
    return [said.decode() for phase in ("meet", "connect") for said in call(phase, f"{text} {phase}".encode())]


def check_without(context: RankContext, absent: list[int], text: str) -> list[int]:
    if context.rank in absent:
        return []
    return error_of(BootstrapError, lambda: exchange(context, text, DEADLINE_S)).missing


def check_all(context: RankContext, text: str) -> list[str]:
    return exchange(context, f"{text} {context.rank}", PATIENT_S)


def said_by_all(text: str, num_ranks: int) -> list[list[str]]:
    return [[f"{text} {rank} {phase}" for phase in ("meet", "connect") for rank in range(num_ranks)]] * num_ranks


def test_attempts_after_failed_ones(ranks: Ranks) -> None:
    """Each rank has made another number of attempts, rank 0 or another one absent; all end on the same new one."""
    for number, absent in enumerate(([1], [0], [0, 2], [1])):
        found = ranks.run(3, check_without, absent, f"failed {number}")
        assert found == [[] if rank in absent else absent for rank in range(3)]
        assert ranks.run(3, check_all, f"good {number}") == said_by_all(f"good {number}", 3)


def check_late(context: RankContext) -> tuple[list[str], list[int]]:
    """Rank 1 comes when the others have given up once and wait for the second time."""
    if context.rank == 1:
        time.sleep(DEADLINE_S + 1.0)
        return exchange(context, f"second {context.rank}", PATIENT_S), []
    missing = error_of(BootstrapError, lambda: exchange(context, f"first {context.rank}", DEADLINE_S)).missing
    return exchange(context, f"second {context.rank}", PATIENT_S), missing


def test_a_late_rank_meets_the_second_attempt(ranks: Ranks) -> None:
    found = ranks.run(3, check_late)
    assert [missing for _, missing in found] == [[1], [], [1]]
    assert [said for said, _ in found] == said_by_all("second", 3)


def check_late_and_alone(context: RankContext) -> list[int]:
    """Rank 1 comes when the others have given up and do not call again: it must not take their keys for presence."""
    if context.rank == 1:
        time.sleep(DEADLINE_S + 0.5)
    return error_of(BootstrapError, lambda: exchange(context, "late", DEADLINE_S)).missing


def test_a_late_rank_does_not_meet_ranks_that_left(ranks: Ranks) -> None:
    assert ranks.run(3, check_late_and_alone) == [[1], [0, 2], [1]]
    assert ranks.run(3, check_all, "after") == said_by_all("after", 3)


def check_lost_after_meeting(context: RankContext) -> tuple[list[int], str]:
    call = exchange_of(context, DEADLINE_S)
    call("meet", b"")
    if context.rank == 2:
        return [], ""
    error = error_of(BootstrapError, lambda: call("connect", b"first"))
    return error.missing, error.phase


def test_a_rank_lost_between_phases(ranks: Ranks) -> None:
    assert ranks.run(3, check_lost_after_meeting) == [([2], "connect"), ([2], "connect"), ([], "")]
    assert ranks.run(3, check_all, "after") == said_by_all("after", 3)


def check_interrupted(context: RankContext) -> str:
    """Rank 0 is interrupted while ranks wait for rank 2; the attempt goes with it, and peers learn at once who left."""
    call = exchange_of(context, PATIENT_S)
    if context.rank == 2:
        return ""
    if context.rank == 0:
        waits = call._wait

        def interrupted(keys: list[str]) -> None:
            waits([key.replace("outcome", "meet/1") for key in keys])
            raise KeyboardInterrupt

        call._wait = interrupted
        error_of(KeyboardInterrupt, lambda: call("meet", b""))
        return ""
    begin = time.monotonic()
    error = error_of(BootstrapError, lambda: call("meet", b""))
    assert time.monotonic() - begin < PATIENT_S / 2
    return f"{error.phase} {error.missing}"


def test_an_interrupted_rank(ranks: Ranks) -> None:
    assert ranks.run(3, check_interrupted) == ["", "meet [0]", ""]
    assert ranks.run(3, check_all, "after") == said_by_all("after", 3)


def check_lost_store(context: RankContext, port_path: str, how: int) -> tuple[list[tuple[str, list[int], str]], float]:
    """Rank 0 hosts torch's store, as under plain ``init_method``, and dies or stands still.

    Returns what rank 1 is told, three times, and the seconds for which it waits at most.
    """
    store = store_of_rank_0(context, port_path)
    call = exchange_of(context, DEADLINE_S)
    call("meet", b"")
    store.set(f"rank {context.rank} has met", "")
    if context.rank == 0:
        store.wait(["rank 1 has met"], datetime.timedelta(seconds=PATIENT_S))
        os.kill(os.getpid(), how)
    found, slowest_s = [], 0.0
    for again in (call, call, exchange_of(context, DEADLINE_S)):
        begin = time.monotonic()
        error = error_of(BootstrapError, lambda again=again: again("connect", b""))
        slowest_s = max(slowest_s, time.monotonic() - begin)
        found.append((error.phase, error.missing, error.detail.partition(": ")[0]))
    return found, slowest_s


@pytest.mark.parametrize(("how", "words"), ((signal.SIGKILL, "is gone"), (signal.SIGSTOP, "does not answer")))
def test_a_lost_store_is_a_bootstrap_error(tmp_path, how: int, words: str) -> None:
    def slowest_s() -> float:
        path = tmp_path / "port"
        path.unlink(missing_ok=True)
        with RankPool(2, init_group=False) as pool:
            outcome = pool.outcomes(check_lost_store, str(path), how, deadline_s=20.0, doomed=[0])[1]
        assert outcome.value, outcome.error or outcome.lost
        lost = ("connect", [], f"the process that hosts torch's store, 127.0.0.1:{path.read_text()}, {words}")
        found, elapsed_s = outcome.value
        assert found == [lost] * 3
        return elapsed_s

    in_time(slowest_s, DEADLINE_S + 1.0)


def check_all_at_once(context: RankContext) -> None:
    """Many attempts without a pause between them."""
    for number in range(50):
        said = exchange(context, f"{number} {context.rank}", PATIENT_S)
        assert said == said_by_all(str(number), context.num_ranks)[0]


def test_many_attempts(ranks: Ranks) -> None:
    ranks.run(4, check_all_at_once)


def check_communicator_fails(context: RankContext, transport: str) -> list[int]:
    """Rank 1 is held up beyond the deadline of the others, and then gives up itself."""
    if context.rank == 1:
        time.sleep(DEADLINE_S + 0.5)
    error = error_of(BootstrapError, lambda: context.new_communicator(transport, bootstrap_deadline_s=DEADLINE_S))
    return error.missing


def check_communicator(context: RankContext, transport: str) -> None:
    with (
        context.new_communicator(transport) as comm,
        Buffer(comm, num_experts=3, hidden=16, num_topk=1, max_tokens=4) as buffer,
    ):
        x = torch.full((3, 16), float(context.rank))
        result = buffer.dispatch(x, torch.arange(3).unsqueeze(1))
        assert result.x[:, 0].tolist() == [0.0, 1.0, 2.0]
        assert torch.equal(buffer.combine(result.x, result.handle).x, x)


def test_communicator_after_a_failed_one(ranks: Ranks, transport: str) -> None:
    assert ranks.run(3, check_communicator_fails, transport) == [[1], [0, 2], [1]]
    ranks.run(3, check_communicator, transport)
