"""``FaultSupervisor``: runs in the Train controller, names the culprit of a fault, and puts it where it is looked for.

One ``RAY_DEEPEP_FAULT {json}`` line in the job log, the worker's error in the run's status (from which Ray makes the
attempt's error and, when no retry is left, the exception), and the metric ``ray_deepep_faults``.

A stopped process (SIGSTOP) answers nothing and dies of nothing. The supervisor finds it wherever it stopped, in a
collective that has no deadline as in the start of the workers, and kills it so that a restart need not wait for it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ray.train.v2._internal.exceptions import UserExceptionWithTraceback, WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.util.metrics import Counter

from ..errors import FAULT_LOG_PREFIX, RayDeepEPError
from .culprit import Culprit, RankState, RankStatus, decide_culprit
from .evidence import ANSWER_DEADLINE_S, find_culprit, stopped_ranks
from .expert_parallel import ExpertParallelConfig, worker_processes
from .processes import ProcessId, kill_process, on_nodes, process_state

logger = logging.getLogger("ray_deepep")

_SETTLE_S = 1.0
"""A fault reaches the ranks within milliseconds of each other, not at once."""


class WorkerFaultError(RayDeepEPError, RuntimeError):
    """The error of a worker that is to blame for a fault and has none of its own (it was stopped or late)."""

    def __init__(self, culprit: Culprit) -> None:
        self.culprit = culprit
        super().__init__(str(culprit))

    def __reduce__(self):
        return type(self), (self.culprit,)


class FaultSupervisor(ControllerCallback, WorkerGroupCallback):
    """See the module. Loaded through ``RAY_TRAIN_CALLBACKS``; inactive in runs without ``ExpertParallelConfig``."""

    def __init__(self) -> None:
        self._config: ExpertParallelConfig | None = None
        self._run_name = ""
        self._attempt = 0
        self._group: Any = None
        self._reported = False
        self._stopped_since: dict[int, float] = {}
        self._start_watch: _StartWatch | None = None

    def after_controller_start(self, train_run_context) -> None:
        if isinstance(train_run_context.backend_config, ExpertParallelConfig):
            self._config = train_run_context.backend_config
            self._run_name = train_run_context.get_run_config().name
            self._counter = Counter("ray_deepep_faults", "Faults by cause and culprit", tag_keys=("cause", "rank"))

    def before_init_train_context(self, workers) -> dict[str, list[Any]]:
        """Ray now calls its new workers without a deadline; keep one for it until they train."""
        if self._config is not None:
            self._end_start_watch()
            processes = [ProcessId.of(worker.metadata) for worker in workers]
            self._start_watch = _StartWatch(processes, self._config.comm.bootstrap_deadline_s)
            self._start_watch.start()
        return {}

    def after_worker_group_training_start(self, worker_group) -> None:
        self._end_start_watch()

    def before_worker_group_shutdown(self, worker_group) -> None:
        self._end_start_watch()

    def _end_start_watch(self) -> None:
        if self._start_watch is not None:
            self._start_watch.ended.set()
            self._start_watch = None

    def after_worker_group_start(self, worker_group) -> None:
        self._group = worker_group
        self._attempt += 1
        self._reported = False
        self._stopped_since = {}

    def after_worker_group_poll_status(self, worker_group_status) -> None:
        if self._config is None or self._reported:
            return
        statuses = worker_group_status.worker_statuses
        culprit = self._find(statuses) if worker_group_status.errors else self._long_stopped()
        self._reported = culprit is not None or bool(worker_group_status.errors)
        if culprit is not None:
            self._report(culprit)
            statuses[culprit.world_rank].error = with_culprit(statuses[culprit.world_rank].error, culprit)

    def _find(self, statuses: Mapping[int, Any]) -> Culprit | None:
        culprit = find_culprit(self._group, statuses, self._config.ep_size)
        if culprit is None or culprit.cause not in ("died", "stopped", "raised"):
            time.sleep(_SETTLE_S)
            culprit = find_culprit(self._group, statuses, self._config.ep_size)
        return culprit

    def _long_stopped(self) -> Culprit | None:
        """A rank that has been stopped for a communicator's deadline while nobody else noticed."""
        # Ray keeps the polls that hang; without them only the ranks' own deadlines would find a stopped one.
        silent = sorted(getattr(self._group, "_world_rank_to_ongoing_poll", {}))
        now, stopped = time.monotonic(), set(stopped_ranks(self._group, silent))
        self._stopped_since = {rank: self._stopped_since.get(rank, now) for rank in stopped}
        overdue = [rank for rank, since in self._stopped_since.items() if now - since > self._config.comm.deadline_s]
        if not overdue:
            return None
        process = worker_processes(self._group)[min(overdue)]
        status = RankStatus(state=RankState.STOPPED, host=process.host, node_id=process.node_id, pid=process.pid)
        return decide_culprit([], {min(overdue): status})

    def _report(self, culprit: Culprit) -> None:
        line = culprit.to_json(run=self._run_name, attempt=self._attempt)
        print(f"{FAULT_LOG_PREFIX} {line}", flush=True)
        self._counter.inc(tags={"cause": culprit.cause, "rank": str(culprit.world_rank)})
        if culprit.cause == "stopped":
            process = ProcessId(node_id=culprit.node_id, host=culprit.host, pid=culprit.pid)
            on_nodes(kill_process, [process], ANSWER_DEADLINE_S)


def with_culprit(error: Exception | None, culprit: Culprit) -> Exception:
    """The culprit's error with the verdict in front, of the same type, so that Ray treats it as before."""
    if isinstance(error, UserExceptionWithTraceback):
        return UserExceptionWithTraceback(error._base_exc, f"{culprit}\n{error._traceback_str}")
    if isinstance(error, WorkerHealthCheckFailedError):
        return WorkerHealthCheckFailedError(f"{culprit}\n{error._message}", error.health_check_failure)
    return WorkerFaultError(culprit)


class _StartWatch(threading.Thread):
    """Kills new workers, listed by rank, that are stopped at the deadline: Ray sees them die and starts again."""

    def __init__(self, processes: Sequence[ProcessId], deadline_s: float) -> None:
        super().__init__(daemon=True, name="ray_deepep start watch")
        self.ended = threading.Event()
        self._processes, self._deadline_s = processes, deadline_s

    def run(self) -> None:
        while not self.ended.wait(self._deadline_s):
            for rank, state in enumerate(on_nodes(process_state, self._processes, ANSWER_DEADLINE_S)):
                if state == "stopped":
                    process = self._processes[rank]
                    logger.error("rank %d (%s) is stopped and did not start in time; killing it", rank, process)
                    on_nodes(kill_process, [process], ANSWER_DEADLINE_S)
