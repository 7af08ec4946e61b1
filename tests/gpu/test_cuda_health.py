"""What another thread sees and does on GPUs while the main one waits in a synchronisation; and failed assertions."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import torch
from harness import Outcome, RankContext, RankPool, error_of

from ray_deepep import Buffer, CommFaultError, FaultRecord
from ray_deepep.cuda import cuda_problem, gpu_uuid
from ray_deepep.gpu_events import GpuWatch, load_nvml
from ray_deepep.health import HealthReport, HealthThread

DEADLINE_S = 2.0
LONG_S = 30.0
pytestmark = [
    pytest.mark.skipif(bool(cuda_problem()), reason=f"transport cuda: {cuda_problem()}"),
    pytest.mark.skipif("CUDA_MPS_PIPE_DIRECTORY" in os.environ, reason="MPS ends its clients when one is killed"),
]
NUM_TOKENS, HIDDEN = 64, 128


def ready(context: RankContext, deadline_s: float):
    """A buffer and a plan; the next operation along it only launches, so that the host waits in torch."""
    torch.cuda.set_device(context.rank % torch.cuda.device_count())
    comm = context.new_communicator("cuda", deadline_s=deadline_s)
    buffer = Buffer(comm, num_experts=4, hidden=HIDDEN, num_topk=2, max_tokens=NUM_TOKENS)
    x = torch.randn(NUM_TOKENS, HIDDEN, device="cuda")
    experts = torch.tensor([[0, 2]], device="cuda").expand(NUM_TOKENS, 2).contiguous()
    result = buffer.dispatch(x, experts)
    torch.cuda.synchronize()
    return buffer, x, result.handle


def told_amid_synchronize(context: RankContext, how: int, deadline_s: float) -> dict:
    """Rank 1 goes. Rank 0's main thread waits for its kernels; its health thread tells what they report."""
    buffer, x, handle = ready(context, deadline_s)
    if context.rank == 1:
        os.kill(os.getpid(), how)
        return {}
    told: list[tuple[float, HealthReport]] = []
    begin = time.monotonic()
    thread = HealthThread(buffer.comm, lambda report: told.append((time.monotonic() - begin, report)))
    thread.start()
    buffer.comm.progress.phase = "forward"
    buffer.dispatch(x, handle=handle)
    torch.cuda.synchronize()
    synchronized_s = time.monotonic() - begin
    time.sleep(0.5)
    thread.stop()
    error = error_of(CommFaultError, lambda: buffer.dispatch(x, handle=handle))
    buffer.comm.close()
    assert buffer.fault_record() is None, "nothing is read from memory that was freed"
    seconds, report = next((s, r) for s, r in told if r.faults)
    assert report.gpu == gpu_uuid()
    return {
        "told_s": seconds,
        "synchronized_s": synchronized_s,
        "told": report.faults[0].to_json(),
        "raised": error.record.to_json(),
        "num_before": sum(s < synchronized_s for s, _ in told),
    }


def outcome_of_rank_0(*args: object) -> Outcome:
    with RankPool(2) as pool:
        return pool.outcomes(told_amid_synchronize, *args, deadline_s=60.0, doomed=(1,))[0]


def test_a_fault_is_told_while_the_main_thread_synchronizes() -> None:
    outcome = outcome_of_rank_0(signal.SIGSTOP, DEADLINE_S)
    assert outcome.value, outcome.error or outcome.lost
    told = FaultRecord.from_json(outcome.value["told"])
    assert (told.peer, told.cause, told.operation, told.phase) == (1, "timeout", "dispatch", "wait_published")
    assert told == FaultRecord.from_json(outcome.value["raised"])
    assert outcome.value["num_before"] >= 2, "signs of life came while the main thread waited"
    assert outcome.value["told_s"] < outcome.value["synchronized_s"] + 0.5


def test_a_dead_peer_ends_a_kernels_wait_long_before_the_deadline() -> None:
    outcome = outcome_of_rank_0(signal.SIGKILL, LONG_S)
    assert outcome.value, outcome.error or outcome.lost
    told = FaultRecord.from_json(outcome.value["told"])
    assert (told.peer, told.cause) == (1, "peer_died")
    assert outcome.value["synchronized_s"] < 3.0


def close_in_good_order(context: RankContext) -> float:
    """Rank 1 leaves right after an operation; rank 0, whose health thread looks all the time, must not fail it."""
    buffer, x, handle = ready(context, DEADLINE_S)
    ended = threading.Event()

    def look() -> None:
        while not ended.is_set():
            buffer.comm.give_up_on_gone_peers()

    thread = threading.Thread(target=look)
    thread.start()
    got = buffer.dispatch(x, handle=handle)
    if context.rank == 0:
        torch.cuda.synchronize()
        buffer.check()
    else:
        torch.cuda.synchronize()
    total = float((got.x.sum()).isfinite())
    ended.set()
    thread.join()
    buffer.comm.close()
    return total


def test_a_peer_that_left_in_good_order_fails_nothing() -> None:
    with RankPool(2) as pool:
        for _ in range(5):
            assert pool.run(close_in_good_order) == [1.0, 1.0]


def failed_assertion(context: RankContext) -> str:
    """An index out of range in a kernel of rank 1's: its context is lost, and it leaves."""
    buffer, x, handle = ready(context, LONG_S)
    if context.rank == 1:
        thread = HealthThread(buffer.comm, None)
        thread.start()
        error = error_of(RuntimeError, lambda: (x[torch.full((1,), 1 << 20, device="cuda")], torch.cuda.synchronize()))
        thread.stop()
        buffer.comm.close()
        return str(error)
    thread = HealthThread(buffer.comm, None)
    thread.start()
    begin = time.monotonic()
    buffer.dispatch(x, handle=handle)
    torch.cuda.synchronize()
    error = error_of(CommFaultError, buffer.check)
    assert time.monotonic() - begin < 10.0
    thread.stop()
    return error.record.to_json()


def test_a_failed_assertion_ends_the_others_waits() -> None:
    with RankPool(2) as pool:
        victim, culprit = pool.outcomes(failed_assertion, deadline_s=60.0)
        assert "device-side assert" in culprit.value, culprit.error or culprit.lost
        record = FaultRecord.from_json(victim.value)
        assert record.peer == 1 and record.cause in ("peer_died", "peer_closed")


def test_the_driver_is_asked_for_events() -> None:
    nvml = load_nvml()
    if nvml is None:
        pytest.skip("nvidia-ml-py is not installed")
    watch = GpuWatch(gpu_uuid(), nvml)
    watch.start()
    time.sleep(1.0)
    assert watch.is_alive(), "a watch that ended has been refused; the log says why"
    assert watch.events() == ()
    watch.stop()
    assert not watch.is_alive()


def test_a_failed_assertion_in_a_training_run_is_named(tmp_path) -> None:
    pytest.importorskip("ray", reason="needs Ray")
    pytest.importorskip("deepspeed", reason="needs DeepSpeed")
    import subprocess
    import sys

    from cluster_cases import ROOT, TINY

    num_workers = min(2, torch.cuda.device_count())  # each has a GPU of its own
    command = [sys.executable, "-m", "train.ray_main", *TINY, "--out", str(tmp_path / "run"), "--max-failures", "2"]
    done = subprocess.run(
        [*command, "--workers", str(num_workers), "--inject", f"assert:rank={num_workers - 1},step=3"],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = [line for line in (done.stdout + done.stderr).splitlines() if "RAY_DEEPEP_FAULT" in line]
    assert '"cause": "device_failed"' in line and "device-side assert" in line, line
