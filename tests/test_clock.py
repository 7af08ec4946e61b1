"""The clock of a step: on CPUs by the host's time, on GPUs by events that the host waits for when times are read."""

from __future__ import annotations

import time

import pytest

pytest.importorskip("deepspeed", reason="train/ needs DeepSpeed")

from train import clock


class Event:
    """One of a GPU whose queue takes a millisecond from event to event."""

    waits = 0
    recorded = 0

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing
        self.at_ms: float | None = None

    def record(self) -> None:
        Event.recorded += 1
        self.at_ms = float(Event.recorded)

    def synchronize(self) -> None:
        assert self.at_ms is not None
        Event.waits += 1

    def elapsed_time(self, end: Event) -> float:
        assert Event.waits, "times are asked for before the device is there"
        return end.at_ms - self.at_ms


class Gpu:
    Event = Event

    def is_synchronized_device(self) -> bool:
        return False


def test_laps_on_a_cpu() -> None:
    timed = clock.Clock()
    time.sleep(0.02)
    timed.lap("forward")
    timed.lap("backward")
    time.sleep(0.01)
    timed.lap("forward")
    assert timed.ms["forward"] >= 30.0 > timed.ms["backward"]
    assert timed.total_ms == pytest.approx(sum(timed.ms.values()))
    assert timed.ms["never"] == 0.0


def test_the_host_waits_once_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "get_accelerator", Gpu)
    monkeypatch.setattr(Event, "waits", 0)
    timed = clock.Clock()
    for name in ("forward", "backward", "forward"):
        timed.lap(name)
    assert Event.waits == 0
    assert (timed.ms["forward"], timed.ms["backward"], timed.total_ms) == (2.0, 1.0, 3.0)
    assert Event.waits == 1
    timed.lap("optimizer")
    assert (timed.ms["optimizer"], timed.total_ms, Event.waits) == (1.0, 4.0, 2)


def test_spans_are_booked_by_name_and_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "get_accelerator", Gpu)
    monkeypatch.setattr(Event, "waits", 0)
    spans = clock.Spans()
    for name in ("dispatch", "combine", "dispatch"):
        with spans.during(name):
            pass
    assert Event.waits == 0, "the host does not wait for what it times"
    assert spans.take() == {"dispatch": [1.0, 1.0], "combine": [1.0]}
    assert (Event.waits, spans.take(), Event.waits) == (1, {}, 1)


def test_spans_on_a_cpu() -> None:
    spans = clock.Spans()
    with spans.during("dispatch"):
        time.sleep(0.02)
    assert spans.take()["dispatch"][0] >= 20.0
