"""``HealthThread``: looks after one rank while its main thread waits in a collective, for a GPU, or for ever.

It reads fault records where kernels and the core leave them, ends waits for processes that are gone, and hands what it
knows to whoever supervises the job: at once when there is something new, else as a sign of life twice a second.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from .errors import FaultRecord
from .gpu_events import GpuEvent, GpuWatch
from .progress import Beacon

if TYPE_CHECKING:
    from .communicator import Communicator

logger = logging.getLogger("ray_deepep")

LOOK_EVERY_S = 0.1
SEND_EVERY_S = 0.5
STOP_DEADLINE_S = 2.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class HealthReport:
    """What one rank tells its supervisor."""

    beacon: Beacon
    faults: tuple[FaultRecord, ...] = ()
    """Faults of its buffers; ranks count within the EP group."""
    gpu: str = ""
    """UUID of the GPU that it uses; empty if it uses none."""
    gpu_events: tuple[GpuEvent, ...] = ()

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str, silent_s: float = 0.0) -> HealthReport:
        """Inverse of :meth:`to_json`, for a report that came ``silent_s`` seconds ago."""
        fields = json.loads(text)
        return cls(
            beacon=Beacon(**fields["beacon"] | {"silent_s": silent_s}),
            faults=tuple(FaultRecord(**fault) for fault in fields["faults"]),
            gpu=fields["gpu"],
            gpu_events=tuple(GpuEvent(**event) for event in fields["gpu_events"]),
        )


class HealthThread(threading.Thread):
    """One per worker, a daemon.

    Args:
        communicator: of the worker's EP group.
        send: gets a report; called on this thread. It should not wait, and whatever it raises is logged once.
            None: nobody supervises; the thread only ends waits.
        gpu_watch: events of the worker's GPU, if somebody watches them.
        send_every_s: how often to tell when there is nothing new.
    """

    def __init__(
        self,
        communicator: Communicator,
        send: Callable[[HealthReport], None] | None,
        *,
        gpu_watch: GpuWatch | None = None,
        send_every_s: float = SEND_EVERY_S,
    ) -> None:
        super().__init__(daemon=True, name="ray_deepep health")
        self._communicator, self._send, self._gpu_watch = communicator, send, gpu_watch
        self._send_every_s = send_every_s
        self._gpu = communicator.peers[communicator.rank].gpu
        self._ended = threading.Event()
        self._complained = False

    def run(self) -> None:
        """Look until :meth:`stop`, then send a last report."""
        known, next_send = None, 0.0
        while not self._ended.wait(LOOK_EVERY_S):
            self._communicator.give_up_on_gone_peers()
            report = self.report()
            news = (report.faults, report.gpu_events)
            if news != known or time.monotonic() >= next_send:
                known, next_send = news, time.monotonic() + self._send_every_s
                self._tell(report)
        self._tell(self.report())

    def report(self) -> HealthReport:
        """What there is to tell now."""
        return HealthReport(
            beacon=self._communicator.progress.beacon(),
            faults=self._communicator.fault_records(),
            gpu=self._gpu,
            gpu_events=() if self._gpu_watch is None else self._gpu_watch.events(),
        )

    def stop(self) -> None:
        """End the thread, after a last report; returns within a deadline whether it ended or not."""
        self._ended.set()
        if self._gpu_watch is not None:
            self._gpu_watch.stop()
        if self.is_alive() and self is not threading.current_thread():
            self.join(STOP_DEADLINE_S)

    def _tell(self, report: HealthReport) -> None:
        if self._send is None:
            return
        try:
            self._send(report)
        except Exception as error:  # supervision must not end the thread that also ends waits
            if not self._complained:
                self._complained = True
                logger.warning("health reports do not get through: %s: %s", type(error).__name__, error)
