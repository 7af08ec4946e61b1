"""Jobs of a Ray cluster: submit a command, follow its log, ask how it is, stop it. Every call has a deadline."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import logging
import queue
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient, JobType
from ray.util.state import list_nodes

from .. import env, job_log
from ..errors import ClusterUnreachableError, InvalidArgumentError, UnknownJobError
from ..run_state import RunState, state_of_job
from .stop import STOP_WAIT_VARIABLE

T = TypeVar("T")

_CONNECT_S = 10.0
_ANSWER_S = 30.0
_UPLOAD_S = 600.0
_SETTLE_S = 30.0
_AGENT_S = 60.0
_NO_AGENT = "No available agent"
_AGENTLESS = (
    "its head does, but it has had no agent to run jobs with for {:.0f} s. Most often the port of the agent "
    "(`ray start --dashboard-agent-listen-port`) was taken: dashboard_agent.log on the head node tells"
)
_LOOK_EVERY_S = 0.2
_PENDING_S = 30.0
_LOG_ATTEMPTS = 5
_MAX_SHOWN = 8
_CHATTY = ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk")


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobSpec:
    """What to run, and what it needs."""

    command: str
    """For a shell on one of the cluster's nodes."""
    runtime_env: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """As Ray's: ``working_dir``, ``py_modules``, ``env_vars`` and others."""
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
    num_cpus: float = 0.0
    """Of the entry point alone; its workers ask for theirs themselves."""
    num_gpus: float = 0.0
    memory: int = 0
    """Bytes."""
    resources: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Others, by name."""
    job_id: str = ""
    """Empty: Ray makes one."""
    stop_wait_s: int = 120
    """How long the job may take to end when it is stopped, before it is killed."""

    def __post_init__(self) -> None:
        if not self.command.strip():
            raise InvalidArgumentError("command", self.command, "must not be empty")
        for name in ("num_cpus", "num_gpus", "memory", "stop_wait_s"):
            if not getattr(self, name) >= 0:
                raise InvalidArgumentError(name, getattr(self, name), "must be >= 0")

    @property
    def wanted(self) -> dict[str, float]:
        """What a single node must have."""
        named = {"CPU": self.num_cpus, "GPU": self.num_gpus, "memory": self.memory, **self.resources}
        return {name: float(amount) for name, amount in named.items() if amount}


class _Rest:
    """Hands lines on, but for the first ``skip``, which were shown before."""

    def __init__(self, show: Callable[[str], None], skip: int) -> None:
        self._show, self._skip, self.seen = show, skip, 0

    def __call__(self, line: str) -> None:
        self.seen += 1
        if self.seen > self._skip:
            self._show(line)


class JobClient:
    """Jobs of one cluster.

    Args:
        address: ``http://HEAD:8265``, or as for ``ray.init``; None: ``RAY_ADDRESS``, or the cluster of this machine.

    Attributes:
        url: of the cluster's dashboard.
        head_is_here: whether the head node is this machine, so that its Python is ours.

    Raises:
        InvalidArgumentError: it is no address.
        ClusterUnreachableError: no cluster answers there, within 10 s.
    """

    def __init__(self, address: str | None = None) -> None:
        self._address = address or env.ray_address() or "the address of this machine's cluster"
        try:
            self._client = self._bounded(lambda: JobSubmissionClient(address), _CONNECT_S)
        except ValueError as error:
            raise InvalidArgumentError("address" if address else "RAY_ADDRESS", self._address, str(error)) from error
        for name in _CHATTY:  # notes on uploads and sockets would cut through progress bars and logs
            logging.getLogger(name).setLevel(logging.WARNING)
        self.url: str = self._client.get_address()
        self.head_is_here = _is_here(self.url)

    def submit(self, spec: JobSpec, *, check: bool = True) -> str:
        """Submit and return the job's id. check: refuse what no node of the cluster has now.

        Raises:
            InvalidArgumentError: no node has what the entry point asks for, the id is taken, or Ray refuses.
            ClusterUnreachableError: it does not answer any more, or has nothing to run jobs with after 60 s.
        """
        if check and spec.wanted:
            check_resources(spec.wanted, self.nodes())
        runtime_env = dict(spec.runtime_env)
        waits = {STOP_WAIT_VARIABLE: str(int(spec.stop_wait_s))}
        runtime_env["env_vars"] = waits | dict(runtime_env.get("env_vars", {}))
        submit = functools.partial(
            self._client.submit_job,
            entrypoint=spec.command,
            runtime_env=runtime_env,
            metadata=dict(spec.metadata),
            submission_id=spec.job_id or None,
            entrypoint_num_cpus=spec.num_cpus or None,
            entrypoint_num_gpus=spec.num_gpus or None,
            entrypoint_memory=spec.memory or None,
            entrypoint_resources=dict(spec.resources) or None,
        )
        deadline = time.monotonic() + _AGENT_S
        while True:
            try:
                return self._bounded(submit, _UPLOAD_S)
            except (ValueError, RuntimeError) as error:
                if _NO_AGENT not in str(error):
                    raise InvalidArgumentError("job", spec.job_id or spec.command, _last_line(error)) from error
                # A head that has just started takes requests before it can run jobs.
                if time.monotonic() > deadline:
                    raise ClusterUnreachableError(self.url, _AGENTLESS.format(_AGENT_S)) from error
            time.sleep(_LOOK_EVERY_S)

    def follow(self, job_id: str, show: Callable[[str], None]) -> str:
        """Hand every line of a job's log to ``show``, without what Ray writes before it; returns the job's status.

        It waits as long as the job runs, and says every half minute that it has not started, if so, and what Ray says
        about that. A log that breaks off while the job runs is taken up again where it was.
        """
        shown = 0
        for _ in range(_LOG_ATTEMPTS):
            rest = _Rest(show, skip=shown)
            broken: Exception | None = None
            try:
                asyncio.run(self._follow(job_id, rest, show))
            except (OSError, RuntimeError) as error:
                broken = error
            shown = max(shown, rest.seen)
            status = self.wait(job_id, _SETTLE_S if broken is None else 0.0)
            if JobStatus(status).is_terminal():
                return status
        reason = "it ended" if broken is None else _last_line(broken)
        raise ClusterUnreachableError(self.url, f"the log of {job_id} broke off {_LOG_ATTEMPTS} times: {reason}")

    async def _follow(self, job_id: str, show: Callable[[str], None], say: Callable[[str], None]) -> None:
        """``say`` takes what stands in no log."""
        waiting = asyncio.ensure_future(self._say_while_pending(job_id, say))
        try:
            rest = ""
            async for chunk in self._client.tail_job_logs(job_id):
                *complete, rest = (rest + chunk).split("\n")
                for line in complete:
                    show(job_log.bare(line))
            if rest:
                show(job_log.bare(rest))
        finally:
            waiting.cancel()

    async def _say_while_pending(self, job_id: str, say: Callable[[str], None]) -> None:
        begin = time.monotonic()
        while True:
            await asyncio.sleep(_PENDING_S)
            try:
                details = await asyncio.to_thread(self._details, job_id)
            except (OSError, RuntimeError, LookupError):
                continue  # whoever follows the log hears of it
            if details.status is not JobStatus.PENDING:
                return
            say(f"waiting: {job_id} has not started after {time.monotonic() - begin:.0f} s: {details.message}")

    def wait(self, job_id: str, deadline_s: float) -> str:
        """The job's status (``SUCCEEDED``, ...) once it has ended, or after ``deadline_s`` seconds."""
        deadline = time.monotonic() + deadline_s
        while True:
            status = self._details(job_id).status
            if status.is_terminal() or time.monotonic() > deadline:
                return status.value
            time.sleep(_LOOK_EVERY_S)

    def stop(self, job_id: str) -> None:
        """Ask a job to stop. Returns at once; :meth:`wait` tells when it has."""
        self._details(job_id)
        self._bounded(lambda: self._client.stop_job(job_id))

    def state(self, job_id: str) -> RunState:
        """How a job is, running or ended."""
        return self._state(self._details(job_id))

    def states(self) -> list[RunState]:
        """Of all jobs that were submitted, oldest first. Ray forgets those that ended when its head node does."""
        jobs = [job for job in self._bounded(self._client.list_jobs) if job.type is JobType.SUBMISSION]
        return [self._state(job) for job in sorted(jobs, key=lambda job: job.start_time or 0)]

    def nodes(self) -> list[dict[str, float]]:
        """Resources of every node that is alive. A head that has just started knows of none for some seconds."""
        deadline = time.monotonic() + _SETTLE_S
        while True:
            found = self._bounded(lambda: list_nodes(address=self.url, limit=10_000, timeout=int(_ANSWER_S)))
            alive = [dict(node.resources_total or {}) for node in found if node.state == "ALIVE"]
            if alive or time.monotonic() > deadline:
                return alive
            time.sleep(_LOOK_EVERY_S)

    def _state(self, job: JobDetails) -> RunState:
        log = ""
        with contextlib.suppress(RuntimeError):  # a job that never began, or whose node is gone
            log = self._bounded(lambda: self._client.get_job_logs(job.submission_id)) or ""
        return state_of_job(
            job.submission_id,
            job.status.value,
            job_log.read(log.split("\n")),
            message=job.message or "",
            metadata=job.metadata,
        )

    def _details(self, job_id: str) -> JobDetails:
        try:
            return self._ask(lambda: self._client.get_job_info(job_id))
        except RuntimeError as error:
            if "404" not in str(error):
                raise
        known = [job.submission_id for job in self._bounded(self._client.list_jobs) if job.submission_id]
        raise UnknownJobError(job_id, self.url, known[-_MAX_SHOWN:])

    def _ask(self, question: Callable[[], T]) -> T:
        """As ``_bounded``, for what changes nothing: asked again, for a while, where the connection breaks."""
        deadline = time.monotonic() + _SETTLE_S
        while True:
            try:
                return self._bounded(question)
            except ClusterUnreachableError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(_LOOK_EVERY_S)

    def _bounded(self, call: Callable[[], T], deadline_s: float = _ANSWER_S) -> T:
        """``call()`` with a deadline. Ray's client has none: a host that swallows packets would hold it for ever."""
        answers: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

        def run() -> None:
            try:
                answers.put((call(), None))
            except BaseException as error:  # raised again in the caller's thread
                answers.put((None, error))

        threading.Thread(target=run, daemon=True, name="ray_deepep job client").start()
        try:
            value, error = answers.get(timeout=deadline_s)
        except queue.Empty:
            raise ClusterUnreachableError(self._address, f"no answer within {deadline_s:g} s") from None
        if isinstance(error, OSError):  # requests' errors are some
            raise ClusterUnreachableError(self._address, _last_line(error)) from error
        if error is not None:
            raise error
        return value


def check_resources(wanted: Mapping[str, float], nodes: list[dict[str, float]]) -> None:
    """Raise InvalidArgumentError if no node has all of ``wanted``: such a job would wait for ever, and say nothing."""
    if not nodes:  # none has come up yet: nothing can be said about them
        return
    if any(all(node.get(name, 0.0) >= amount for name, amount in wanted.items()) for node in nodes):
        return
    most = {name: max((node.get(name, 0.0) for node in nodes), default=0.0) for name in wanted}
    has = ", ".join(f"{amount:g} {name}" for name, amount in most.items())
    asks = ", ".join(f"{amount:g} {name}" for name, amount in wanted.items())
    rule = f"must fit on one node; the {len(nodes)} nodes of the cluster have at most {has}"
    raise InvalidArgumentError("entry point's resources", asks, rule)


def _is_here(url: str) -> bool:
    """Whether the host of ``url`` is this machine."""
    host = urllib.parse.urlsplit(url).hostname or ""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind((host, 0))  # only an address of ours can be bound
        return True
    return False


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
