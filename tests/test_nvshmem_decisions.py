"""NVSHMEM's bring-up, memory and end, as ranks decide them together; on a stand-in for the compiled core."""

from __future__ import annotations

import pickle

import pytest
from nvshmem_cases import DEADLINE_S, UNIQUE_ID, CoreBootstrapError, CoreNvshmemError, FakeCore, on_ranks

from ray_deepep import BootstrapError, InvalidArgumentError, MismatchError, NvshmemError
from ray_deepep.nvshmem import NvshmemRuntime
from ray_deepep.nvshmem_decisions import (
    RankReport,
    check_pes,
    decide_abandon,
    decide_bring_up,
    decide_frees,
    version_problem,
)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put back what settings write into the environment."""
    monkeypatch.setenv("NVSHMEM_DISABLE_NVLS", "1")


def reports(*fields: dict) -> list[RankReport]:
    return [RankReport(rank=rank, **{"version": "3.4.5", **each}) for rank, each in enumerate(fields)]


def up(pe: int, num_pes: int) -> dict:
    return {"status": 2, "pe": pe, "num_pes": num_pes}


def test_fresh_ranks_use_the_id_of_rank_0() -> None:
    plan = decide_bring_up(reports({"unique_id": UNIQUE_ID.hex()}, {}, {}))
    assert (plan.join, plan.unique_id) == (False, UNIQUE_ID)


@pytest.mark.parametrize("pes", ((0, 1), (1, 0)))
def test_ranks_join_what_agrees(pes: tuple[int, int]) -> None:
    assert decide_bring_up(reports(*(up(pe, 2) for pe in pes))).join


@pytest.mark.parametrize(
    ("fields", "ranks", "text"),
    (
        (({}, {"problem": "no library"}, {"problem": "no library"}), [1, 2], "no library"),
        (({}, {"version": "3.3.9"}), [1], "NVSHMEM 3.3.9, but rank 0 has 3.4.5"),
        (({}, {"status": 1}), [1], "failed half way"),
        ((up(0, 2), {}), [0], "up already, on 1 of 2 ranks only"),
        ((up(0, 8), up(1, 8)), [0, 1], "with 8 PEs; this group has 2 ranks"),
        ((up(0, 2), up(0, 2)), [1], "not one group's NVSHMEM"),
    ),
    ids=("missing", "version", "half_up", "some_up", "other_count", "same_pe"),
)
def test_ranks_that_cannot_are_named(fields: tuple[dict, ...], ranks: list[int], text: str) -> None:
    with pytest.raises(NvshmemError, match="bring_up") as caught:
        decide_bring_up(reports(*fields))
    assert (caught.value.step, caught.value.ranks) == ("bring_up", ranks)
    assert text in caught.value.reason
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize(("pes", "wrong"), (([0, 0, 2], [1]), ([0, 1, 3], [2]), ([-1, 1, 2], [0])))
def test_pes_are_each_there_once(pes: list[int], wrong: list[int]) -> None:
    with pytest.raises(NvshmemError) as caught:
        check_pes(pes)
    assert caught.value.ranks == wrong
    assert check_pes([2, 0, 1]) == (2, 0, 1)


def test_versions() -> None:
    assert version_problem("3.4.5", "3.4.5") == ""
    assert "built for NVSHMEM 3.4.5, but 3.8.0 is loaded" in version_problem("3.4.5", "3.8.0")


def test_frees_are_what_all_released() -> None:
    asks = [{"num_bytes": 8, "released": released} for released in ([0, 3, 2], [3, 0], [0, 1, 3])]
    assert decide_frees(asks) == [0, 3]
    with pytest.raises(MismatchError, match="rank 1 passed heap_bytes=16, rank 0 passed heap_bytes=8"):
        decide_frees([asks[0], {"num_bytes": 16, "released": []}])


def test_who_abandons() -> None:
    assert decide_abandon(fault="", gone=[], abandoned="") == ""
    assert decide_abandon(fault="combine #3", gone=[], abandoned="") == "combine #3"
    assert decide_abandon(fault="x", gone=[1, 2], abandoned="") == "the process of rank 1, 2 is gone"
    assert decide_abandon(fault="x", gone=[1], abandoned="init did not return") == "init did not return"


@pytest.mark.parametrize("num_ranks", (1, 3))
def test_bring_up(num_ranks: int) -> None:
    cores = [FakeCore() for _ in range(num_ranks)]
    for rank, outcome in enumerate(on_ranks(cores)):
        runtime = outcome.value
        assert (runtime.joined, runtime.rank_to_pe) == (False, tuple(range(num_ranks)))
        assert cores[rank].calls == [("init", UNIQUE_ID, rank, num_ranks, 0)]


def test_join_keeps_the_pes_that_are_there() -> None:
    cores = [FakeCore(status=2, pe=1 - rank, num_pes=2) for rank in range(2)]
    for outcome in on_ranks(cores, lambda runtime: (runtime.joined, runtime.rank_to_pe, runtime.allocate(64).segments)):
        assert outcome.value == (True, (1, 0), (1001, 1000))
    # Counted as a user of it, with an id that nobody reads.
    assert [core.calls[0][:2] for core in cores] == [("init", bytes(128))] * 2


def test_a_rank_without_nvshmem_is_named_everywhere_and_nobody_calls_it() -> None:
    cores = [FakeCore(), ImportError("libnvshmem_host.so.3 is not there")]
    for outcome in on_ranks(cores):
        assert isinstance(outcome.error, NvshmemError) and outcome.error.ranks == [1]
        assert "libnvshmem_host.so.3" in str(outcome.error) and "ray-deepep[nvshmem]" in str(outcome.error)
    assert cores[0].calls == []


def test_a_rank_that_does_not_come_is_named() -> None:
    cores = [FakeCore(), FakeCore(), FakeCore()]
    for outcome in on_ranks(cores, absent=(1,))[::2]:
        assert isinstance(outcome.error, BootstrapError) and outcome.error.missing == [1]
    assert cores[0].calls == cores[2].calls == []


def test_init_that_fails_on_one_rank_gives_nvshmem_up_on_all() -> None:
    cores = [FakeCore(), FakeCore(init_error=CoreNvshmemError("init", 7, 1, "no GPU"))]
    first, second = on_ranks(cores)
    assert isinstance(second.error, NvshmemError) and "no GPU (code 7, status 1)" in str(second.error)
    assert isinstance(first.error, NvshmemError) and first.error.ranks == [1] and "no GPU" in str(first.error)
    for core in cores:
        assert "no GPU" in core.abandoned()
    # And a second attempt says so at once.
    assert all("given up" in str(outcome.error) for outcome in on_ranks(cores))


def test_init_that_is_stuck_is_a_bootstrap_error_that_names_the_dead() -> None:
    stuck = CoreBootstrapError("nvshmem_init", [], DEADLINE_S, "a thread is stuck")
    cores = [FakeCore(init_error=stuck), FakeCore()]
    first, second = on_ranks(cores, gone=(1,))
    assert isinstance(first.error, BootstrapError)
    assert (first.error.phase, first.error.missing) == ("nvshmem_init", [1])
    assert isinstance(second.error, NvshmemError) and second.error.ranks == [0]


def test_memory_is_freed_when_all_have_released_it() -> None:
    cores = [FakeCore(), FakeCore()]

    def use(runtime: NvshmemRuntime) -> list[int]:
        first, second = runtime.allocate(100), runtime.allocate(200)
        assert first.segments == (1000, 1001) and second.num_bytes == 200
        runtime.release(second)
        if runtime.rank == 0:
            runtime.release(first)
        third = runtime.allocate(300)
        if runtime.rank == 1:
            runtime.release(first)
        fourth = runtime.allocate(400)
        return [third.block, fourth.block]

    assert [outcome.value for outcome in on_ranks(cores, use)] == [[2, 3], [2, 3]]
    steps = [("allocate", 100), ("allocate", 200), ("free", 1), ("allocate", 300), ("free", 0), ("allocate", 400)]
    for core in cores:
        assert core.calls[1:] == steps
        assert core.blocks == {2: 300, 3: 400}


def test_different_sizes_are_a_mismatch_before_anything_is_allocated() -> None:
    cores = [FakeCore(), FakeCore()]
    for outcome in on_ranks(cores, lambda runtime: runtime.allocate(64 + runtime.rank)):
        assert isinstance(outcome.error, MismatchError) and outcome.error.peer == 1
    assert [call[0] for core in cores for call in core.calls] == ["init", "init"]
    (outcome,) = on_ranks([FakeCore()], lambda runtime: runtime.allocate(0))
    assert isinstance(outcome.error, InvalidArgumentError)


def test_finalize_and_bring_up_again() -> None:
    cores = [FakeCore(), FakeCore()]
    assert [outcome.value for outcome in on_ranks(cores, lambda runtime: runtime.finalize())] == ["", ""]
    assert [core.calls[-1] for core in cores] == [("finalize",)] * 2

    def use(runtime: NvshmemRuntime) -> str:
        runtime.release(runtime.allocate(8))
        return runtime.finalize()

    assert [outcome.value for outcome in on_ranks(cores, use)] == ["", ""]
    assert [core.blocks for core in cores] == [{}, {}] and all(core.status() == 0 for core in cores)
    assert all(outcome.value.rank_to_pe == (0, 1) for outcome in on_ranks(cores))


def test_a_fault_abandons_and_waits_for_nobody() -> None:
    cores = [FakeCore(), FakeCore()]
    outcomes = on_ranks(cores, lambda runtime: runtime.finalize(fault="combine #3 failed"))
    assert [outcome.value for outcome in outcomes] == ["combine #3 failed"] * 2
    assert all(("finalize",) not in core.calls and core.abandoned() == "combine #3 failed" for core in cores)


def test_a_dead_peer_abandons() -> None:
    cores = [FakeCore(), FakeCore(), FakeCore()]

    def leave(runtime: NvshmemRuntime) -> str:
        return "" if runtime.rank == 1 else runtime.finalize()

    for outcome in on_ranks(cores, leave)[::2]:
        # It did not come, and nobody knows yet that it is dead.
        assert "rank 1 did not reach 'nvshmem_finalize_1'" in outcome.value
    assert all(("finalize",) not in core.calls for core in cores)
    (outcome,) = on_ranks([FakeCore()], lambda runtime: runtime.finalize(), gone=(3,))
    assert outcome.value == "the process of rank 3 is gone"


def test_a_fault_of_one_rank_keeps_the_others_from_finalizing() -> None:
    cores = [FakeCore(), FakeCore()]

    def leave(runtime: NvshmemRuntime) -> str:
        if runtime.rank == 0:
            runtime.abandon("the GPU fell off")
        return runtime.finalize()

    first, second = on_ranks(cores, leave)
    assert first.value == "the GPU fell off" and "rank 0 did not reach" in second.value
    assert all(("finalize",) not in core.calls for core in cores)
