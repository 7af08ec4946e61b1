"""Times of calls on a GPU: events of a made-up one, which ends what it was given when it is told to."""

from __future__ import annotations

import pytest

from ray_deepep import gpu_times
from ray_deepep.gpu_times import GpuTimes
from ray_deepep.telemetry import CapturedCalls, CommRecorder


class Gpu:
    """Takes a millisecond from event to event."""

    def __init__(self) -> None:
        self.num_events = self.num_recorded = self.num_done = 0
        self.capturing = False

    def event(self, *, enable_timing: bool, external: bool = False) -> Event:
        assert enable_timing
        self.num_events += 1
        return Event(self)


class Event:
    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.at = gpu, 0

    def record(self) -> None:
        self.gpu.num_recorded += 1
        self.at = self.gpu.num_recorded

    def query(self) -> bool:
        return self.at <= self.gpu.num_done

    def elapsed_time(self, end: Event) -> float:
        assert end.query(), "asked for before the GPU is there"
        return float(end.at - self.at)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    gpu = Gpu()
    monkeypatch.setattr(gpu_times.torch.cuda, "Event", gpu.event)
    monkeypatch.setattr(gpu_times.torch.cuda, "is_current_stream_capturing", lambda: gpu.capturing)
    return gpu


def call(recorder: CommRecorder, operation: str) -> None:
    recorder.add(operation, recorder.begin(), 100, on_gpu=True)


def test_calls_count_when_the_gpu_has_done_them(gpu: Gpu) -> None:
    recorder = CommRecorder(GpuTimes())
    for operation in ("dispatch", "combine", "dispatch"):
        call(recorder, operation)
    stats = recorder.stats()
    assert (stats.num_dispatch, stats.dispatch_ms, stats.combine_ms, stats.timed) == (2, 0.0, 0.0, True)
    gpu.num_done = 4
    stats = recorder.stats(reset=True)
    assert (stats.dispatch_ms, stats.combine_ms, stats.combine_bytes) == (1.0, 1.0, 100)
    gpu.num_done = 6
    stats = recorder.stats(reset=True)
    assert (stats.num_dispatch, stats.dispatch_ms, stats.combine_ms) == (0, 1.0, 0.0), "it ended after the reset"


def test_events_are_used_again_and_are_few_where_nobody_asks(gpu: Gpu) -> None:
    recorder = CommRecorder(GpuTimes())
    for _ in range(10_000):
        call(recorder, "dispatch")
        gpu.num_done = gpu.num_recorded - 4
    assert gpu.num_events < 200
    gpu.num_done = gpu.num_recorded
    assert recorder.stats().dispatch_ms == 10_000.0


def test_captured_calls_are_counted_and_not_timed(gpu: Gpu) -> None:
    recorder = CommRecorder(GpuTimes())
    gpu.capturing = True
    call(recorder, "dispatch")
    assert (gpu.num_events, recorder.stats().num_dispatch, recorder.stats().timed) == (0, 1, False)


def test_without_events_times_of_gpu_calls_are_the_hosts_and_said_to_be() -> None:
    recorder = CommRecorder()
    call(recorder, "combine")
    stats = recorder.stats()
    assert not stats.timed and 0 < stats.combine_ms < 1000.0


def replay(recorder: CommRecorder, calls: CapturedCalls) -> None:
    with recorder.replay(calls):
        for _, begin, end in calls.times.calls:
            begin.record()
            end.record()


def test_captured_calls_count_and_are_timed_at_each_replay(gpu: Gpu) -> None:
    recorder = CommRecorder(GpuTimes())
    gpu.capturing = True
    with recorder.capture() as calls:
        for operation in ("dispatch", "combine"):
            call(recorder, operation)
    gpu.capturing = False
    assert recorder.stats().num_dispatch == 0, "nothing has run"
    for _ in range(3):
        replay(recorder, calls)
        gpu.num_done = gpu.num_recorded
    stats = recorder.stats(reset=True)
    assert (stats.num_dispatch, stats.num_combine, stats.combine_bytes) == (3, 3, 300)
    assert (stats.dispatch_ms, stats.combine_ms, stats.timed) == (3.0, 3.0, True)
    assert recorder.stats().dispatch_ms == 0.0, "the last replay counted twice"


def test_a_replay_that_has_not_ended_when_the_next_one_begins_is_counted_and_not_timed(gpu: Gpu) -> None:
    recorder = CommRecorder(GpuTimes())
    with recorder.capture() as calls:
        call(recorder, "dispatch")
    for _ in range(2):
        replay(recorder, calls)
    gpu.num_done = gpu.num_recorded
    stats = recorder.stats()
    assert (stats.num_dispatch, stats.dispatch_ms, stats.timed) == (2, 1.0, False)
    recorder.forget(calls)
    assert recorder.stats().dispatch_ms == 1.0
