"""Faults on GPUs: a rank that is killed or stopped is named, and the other's CUDA context and process go on.

Without MPS: it may take all its clients down with a killed one.
"""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import torch
from harness import RankContext, RankPool, error_of

from ray_deepep import Buffer, CommFaultError, Communicator, FaultRecord
from ray_deepep.cuda import cuda_problem

DEADLINE_S = 3.0
pytestmark = [
    pytest.mark.skipif(bool(cuda_problem()), reason=f"transport cuda: {cuda_problem()}"),
    pytest.mark.skipif("CUDA_MPS_PIPE_DIRECTORY" in os.environ, reason="MPS ends its clients when one is killed"),
]


def make_buffer(context: RankContext) -> Buffer:
    torch.cuda.set_device(context.rank % torch.cuda.device_count())
    comm = context.new_communicator("cuda", deadline_s=DEADLINE_S)
    return Buffer(comm, num_experts=4, hidden=128, num_topk=2, max_tokens=64)


def dispatch(buffer: Buffer):
    x = torch.randn(64, 128, device="cuda", dtype=torch.bfloat16)
    result = buffer.dispatch(x, torch.randint(0, 4, (64, 2), device="cuda"))
    torch.cuda.synchronize()
    return result


def combine(buffer: Buffer, result) -> None:
    buffer.combine(result.x, result.handle)
    torch.cuda.synchronize()
    buffer.check()


def survivor_and_culprit(context: RankContext, how: str, operation: str) -> dict:
    buffer = make_buffer(context)
    result = dispatch(buffer)
    if context.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGSTOP)
        return {}
    start = time.monotonic()
    call = (lambda: combine(buffer, result)) if operation == "combine" else (lambda: dispatch(buffer))
    error = error_of(CommFaultError, call)
    elapsed = time.monotonic() - start
    error_of(CommFaultError, lambda: dispatch(buffer))
    buffer.comm.close()
    with Communicator.from_exchange(lambda phase, payload: [payload], rank=0, num_ranks=1) as alone:
        fresh = Buffer(alone, num_experts=4, hidden=128, num_topk=2, max_tokens=64)
        x = torch.randn(64, 128, device="cuda")
        got = fresh.dispatch(x, torch.zeros(64, 1, dtype=torch.int64, device="cuda"))
        assert alone.transport == "cuda" and torch.equal(got.x, x)
    product = torch.ones(256, 256, device="cuda") @ torch.ones(256, 256, device="cuda")
    assert product.sum().item() == 256.0**3
    return {"record": error.record.to_json(), "elapsed_s": elapsed}


CASES = [("kill", "dispatch")] * 5 + [("kill", "combine")] * 3 + [("stop", "dispatch"), ("stop", "combine")]


@pytest.mark.parametrize(("how", "operation"), CASES)
def test_culprit_is_named_and_the_context_lives(how: str, operation: str) -> None:
    with RankPool(2) as pool:
        wake = threading.Timer(DEADLINE_S + 8.0, lambda: os.kill(pool.processes[1].pid, signal.SIGCONT))
        if how == "stop":
            wake.start()
        outcomes = pool.outcomes(survivor_and_culprit, how, operation, deadline_s=60.0)
        wake.cancel()
        assert outcomes[0].value, outcomes[0].error or outcomes[0].lost
        record = FaultRecord.from_json(outcomes[0].value["record"])
        assert (record.peer, record.operation) == (1, operation)
        assert record.cause == {"kill": "peer_died", "stop": "timeout"}[how]
        assert outcomes[0].value["elapsed_s"] < DEADLINE_S + 1.0
