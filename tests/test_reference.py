"""The reference transport: its plan on paper-sized examples, its exchanges, and its faults.

What it computes is tested with every other transport in ``test_dispatch_combine.py``.
"""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from cases import Case, check_case
from harness import CASE_CONFIG, RankContext, RankPool, Ranks, error_of, in_time, store_of_rank_0

from ray_deepep import (
    Buffer,
    CommConfig,
    CommFaultError,
    Communicator,
    ExpertMajor,
    FaultRecord,
    MismatchError,
    Padded,
    TokenMajor,
)
from ray_deepep.plan_reference import RankRouting, expert_major_slots, make_plan
from ray_deepep.reference_group import as_bytes, check_signatures, from_bytes

DEADLINE_S = 1.0

# Two ranks, four experts: rank 0 has experts 0 and 1, rank 1 has 2 and 3. Rank 0 has three tokens, rank 1 one.
ROUTING = [
    RankRouting(
        topk_idx=torch.tensor([[0, 2], [-1, 3], [3, 2]]),
        topk_weights=torch.tensor([[0.1, 0.2], [9.0, 0.3], [0.4, 0.5]]),
        locations=torch.tensor([[0, 1], [5, 0], [1, 0]], dtype=torch.int32),
    ),
    RankRouting(
        topk_idx=torch.tensor([[3, 3]]),
        topk_weights=torch.tensor([[0.6, 0.7]]),
        locations=torch.tensor([[1, 0]], dtype=torch.int32),
    ),
]


def test_plan_of_sender_and_receiver() -> None:
    plan = make_plan(ROUTING, rank=0, num_experts=4, layout=TokenMajor(), sequence=5)
    assert plan.sequence == 5
    assert [tokens.tolist() for tokens in plan.send_tokens] == [[0], [0, 1, 2]]
    # token * K + k
    assert [routes.tolist() for routes in plan.send_routes] == [[0], [1, 3, 4, 5]]
    assert (plan.num_recv_rows, plan.num_recv_routes) == ((1, 0), (1, 0))

    plan = make_plan(ROUTING, rank=1, num_experts=4, layout=TokenMajor(), sequence=5)
    assert [tokens.tolist() for tokens in plan.send_tokens] == [[], [0]]
    assert (plan.num_recv_rows, plan.num_recv_routes) == ((3, 1), (4, 2))
    assert plan.recv_topk_idx.tolist() == [[-1, 0], [-1, 1], [1, 0], [1, 1]]
    torch.testing.assert_close(plan.recv_topk_weights, torch.tensor([[0, 0.2], [0, 0.3], [0.4, 0.5], [0.6, 0.7]]))
    assert (plan.route_row.tolist(), plan.route_k.tolist()) == ([0, 1, 2, 2, 3, 3], [1, 1, 0, 1, 0, 1])
    assert plan.num_recv_tokens_per_expert == (2, 4)
    assert plan.slots.num_slots == 4


def test_plan_of_expert_major_rows() -> None:
    slots = make_plan(ROUTING, rank=1, num_experts=4, layout=ExpertMajor(4), sequence=1).slots
    # Expert 2 takes slots 0 and 1, then padding to 4; expert 3 takes 4 to 7.
    assert slots.route_slot.tolist() == [0, 4, 5, 1, 6, 7]
    assert (slots.expert_offsets, slots.num_slots) == ((0, 4, 8), 8)


def test_plan_of_padded_rows() -> None:
    slots = make_plan(ROUTING, rank=1, num_experts=4, layout=Padded(2), sequence=1).slots
    # (source * 2 experts + expert) * capacity 2 + location
    assert slots.route_slot.tolist() == [1, 2, 3, 0, 7, 6]
    assert (slots.expert_offsets, slots.num_slots) == ((), 8)


@pytest.mark.parametrize(
    ("counts", "alignment", "offsets"),
    (
        ([0, 0, 0], 8, (0, 0, 0, 0)),
        ([1, 0, 9], 8, (0, 8, 8, 24)),
        ([8, 8, 1], 8, (0, 8, 16, 24)),
        ([3, 0, 2], 1, (0, 3, 3, 5)),
        ([5], 3, (0, 6)),
    ),
)
def test_expert_offsets(counts: list[int], alignment: int, offsets: tuple[int, ...]) -> None:
    experts = torch.tensor([expert for expert, count in enumerate(counts) for _ in range(count)], dtype=torch.int64)
    slots = expert_major_slots(experts.flip(0), torch.tensor(counts), alignment)
    assert (slots.expert_offsets, slots.num_slots) == (offsets, offsets[-1])
    assert len(set(slots.route_slot.tolist())) == len(experts)


