"""What the driver says about a GPU on its own account: Xid errors and uncorrectable memory errors, through NVML.

Needs the module of ``nvidia-ml-py`` (``pip install ray-deepep[gpu]``); without it a log line says that nobody watches.
Meanings are those of NVIDIA's Xid catalogue, https://docs.nvidia.com/deploy/xid-errors.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
import threading
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

logger = logging.getLogger("ray_deepep")

_WAIT_MS = 100
STOP_DEADLINE_S = 2.0
_MAX_EVENTS = 32

_HARDWARE: Mapping[int, str] = MappingProxyType(
    {
        48: "uncorrectable memory error",
        61: "internal microcontroller breakpoint",
        62: "internal microcontroller halt",
        64: "memory row remapping failed",
        74: "NVLink error",
        79: "the GPU has fallen off the bus",
        94: "contained uncorrectable memory error",
        95: "uncontained uncorrectable memory error",
        119: "the GPU's system processor timed out",
        120: "error of the GPU's system processor",
        140: "unrecovered memory error",
    }
)
_PROGRAM: Mapping[int, str] = MappingProxyType(
    {
        13: "exception in a kernel, such as an illegal instruction or a failed assertion",
        31: "a kernel read or wrote an address that is not mapped",
        43: "a program's channel was reset after an error of its own",
        45: "channels were cleaned up after an earlier error or a killed program",
        63: "a memory row is to be remapped",
        69: "a kernel was given a bad command",
        92: "many corrected memory errors",
    }
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GpuEvent:
    """One event of a GPU."""

    kind: str
    """``xid`` or ``ecc``."""
    code: int
    """The Xid; 0 for ``ecc``."""
    time_s: float
    """When it was seen, seconds since the epoch."""

    @property
    def is_hardware(self) -> bool:
        """Whether the GPU is to blame, rather than a program on it."""
        return self.kind == "ecc" or self.code in _HARDWARE

    def __str__(self) -> str:
        if self.kind == "ecc":
            return "uncorrectable memory error (ECC)"
        meaning = _HARDWARE.get(self.code) or _PROGRAM.get(self.code) or "see NVIDIA's Xid catalogue"
        return f"Xid {self.code}: {meaning}"


def load_nvml() -> Any | None:
    """The module ``pynvml``, None where it is not installed."""
    try:
        return importlib.import_module("pynvml")
    except ImportError:
        return None


def event_of(nvml: Any, data: Any, time_s: float) -> GpuEvent | None:
    """What NVML's event data says; None for events that nobody asked for."""
    if data.eventType == nvml.nvmlEventTypeXidCriticalError:
        return GpuEvent(kind="xid", code=int(data.eventData), time_s=time_s)
    if data.eventType == nvml.nvmlEventTypeDoubleBitEccError:
        return GpuEvent(kind="ecc", code=0, time_s=time_s)
    return None


class GpuWatch(threading.Thread):
    """Collects the events of one GPU from when it starts; a daemon of its own, because NVML may hang with its GPU.

    Args:
        uuid: of the GPU, with or without ``GPU-`` in front.
        nvml: the module ``pynvml``, or what behaves like it.
    """

    def __init__(self, uuid: str, nvml: Any) -> None:
        super().__init__(daemon=True, name="ray_deepep gpu events")
        self._uuid = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
        self._nvml = nvml
        self._events: tuple[GpuEvent, ...] = ()
        self._ended = threading.Event()

    def events(self) -> tuple[GpuEvent, ...]:
        """Those seen so far, the oldest first; never waits."""
        return self._events

    def run(self) -> None:
        """Wait for events until :meth:`stop`; a GPU or driver that has none is said in one line."""
        try:
            self._nvml.nvmlInit()
        except self._nvml.NVMLError as error:
            logger.info("GPU events are not watched: NVML does not start: %s", error)
            return
        try:
            self._watch()
        except self._nvml.NVMLError as error:
            logger.info("GPU events of %s are not watched: %s", self._uuid, error)
        finally:
            self._nvml.nvmlShutdown()

    def stop(self) -> None:
        """End the thread; returns within a deadline whether it ended or not."""
        self._ended.set()
        if self.is_alive():
            self.join(STOP_DEADLINE_S)

    def _watch(self) -> None:
        nvml = self._nvml
        handle = nvml.nvmlDeviceGetHandleByUUID(self._uuid)
        wanted = nvml.nvmlEventTypeXidCriticalError | nvml.nvmlEventTypeDoubleBitEccError
        # GPUs without ECC refuse to be asked for it.
        wanted &= nvml.nvmlDeviceGetSupportedEventTypes(handle)
        events = nvml.nvmlEventSetCreate()
        try:
            nvml.nvmlDeviceRegisterEvents(handle, wanted, events)
            while not self._ended.is_set():
                try:
                    data = nvml.nvmlEventSetWait_v2(events, _WAIT_MS)
                except nvml.NVMLError_Timeout:
                    continue
                event = event_of(nvml, data, time.time())
                if event is not None:
                    logger.error("GPU %s: %s", self._uuid, event)
                    self._events = (*self._events, event)[-_MAX_EVENTS:]
        finally:
            nvml.nvmlEventSetFree(events)


def watch_gpu(uuid: str, *, log: Callable[[str], None] = logger.info) -> GpuWatch | None:
    """A started watch over a GPU; None where there is none, and where NVML is missing, which ``log`` is told."""
    if not uuid:
        return None
    nvml = load_nvml()
    if nvml is None:
        log("GPU events are not watched: nvidia-ml-py is not installed (pip install ray-deepep[gpu])")
        return None
    watch = GpuWatch(uuid, nvml)
    watch.start()
    return watch
