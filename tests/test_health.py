"""What a rank tells while its main thread waits: progress, fault records, and the thread that sends them."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from harness import RankContext, RankPool, Ranks, error_of, shm_problem

from ray_deepep import Beacon, Buffer, CommFaultError, FaultRecord, MismatchError, Progress, TokenMajor
from ray_deepep.gpu_events import GpuEvent
from ray_deepep.health import HealthReport, HealthThread

needs_shm = pytest.mark.skipif(bool(shm_problem()), reason=shm_problem())
DEADLINE_S = 1.0
WAIT_S = 20.0

RECORD = FaultRecord(
    operation="dispatch",
    sequence=3,
    phase="wait_published",
    cause="timeout",
    rank=0,
    peer=1,
    expected=3,
    seen=2,
    elapsed_s=1.0,
    deadline_s=1.0,
)


class FakePeer:
    gpu = "GPU-0"


class FakeCommunicator:
    """As much of a communicator as the thread asks for."""

    rank, peers = 0, (FakePeer(),)

    def __init__(self) -> None:
        self.progress = Progress()
        self.records: tuple[FaultRecord, ...] = ()
        self.num_looks = 0

    def fault_records(self) -> tuple[FaultRecord, ...]:
        return self.records

    def give_up_on_gone_peers(self) -> None:
        self.num_looks += 1


class Inbox:
    """Keeps reports; ``wait_for`` waits until one fits."""

    def __init__(self) -> None:
        self.reports: list[HealthReport] = []
        self._came = threading.Condition()

    def __call__(self, report: HealthReport) -> None:
        with self._came:
            self.reports.append(report)
            self._came.notify_all()

    def wait_for(self, fits) -> HealthReport:
        with self._came:
            assert self._came.wait_for(lambda: any(map(fits, self.reports)), WAIT_S), self.reports
            return next(filter(fits, self.reports))


def test_progress_is_read_as_a_whole():
    progress = Progress()
    assert progress.beacon().where == "no step or phase told"
    progress.step, progress.phase = 7, "forward"
    time.sleep(0.05)
    beacon = progress.beacon()
    assert (beacon.step, beacon.phase) == (7, "forward") and beacon.age_s >= 0.05
    progress.phase = "forward"
    assert progress.beacon().age_s < beacon.age_s, "set again is progress too"
    told = Beacon(step=7, phase="data", age_s=4.0, silent_s=0.5)
    assert told.stood_s == 4.5
    assert str(told) == "step 7, phase data for 4.0 s, told 0.5 s ago"


def test_a_report_survives_json():
    event = GpuEvent(kind="xid", code=79, time_s=1.5)
    beacon = Beacon(step=2, phase="data", age_s=0.25)
    report = HealthReport(beacon=beacon, faults=(RECORD,), gpu="GPU-0", gpu_events=(event,))
    assert HealthReport.from_json(report.to_json()) == report
    assert HealthReport.from_json(report.to_json(), silent_s=3.0).beacon.silent_s == 3.0


def test_a_fault_is_told_at_once_and_the_end_too():
    communicator, inbox = FakeCommunicator(), Inbox()
    thread = HealthThread(communicator, inbox)
    thread.start()
    communicator.progress.phase = "forward"
    inbox.wait_for(lambda report: report.beacon.phase == "forward")
    communicator.records = (RECORD,)
    assert inbox.wait_for(lambda report: report.faults).gpu == "GPU-0"
    communicator.progress.phase = "last"
    thread.stop()
    assert not thread.is_alive()
    assert inbox.reports[-1].beacon.phase == "last"
    assert communicator.num_looks > 0
    assert thread.daemon, "it must not keep a process alive"


def test_who_cannot_be_told_does_not_end_the_thread(caplog):
    communicator = FakeCommunicator()

    def refuse(report: HealthReport) -> None:
        raise ConnectionError("nobody there")

    thread = HealthThread(communicator, refuse)
    thread.start()
    communicator.records = (RECORD,)
    looks = communicator.num_looks
    end = time.monotonic() + WAIT_S
    while communicator.num_looks < looks + 5:
        assert time.monotonic() < end
        time.sleep(0.01)
    thread.stop()
    complaints = [record for record in caplog.records if "do not get through" in record.message]
    assert len(complaints) == 1 and "nobody there" in complaints[0].message


def make_buffer(context: RankContext, deadline_s: float = DEADLINE_S) -> Buffer:
    comm = context.new_communicator("shm", deadline_s=deadline_s)
    return Buffer(comm, num_experts=2 * context.num_ranks, hidden=16, num_topk=2, max_tokens=64)


def dispatch(buffer: Buffer):
    topk_idx = torch.randint(0, buffer.geometry.num_experts, (32, 2))
    return buffer.dispatch(torch.randn(32, 16), topk_idx, layout=TokenMajor())


def told_while_waiting(context: RankContext) -> list:
    """Rank 1 is late. Rank 0 waits for it inside dispatch, with a health thread; then rank 1 never comes."""
    buffer, inbox = make_buffer(context), Inbox()
    progress = buffer.comm.progress
    progress.step, progress.phase = 5, "forward"
    dispatch(buffer)
    if context.rank == 1:
        time.sleep(DEADLINE_S * 0.7)
        dispatch(buffer)
        time.sleep(DEADLINE_S * 3)
        return []
    thread = HealthThread(buffer.comm, inbox)
    thread.start()
    dispatch(buffer)
    waiting = inbox.wait_for(lambda report: report.beacon.phase == "dispatch")
    after = progress.beacon()
    nothing = buffer.fault_record(), buffer.comm.fault_records()
    result = []
    main = threading.Thread(target=lambda: result.append(error_of(CommFaultError, lambda: dispatch(buffer))))
    main.start()
    # Told by the thread, though the one that waits raises nothing yet, or nobody looks at what it raised.
    told = inbox.wait_for(lambda report: report.faults).faults
    main.join()
    own = buffer.fault_record()
    buffer.comm.close()
    thread.stop()
    assert nothing == (None, ())
    assert told == (result[0].record,) == (own,) == buffer.comm.fault_records()
    assert result[0].record.peer_pid == buffer.comm.peers[1].pid
    return [waiting.beacon.step, after.step, after.phase, inbox.reports[-1].beacon.phase]


@needs_shm
def test_a_rank_tells_where_it_waits_and_what_it_found():
    with RankPool(2) as pool:
        found = pool.outcomes(told_while_waiting, deadline_s=30.0)[0]
        assert found.value == [5, 5, "forward", "dispatch"], found.error


def phases_after_errors(context: RankContext, transport: str) -> list[str]:
    """The phase that the program set is back after errors that it can go on from."""
    comm = context.communicator(transport)
    progress, sizes = comm.progress, {"num_experts": 4, "hidden": 16, "num_topk": 2, "max_tokens": 64}
    x, idx = torch.ones(4, 16), torch.zeros(4, 2, dtype=torch.int64)
    progress.phase = "setup"
    # A mismatch of sizes, of a dispatch, of a combine and of weights; then all agree again.
    error_of(MismatchError, lambda: Buffer(comm, **{**sizes, "hidden": 16 << context.rank}))
    found = [progress.phase]
    with Buffer(comm, **sizes) as buffer:
        progress.phase = "forward"
        odd = x.half() if context.rank else x
        error_of(MismatchError, lambda: buffer.dispatch(odd, idx))
        found.append(progress.phase)
        result = buffer.dispatch(x, idx)
        reduce = ("exact", "fast")[context.rank]
        error_of(MismatchError, lambda: buffer.combine(result.x, result.handle, reduce=reduce))
        found.append(progress.phase)
        weights = torch.ones(len(result.x), 2)
        other = buffer.dispatch(x, idx).handle if context.rank else (buffer.dispatch(x, idx), result.handle)[1]
        error_of(MismatchError, lambda: buffer.combine_weights(weights, other))
        found.append(progress.phase)
    progress.phase = ""
    return found


def test_the_phase_is_back_after_an_error_that_one_can_go_on_from(ranks: Ranks, transport: str):
    assert ranks.run(2, phases_after_errors, transport) == [["setup", "forward", "forward", "forward"]] * 2


def looked_at_while_closing(context: RankContext) -> int:
    """Another thread looks all the time while buffers and communicators come and go."""
    num_looks, ended = 0, threading.Event()
    comms: list = []

    def look() -> None:
        nonlocal num_looks
        while not ended.is_set():
            for comm in list(comms):
                assert comm.fault_records() == ()
                comm.give_up_on_gone_peers()
                num_looks += 1

    thread = threading.Thread(target=look)
    thread.start()
    for _ in range(20):
        # The thread that looks takes all the time it can get: with a busy machine that may be more than a second.
        buffer = make_buffer(context, deadline_s=20.0)
        comms.append(buffer.comm)
        dispatch(buffer)
        torch.distributed.barrier()
        buffer.comm.close()
    ended.set()
    thread.join()
    return num_looks


@needs_shm
def test_looking_beside_close_is_safe():
    with RankPool(2) as pool:
        assert all(looks > 20 for looks in pool.run(looked_at_while_closing))
