"""Faults on GPUs: a rank that is killed or stopped is named, and the other's CUDA context and process go on.

20 cases, each with processes of its own. Without MPS: it may take all its clients down with a killed one.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable

import pytest
import torch
from harness import Outcome, RankContext, RankPool, error_of

from ray_deepep import Buffer, CommFaultError, Communicator, DispatchResult, FaultRecord
from ray_deepep.cuda import cuda_problem

DEADLINE_S = 2.0
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
pytestmark = [
    pytest.mark.skipif(bool(cuda_problem()), reason=f"transport cuda: {cuda_problem()}"),
    pytest.mark.skipif("CUDA_MPS_PIPE_DIRECTORY" in os.environ, reason="MPS ends its clients when one is killed"),
]
NUM_TOKENS, HIDDEN = 64, 128
SIZES = {"num_experts": 4, "hidden": HIDDEN, "num_topk": 2, "max_tokens": NUM_TOKENS}


def make_buffer(context: RankContext) -> Buffer:
    torch.cuda.set_device(context.rank % torch.cuda.device_count())
    return Buffer(context.new_communicator("cuda", deadline_s=DEADLINE_S), **SIZES)


def dispatch(buffer: Buffer) -> DispatchResult:
    x = torch.randn(NUM_TOKENS, HIDDEN, device="cuda", dtype=torch.bfloat16)
    result = buffer.dispatch(x, torch.randint(0, 4, (NUM_TOKENS, 2), device="cuda"))
    torch.cuda.synchronize()
    return result


def combine(buffer: Buffer, result: DispatchResult) -> None:
    buffer.combine(result.x, result.handle)
    torch.cuda.synchronize()
    buffer.check()


def dispatch_async(buffer: Buffer, result: DispatchResult) -> None:
    buffer.dispatch(result.x[:NUM_TOKENS].contiguous(), handle=result.handle, async_op=True).wait()
    torch.cuda.synchronize()
    buffer.check()


def prepare(context: RankContext, operation: str) -> tuple[Buffer, Callable[[], object]]:
    """A buffer, and the operation as it will be called when the other rank no longer answers."""
    buffer = make_buffer(context)
    if operation == "dispatch":
        dispatch(buffer)
        return buffer, lambda: dispatch(buffer)
    # A plan of 64 rows here, whichever way tokens go: both ranks send all tokens to both.
    x = torch.randn(NUM_TOKENS, HIDDEN, device="cuda", dtype=torch.bfloat16)
    experts = torch.tensor([[0, 2]], device="cuda").expand(NUM_TOKENS, 2).contiguous()
    result = buffer.dispatch(x, experts)
    torch.cuda.synchronize()
    if operation == "combine":
        return buffer, lambda: combine(buffer, result)
    if operation == "async":
        return buffer, lambda: dispatch_async(buffer, result)
    graph, fixed = torch.cuda.CUDAGraph(), {"max_recv_tokens": 2 * NUM_TOKENS}
    arrived = buffer.dispatch(x, experts, **fixed)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        arrived = buffer.dispatch(x, experts, **fixed)
        buffer.combine(arrived.x, arrived.handle)

    def replay(_alive: tuple = (x, experts)) -> None:  # the graph reads them
        graph.replay()
        torch.cuda.synchronize()
        buffer.check()

    replay()
    return buffer, replay


def fault_of(call: Callable[[], object]) -> dict:
    start = time.monotonic()
    error = error_of(CommFaultError, call)
    return {"record": error.record.to_json(), "elapsed_s": time.monotonic() - start}


def assert_alive(buffer: Buffer) -> None:
    """The failed communicator refuses; a new one comes up in this process, and torch computes."""
    error_of(CommFaultError, lambda: dispatch(buffer))
    buffer.comm.close()
    with Communicator.from_exchange(lambda phase, payload: [payload], rank=0, num_ranks=1) as alone:
        fresh = Buffer(alone, **SIZES)
        x = torch.randn(NUM_TOKENS, HIDDEN, device="cuda")
        got = fresh.dispatch(x, torch.zeros(NUM_TOKENS, 1, dtype=torch.int64, device="cuda"))
        assert alone.transport == "cuda" and torch.equal(got.x, x)
    product = torch.ones(256, 256, device="cuda") @ torch.ones(256, 256, device="cuda")
    assert product.sum().item() == 256.0**3


def before_the_call(context: RankContext, how: str, operation: str) -> dict:
    """Rank 1 goes just before an operation that rank 0 enters."""
    buffer, call = prepare(context, operation)
    if context.rank == 1:
        os.kill(os.getpid(), SIGNALS[how])
        return {}
    found = fault_of(call)
    assert_alive(buffer)
    return found


def amid_a_loop(context: RankContext, how: str, operation: str, after_s: float) -> dict:
    """Rank 1 goes at some moment of a loop of operations, its kernels and rank 0's in flight."""
    buffer, call = prepare(context, operation)
    result = dispatch(buffer)

    def iteration() -> None:
        call()
        combine(buffer, result)

    for _ in range(3):
        iteration()
    if context.rank == 1:
        threading.Timer(after_s, lambda: os.kill(os.getpid(), SIGNALS[how])).start()
        while True:
            iteration()
    end = time.monotonic() + 30.0
    while time.monotonic() < end:
        start = time.monotonic()
        try:
            iteration()
        except CommFaultError as error:
            found = {"record": error.record.to_json(), "elapsed_s": time.monotonic() - start}
            assert_alive(buffer)
            return found
    raise AssertionError("30 s of operations after rank 1 was gone")


def outcome_of_rank_0(function: Callable[..., dict], how: str, *args: object) -> Outcome:
    with RankPool(2) as pool:
        # Rank 1, if it was only stopped, is killed once rank 0 has answered.
        return pool.outcomes(function, how, *args, deadline_s=60.0, doomed=(1,))[0]


def assert_named(outcome: Outcome, how: str, operations: tuple[str, ...]) -> None:
    assert outcome.value, outcome.error or outcome.lost
    record = FaultRecord.from_json(outcome.value["record"])
    assert record.peer == 1 and record.operation in operations, record
    assert record.cause == {"kill": "peer_died", "stop": "timeout"}[how], record
    assert outcome.value["elapsed_s"] < DEADLINE_S + 1.0, outcome.value


BEFORE = [("kill", "dispatch")] * 3 + [("kill", "combine")] * 2 + [("kill", "async"), ("kill", "graph")]
BEFORE += [("stop", "dispatch"), ("stop", "combine"), ("stop", "graph")]
LOOPS = [("kill", "dispatch")] * 4 + [("kill", "async")] * 2 + [("kill", "graph")] * 2
LOOPS += [("stop", "dispatch"), ("stop", "graph")]


@pytest.mark.parametrize(("how", "operation"), BEFORE)
def test_gone_before_the_call(how: str, operation: str) -> None:
    outcome = outcome_of_rank_0(before_the_call, how, operation)
    assert_named(outcome, how, {"async": ("dispatch",), "graph": ("dispatch",)}.get(operation, (operation,)))


@pytest.mark.parametrize(("number", "how", "operation"), [(i, *case) for i, case in enumerate(LOOPS)])
def test_gone_amid_a_loop(number: int, how: str, operation: str) -> None:
    after_s = random.Random(number).uniform(0.05, 0.6)
    outcome = outcome_of_rank_0(amid_a_loop, how, operation, after_s)
    assert_named(outcome, how, ("dispatch", "combine"))