def test_signatures() -> None:
    check_signatures("combine", [{"a": 1, "b": None}, {"a": 1, "b": None}])
    error = error_of(MismatchError, lambda: check_signatures("combine", [{"a": 1}, {"a": 1}, {"a": 2}, {"a": 3}]))
    assert str(error) == "combine: rank 2 passed a=2, rank 0 passed a=1"
    error = error_of(MismatchError, lambda: check_signatures("combine", [{"a": 1, "b": 2}, {"a": 1}]))
    assert str(error) == "combine: rank 1 passed b=None, rank 0 passed b=2"


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64))
@pytest.mark.parametrize("shape", ((0, 4), (3, 0), (1, 1), (3, 1), (3, 4)))
def test_bytes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    value = torch.arange(12)[: shape[0] * shape[1]].view(shape).to(dtype)
    for rows in (value, value.T.contiguous().T):
        moved = as_bytes(rows)
        assert (moved.dtype, moved.shape) == (torch.uint8, (shape[0], shape[1] * dtype.itemsize))
        assert torch.equal(from_bytes(moved, dtype).float(), value.float())


def check_file_store(context: RankContext, path: str) -> None:
    """Any store of torch's will do, not only the TCP one."""
    store = dist.FileStore(path, context.num_ranks)
    dist.init_process_group("gloo", store=store, rank=context.rank, world_size=context.num_ranks)
    for layout in (TokenMajor(), ExpertMajor(8)):
        check_case(context, "reference", Case(seed=1, num_tokens=(4, 2), layout=layout))


def test_file_store(tmp_path) -> None:
    with RankPool(2, init_group=False) as pool:
        pool.run(check_file_store, str(tmp_path / "store"))


def make_buffer(context: RankContext) -> Buffer:
    comm = context.new_communicator("reference", deadline_s=DEADLINE_S)
    return Buffer(comm, num_experts=context.num_ranks, hidden=8, num_topk=2, max_tokens=8)


def dispatch(buffer: Buffer):
    num_ranks = buffer.comm.num_ranks
    return buffer.dispatch(torch.ones(4, 8), torch.arange(8).view(4, 2) % num_ranks)


def misbehave(how: str, buffer: Buffer) -> None:
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    if how == "closed":
        buffer.comm.close()
    if how == "killed inside":
        # After it showed what it asks for, before its rows move.
        buffer._transport._group.all_to_all = lambda *rows: os.kill(os.getpid(), signal.SIGKILL)
        dispatch(buffer)
    time.sleep(60.0)


def check_fault(context: RankContext, culprit: int, how: str) -> dict | None:
    buffer = make_buffer(context)
    dispatch(buffer)
    result = dispatch(buffer)
    if context.rank == culprit:
        misbehave(how, buffer)
        return None
    start = time.monotonic()
    call = (lambda: dispatch(buffer)) if how == "killed inside" else (lambda: buffer.combine(result.x, result.handle))
    error = error_of(CommFaultError, call)
    elapsed_s = time.monotonic() - start
    assert buffer.comm.fault == error.record
    assert error_of(CommFaultError, lambda: dispatch(buffer)).record == error.record
    assert error_of(CommFaultError, lambda: make_another(buffer)).record == error.record
    buffer.comm.close()
    return {"record": error.record, "elapsed_s": elapsed_s}


def make_another(buffer: Buffer) -> Buffer:
    return Buffer(buffer.comm, num_experts=buffer.comm.num_ranks, hidden=8, num_topk=1, max_tokens=1)


CAUSES = {
    "late": ("timeout",),
    "killed": ("timeout",),
    "stopped": ("timeout",),
    "closed": ("peer_closed",),
    # Its neighbours in the collective see the broken connection; the others only that nothing comes.
    "killed inside": ("peer_died", "timeout"),
}


@pytest.mark.parametrize(
    ("how", "num_ranks", "culprit"),
    (
        ("late", 2, 0),
        ("killed", 4, 2),
        ("stopped", 2, 1),
        ("closed", 3, 2),
        ("killed inside", 2, 1),
        ("killed inside", 4, 2),
    ),
)
def test_fault_names_the_culprit(how: str, num_ranks: int, culprit: int) -> None:
    in_time(lambda: slowest_to_name(how, num_ranks, culprit), DEADLINE_S + 1)


