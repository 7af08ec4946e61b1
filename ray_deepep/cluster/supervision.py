"""``FaultSupervisor``: runs in the Train controller, names the culprit of a fault, and puts it where it is looked for.

One ``RAY_DEEPEP_FAULT {json}`` line in the job log, the worker's error in the run's status (from which Ray makes the
attempt's error and, when no retry is left, the exception), and the metric ``ray_deepep_faults_total``.

It hears of a fault from Ray, or from the health thread of a worker whose main thread still waits. A stopped process
(SIGSTOP) answers nothing and dies of nothing. The supervisor finds it wherever it stopped, in a collective that has no
deadline as in the start of the workers, and kills it so that a restart need not wait for it. A node that is gone takes
no connection, long before Ray's health checks give it up.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

import ray
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback, WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.util.metrics import Counter

from ..errors import FAULT_LOG_PREFIX, RayDeepEPError
from ..health import HealthReport
from . import worker
from .board import BoardSender, make_board, read_board
from .culprit import Culprit, RankState
from .decision import decide_culprit, decide_hung
from .evidence import ANSWER_DEADLINE_S, gather_evidence, look, rank_status, silent_states
from .expert_parallel import ExpertParallelConfig, worker_processes
from .metrics import PREFIX
from .processes import ProcessId, kill_process, on_nodes
from .start_watch import StartWatch

logger = logging.getLogger("ray_deepep")

_SETTLE_S = 1.0
"""A fault reaches the ranks within milliseconds of each other, not at once."""
_ENDING_S = 5.0
"""For a rank that has left its communicator to say why: it may still be on its way out of the training function."""
_CERTAIN = ("node_died", "died", "stopped", "gpu_failed", "out_of_memory", "device_failed", "mismatch", "raised")
"""Causes that need no second look."""


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
        self._board: ray.actor.ActorHandle | None = None
        self._group: Any = None
        self._reported = False
        self._stopped_since: dict[int, float] = {}
        self._start_watch: StartWatch | None = None

    def after_controller_start(self, train_run_context) -> None:
        if isinstance(train_run_context.backend_config, ExpertParallelConfig):
            self._config = train_run_context.backend_config
            self._run_name = train_run_context.get_run_config().name
            self._counter = Counter(f"{PREFIX}faults", "Faults by cause and culprit", tag_keys=("run", "rank", "cause"))
            self._board = make_board()

    def before_init_train_context(self, workers) -> dict[str, list[Any]]:
        """Ray now calls its new workers without a deadline; keep one for it until they train."""
        if self._config is not None:
            self._end_start_watch()
            processes = [ProcessId.of(worker.metadata) for worker in workers]
            self._start_watch = StartWatch(processes, self._config.comm.bootstrap_deadline_s)
            self._start_watch.start()
        return {}

    def after_worker_group_training_start(self, worker_group) -> None:
        self._end_start_watch()
        if self._board is not None:
            # Nobody waits for the answers: a worker that gives none is found by other means.
            for rank in range(len(worker_group)):
                sender = BoardSender(board=self._board, attempt=self._attempt, world_rank=rank)
                worker_group.execute_single_async(rank, worker.watch_health, sender)

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
        statuses, reports = worker_group_status.worker_statuses, self._reports()
        if worker_group_status.errors or any(report.faults for report in reports.values()):
            culprit = self._find(statuses, reports)
        else:
            culprit = self._silent(reports) or self._hung(statuses, reports)
        self._reported = culprit is not None or bool(worker_group_status.errors)
        if culprit is not None:
            self._report(culprit)
            statuses[culprit.world_rank].error = with_culprit(statuses[culprit.world_rank].error, culprit)

    def _reports(self) -> Mapping[int, HealthReport]:
        return read_board(self._board, self._attempt, ANSWER_DEADLINE_S)

    def _find(self, statuses: Mapping[int, Any], reports: Mapping[int, HealthReport]) -> Culprit | None:
        culprit, runs = self._decide(statuses, reports)
        # Dead to its peers, and its process runs: the error that made it leave has not arrived yet.
        leaving = culprit is not None and (culprit.cause == "closed" or (culprit.cause == "died" and runs))
        if culprit is None or leaving or culprit.cause not in _CERTAIN:
            time.sleep(_SETTLE_S)
            if leaving:
                self._ask_for_error(culprit.world_rank, statuses[culprit.world_rank])
            culprit, _ = self._decide(statuses, self._reports() or reports)
        return culprit

    def _ask_for_error(self, rank: int, status: Any) -> None:
        """Fill in the error of a rank that had none when Ray polled it."""
        if status.error is None and status.running:
            answer = self._group.execute_single_async(rank, worker.raised_within, _ENDING_S)
            try:
                status.error = ray.get(answer, timeout=_ENDING_S + ANSWER_DEADLINE_S)
            except ray.exceptions.RayError as error:
                logger.debug("rank %d does not say why it left: %s", rank, error)

    def _decide(self, statuses: Mapping[int, Any], reports: Mapping[int, HealthReport]) -> tuple[Culprit | None, bool]:
        """Whom to blame, and whether that rank seems to run."""
        ep_size = self._config.ep_size_of(len(self._group))
        evidence = gather_evidence(self._group, statuses, reports, ep_size)
        logger.debug("evidence: %s", evidence.to_json())
        culprit = decide_culprit(evidence.faults, evidence.statuses)
        runs = culprit is not None and evidence.statuses[culprit.world_rank].state is RankState.RUNNING
        return culprit, runs

    def _silent(self, reports: Mapping[int, HealthReport]) -> Culprit | None:
        """Of the ranks that answer no poll, one that is gone, or has been stopped for a communicator's deadline."""
        # Ray keeps the polls that hang; without them only the ranks' own deadlines, or Ray's, would find such a rank.
        states = silent_states(self._group, sorted(getattr(self._group, "_world_rank_to_ongoing_poll", {})))
        now, stopped = time.monotonic(), [rank for rank, state in states.items() if state is RankState.STOPPED]
        self._stopped_since = {rank: self._stopped_since.get(rank, now) for rank in stopped}
        soon = {rank for rank, since in self._stopped_since.items() if now - since <= self._config.comm.deadline_s}
        processes = worker_processes(self._group)
        known = {
            rank: rank_status(state, processes[rank], report=reports.get(rank))
            for rank, state in states.items()
            if rank not in soon
        }
        if not known:
            return None
        # The others are no suspects, but what they do belongs into the report.
        others = [rank for rank in range(len(processes)) if rank in reports and rank not in states]
        known |= {rank: rank_status(RankState.RUNNING, processes[rank], report=reports[rank]) for rank in others}
        return decide_culprit([], known)

    def _hung(self, statuses: Mapping[int, Any], reports: Mapping[int, HealthReport]) -> Culprit | None:
        """The slowest rank, where no rank has moved for ``hang_deadline_s``."""
        if not self._config.hang_deadline_s:
            return None
        processes = worker_processes(self._group)
        known = {
            rank: rank_status(look(status, None)[0], processes[rank], report=reports.get(rank))
            for rank, status in statuses.items()
        }
        return decide_hung(known, self._config.hang_deadline_s)

    def _report(self, culprit: Culprit) -> None:
        line = culprit.to_json(run=self._run_name, attempt=self._attempt, time_s=time.time())
        print(f"{FAULT_LOG_PREFIX} {line}", flush=True)
        append_fault(self._config.fault_log, line)
        self._counter.inc(tags={"run": self._run_name, "rank": str(culprit.world_rank), "cause": culprit.cause})
        if culprit.cause == "stopped":
            process = ProcessId(node_id=culprit.node_id, host=culprit.host, pid=culprit.pid)
            on_nodes(kill_process, [process], ANSWER_DEADLINE_S)


def append_fault(path: str, line: str) -> None:
    """Add ``line`` to the file of ``ExpertParallelConfig.fault_log``, if there is one; a warning if that fails."""
    if not path:
        return
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        logger.warning("fault_log: %s", error)


def with_culprit(error: Exception | None, culprit: Culprit) -> Exception:
    """The culprit's error with the verdict in front, of the same type, so that Ray treats it as before."""
    if isinstance(error, UserExceptionWithTraceback):
        return UserExceptionWithTraceback(error._base_exc, f"{culprit}\n{error._traceback_str}")
    if isinstance(error, WorkerHealthCheckFailedError):
        return WorkerHealthCheckFailedError(f"{culprit}\n{error._message}", error.health_check_failure)
    return WorkerFaultError(culprit)
