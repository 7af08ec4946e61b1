"""A deadline for new workers, which Ray calls without one."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

from .evidence import ANSWER_DEADLINE_S
from .processes import ProcessId, kill_process, on_nodes, process_state

logger = logging.getLogger("ray_deepep")


class StartWatch(threading.Thread):
    """Kills new workers, listed by rank, that are stopped at the deadline: Ray sees them die and starts again."""

    def __init__(self, processes: Sequence[ProcessId], deadline_s: float) -> None:
        super().__init__(daemon=True, name="ray_deepep start watch")
        self.ended = threading.Event()
        self._processes, self._deadline_s = processes, deadline_s

    def run(self) -> None:
        """Until ``ended`` is set."""
        while not self.ended.wait(self._deadline_s):
            for rank, state in enumerate(on_nodes(process_state, self._processes, ANSWER_DEADLINE_S)):
                if state == "stopped":
                    process = self._processes[rank]
                    logger.error("rank %d (%s) is stopped and did not start in time; killing it", rank, process)
                    on_nodes(kill_process, [process], ANSWER_DEADLINE_S)