def slowest_to_name(how: str, num_ranks: int, culprit: int) -> float:
    """Seconds that the slowest rank took to name the culprit, as all do."""
    with RankPool(num_ranks) as pool:
        culprit_pid = pool.processes[culprit].pid
        outcomes = pool.outcomes(check_fault, culprit, how, deadline_s=20.0, doomed=[culprit])
    for rank in set(range(num_ranks)) - {culprit}:
        assert outcomes[rank].value, outcomes[rank].error or outcomes[rank].lost
        record = outcomes[rank].value["record"]
        assert (record.rank, record.peer, record.peer_pid) == (rank, culprit, culprit_pid)
        assert record.cause in CAUSES[how]
        assert (record.operation, record.sequence) == ("dispatch" if how == "killed inside" else "combine", 3)
    return max(outcome.value["elapsed_s"] for rank, outcome in enumerate(outcomes) if rank != culprit)


def low_latency_dispatch(buffer: Buffer) -> None:
    buffer.low_latency_dispatch(torch.ones(4, 128), torch.arange(8).view(4, 2) % buffer.comm.num_ranks)


def check_lost_store(context: RankContext, port_path: str, how: int, low_latency: bool) -> tuple[str, int, float]:
    """Rank 0 hosts torch's store, as under plain ``init_method``, and dies or stands still."""
    store = store_of_rank_0(context, port_path)
    comm = context.new_communicator("reference", deadline_s=DEADLINE_S)
    sizes = {"num_experts": context.num_ranks, "hidden": 128, "num_topk": 2, "max_tokens": 8}
    buffer = Buffer(comm, **sizes, low_latency_max_tokens=8)
    call = low_latency_dispatch if low_latency else dispatch_wide
    call(buffer)
    if context.rank == 0:
        # The first call is to succeed on all: a rank that still reads it from the store would miss the rest.
        store.wait([f"first call of rank {rank}" for rank in range(1, context.num_ranks)], timedelta(seconds=20))
        os.kill(os.getpid(), how)
    store.set(f"first call of rank {context.rank}", "done")
    start = time.monotonic()
    error = error_of(CommFaultError, lambda: call(buffer))
    elapsed_s = time.monotonic() - start
    buffer.comm.close()
    return error.record.cause, error.record.peer, elapsed_s


def dispatch_wide(buffer: Buffer) -> None:
    buffer.dispatch(torch.ones(4, 128), torch.arange(8).view(4, 2) % buffer.comm.num_ranks)


@pytest.mark.parametrize(("how", "cause"), ((signal.SIGKILL, "peer_died"), (signal.SIGSTOP, "timeout")))
@pytest.mark.parametrize("low_latency", (False, True))
def test_lost_store(tmp_path, how: int, cause: str, low_latency: bool) -> None:
    with RankPool(2, init_group=False) as pool:
        arguments = str(tmp_path / "port"), how, low_latency
        outcome = pool.outcomes(check_lost_store, *arguments, deadline_s=20.0, doomed=[0])[1]
    assert outcome.value, outcome.error or outcome.lost
    assert outcome.value[:2] == (cause, 0) and outcome.value[2] < DEADLINE_S + 1


def test_a_store_of_no_rank_is_told_apart() -> None:
    record = FaultRecord(
        operation="dispatch",
        sequence=3,
        phase="publish",
        cause="timeout",
        rank=1,
        peer=-1,
        expected=3,
        seen=3,
        elapsed_s=1.0,
        deadline_s=1.0,
    )
    assert "a process of no rank, which hosts torch's store, sent no signal for 1.0 s" in str(record)


def check_single(context: RankContext) -> None:
    config = CommConfig(transport="reference", **CASE_CONFIG)
    with Communicator.from_process_group(config=config) as comm:
        buffer = Buffer(comm, num_experts=3, hidden=5, num_topk=2, max_tokens=4)
        x, weights = torch.randn(4, 5), torch.rand(4, 2)
        result = buffer.dispatch(x, torch.tensor([[0, 1], [2, 2], [-1, 0], [-1, -1]]), weights, layout=ExpertMajor())
        assert result.handle.expert_offsets == (0, 2, 3, 5)
        assert torch.equal(result.x, x[[0, 2, 0, 1, 1]])
        home = buffer.combine(result.x, result.handle, weighted=True)
        weights[2, 0] = weights[3, 0] = weights[3, 1] = 0
        torch.testing.assert_close(home.x, x * weights.sum(1, keepdim=True))


def test_one_process_needs_no_peer(ranks: Ranks) -> None:
    ranks.run(1, check_single)
