"""Events of a GPU through NVML, with a module that stands in for it."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest

from ray_deepep import gpu_events
from ray_deepep.gpu_events import GpuEvent, GpuWatch, event_of, watch_gpu

WAIT_S = 20.0


class NVMLError(Exception):
    pass


class NVMLError_Timeout(NVMLError):
    pass


class FakeNvml:
    """As much of ``pynvml`` as a watch uses. ``events`` are given out one per wait; what is an exception is raised."""

    NVMLError, NVMLError_Timeout = NVMLError, NVMLError_Timeout
    nvmlEventTypeXidCriticalError, nvmlEventTypeDoubleBitEccError, nvmlEventTypeSingleBitEccError = 8, 2, 1

    def __init__(self, *events: object, supported: int = 0xFF, start_error: Exception | None = None) -> None:
        self.pending, self.supported, self.start_error = list(events), supported, start_error
        self.calls: list[tuple] = []
        self.never = threading.Event()

    def nvmlInit(self) -> None:
        if self.start_error is not None:
            raise self.start_error
        self.calls.append(("init",))

    def nvmlShutdown(self) -> None:
        self.calls.append(("shutdown",))

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        self.calls.append(("handle", uuid))
        return "handle"

    def nvmlDeviceGetSupportedEventTypes(self, handle: str) -> int:
        return self.supported

    def nvmlEventSetCreate(self) -> str:
        return "set"

    def nvmlDeviceRegisterEvents(self, handle: str, types: int, events: str) -> None:
        self.calls.append(("register", types))

    def nvmlEventSetWait_v2(self, events: str, timeout_ms: int) -> object:
        if not self.pending:
            self.never.wait(timeout_ms / 1e3)
            raise NVMLError_Timeout
        event = self.pending.pop(0)
        if isinstance(event, Exception):
            raise event
        return event

    def nvmlEventSetFree(self, events: str) -> None:
        self.calls.append(("free",))


def xid(code: int) -> SimpleNamespace:
    return SimpleNamespace(eventType=8, eventData=code)


def watched(nvml: FakeNvml, uuid: str = "1234", num_events: int = 0) -> GpuWatch:
    watch = GpuWatch(uuid, nvml)
    watch.start()
    end = time.monotonic() + WAIT_S
    while len(watch.events()) < num_events:
        assert time.monotonic() < end
        time.sleep(0.01)
    return watch


def test_events_are_kept_in_order_and_everything_is_given_back():
    nvml = FakeNvml(xid(13), NVMLError_Timeout(), SimpleNamespace(eventType=2, eventData=0), xid(79))
    watch = watched(nvml, num_events=3)
    assert [(event.kind, event.code) for event in watch.events()] == [("xid", 13), ("ecc", 0), ("xid", 79)]
    watch.stop()
    assert not watch.is_alive()
    assert nvml.calls == [("init",), ("handle", "GPU-1234"), ("register", 10), ("free",), ("shutdown",)]


def test_a_gpu_without_ecc_is_watched_for_the_rest():
    nvml = FakeNvml(xid(31), supported=8)
    watched(nvml, "GPU-1", num_events=1).stop()
    assert ("handle", "GPU-1") in nvml.calls and ("register", 8) in nvml.calls


@pytest.mark.parametrize(
    "nvml", [FakeNvml(start_error=NVMLError("Driver Not Loaded")), FakeNvml(NVMLError("GPU is lost"))]
)
def test_an_error_of_nvml_is_said_and_ends_the_watch(nvml, caplog):
    caplog.set_level("INFO", "ray_deepep")
    watch = GpuWatch("1", nvml)
    watch.start()
    watch.join(WAIT_S)
    assert not watch.is_alive() and watch.events() == ()
    said = [record.message for record in caplog.records if "not watched" in record.message]
    assert len(said) == 1 and ("Driver Not Loaded" in said[0] or "GPU is lost" in said[0])


def test_a_call_that_hangs_holds_up_nobody(monkeypatch):
    monkeypatch.setattr(gpu_events, "STOP_DEADLINE_S", 0.1)

    class HangingNvml(FakeNvml):
        def nvmlEventSetWait_v2(self, events: str, timeout_ms: int) -> object:
            self.never.wait()
            raise NVMLError_Timeout

    nvml = HangingNvml()
    watch = watched(nvml)
    begin = time.monotonic()
    watch.stop()
    assert time.monotonic() - begin < WAIT_S / 2
    assert watch.daemon, "it must not keep the process alive"
    nvml.never.set()


def test_without_nvml_one_line_says_so(monkeypatch, caplog):
    caplog.set_level("INFO", "ray_deepep")
    monkeypatch.setattr(gpu_events, "load_nvml", lambda: None)
    assert watch_gpu("GPU-1") is None
    assert ["nvidia-ml-py is not installed" in record.message for record in caplog.records] == [True]
    assert watch_gpu("") is None, "a rank without a GPU has nothing to watch"
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("code", "is_hardware", "text"),
    [
        (79, True, "Xid 79: the GPU has fallen off the bus"),
        (48, True, "uncorrectable memory error"),
        (74, True, "NVLink error"),
        (13, False, "exception in a kernel"),
        (31, False, "not mapped"),
        (45, False, "cleaned up"),
        (999, False, "Xid 999: see NVIDIA's Xid catalogue"),
    ],
)
def test_what_an_xid_says(code, is_hardware, text):
    event = event_of(FakeNvml(), xid(code), 1.0)
    assert event.is_hardware == is_hardware
    assert text in str(event)


def test_memory_errors_are_the_hardwares():
    event = event_of(FakeNvml(), SimpleNamespace(eventType=2, eventData=0), 1.0)
    assert event == GpuEvent(kind="ecc", code=0, time_s=1.0) and event.is_hardware
    assert event_of(FakeNvml(), SimpleNamespace(eventType=1, eventData=0), 1.0) is None
