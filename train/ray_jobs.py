"""Running a command as a Ray job: submit, follow its log, return the result that it prints."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import socket
import time
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train.errors import ConfigError

RESULT_PREFIX = "TRAIN_RESULT"
_REPOSITORY = Path(__file__).parent.parent
# "(RayTrainWorker pid=123) " and, on clusters, "(... pid=123, ip=1.2.3.4) ", with or without colours.
_WORKER_PREFIX = re.compile(r"^(\x1b\[\d+m)*\(.*?pid=.*?\)(\x1b\[0m)? ")
_FINISH_DEADLINE_S = 30.0
_SUBMIT_DEADLINE_S = 120.0
_NO_AGENT = "No available agent to submit job"
"""What Ray answers while the agents that start jobs are still on their way up."""


class JobFailedError(RuntimeError):
    """A job did not succeed; the message says what its log said last."""


class JobRunner:
    """Runs commands as jobs of one cluster.

    Args:
        url: of its dashboard; None: the cluster of RAY_ADDRESS.
        local: whether this machine is all of it: jobs then use the code here, else a copy of `train` is sent along.

    Attributes:
        url: of the cluster's dashboard.
        head_is_here: whether the head node is this machine, so that its Python is ours.

    Raises ConnectionError when there is no cluster at that address, ConfigError when it is no address.
    """

    def __init__(self, url: str | None, *, local: bool) -> None:
        from ray.job_submission import JobSubmissionClient

        logging.getLogger("ray").setLevel(logging.WARNING)  # its notes on uploads would cut through progress bars
        try:
            self._client = JobSubmissionClient(url)
        except ValueError as error:
            raise ConfigError("RAY_ADDRESS", url or os.environ.get("RAY_ADDRESS", ""), str(error)) from error
        self.url = self._client.get_address()
        self.local = local
        self.head_is_here = local or _is_here(self.url)

    def run(self, command: str, log_path: Path, show: Callable[[str], None]) -> dict[str, Any]:
        """Submit `command`, hand every line of its log to `show`, return its result.

        The log is also written to `log_path`. A job that is still running when this function is left (Ctrl-C) is
        stopped. Raises JobFailedError.
        """
        if self.local:
            runtime_env = {"env_vars": {"PYTHONPATH": str(_REPOSITORY)}}
        else:
            runtime_env = {"py_modules": [str(_REPOSITORY / "train")]}
        job_id = self._submit(command, runtime_env)
        lines: list[str] = []
        try:
            with open(log_path, "w", encoding="utf-8") as log:
                asyncio.run(self._follow(job_id, log, lines, show))
            status = self._wait_for_end(job_id)
        except BaseException:
            with contextlib.suppress(Exception):
                self._client.stop_job(job_id)
            raise
        results = [line.removeprefix(RESULT_PREFIX) for line in lines if line.startswith(RESULT_PREFIX)]
        if status != "SUCCEEDED" or not results:
            raise JobFailedError(f"{reason_of(lines)} (job {job_id} {status.lower()}; its log: {log_path})")
        return json.loads(results[-1])

    def _submit(self, command: str, runtime_env: dict[str, Any]) -> str:
        """The job's id. A Ray that has just started may take no job yet: then again, until a deadline."""
        deadline = time.monotonic() + _SUBMIT_DEADLINE_S
        while True:
            try:
                return self._client.submit_job(entrypoint=command, runtime_env=runtime_env)
            except RuntimeError as error:
                if _NO_AGENT not in str(error):
                    raise
                if time.monotonic() > deadline:
                    raise JobFailedError(f"Ray took no job within {_SUBMIT_DEADLINE_S:g} s: {error}") from error
            time.sleep(0.2)

    async def _follow(self, job_id: str, log: Any, lines: list[str], show: Callable[[str], None]) -> None:
        rest = ""
        async for chunk in self._client.tail_job_logs(job_id):
            *complete, rest = (rest + chunk).split("\n")
            for line in complete:
                log.write(line + "\n")
                log.flush()
                bare = _WORKER_PREFIX.sub("", line)
                lines.append(bare)
                show(bare)

    def _wait_for_end(self, job_id: str) -> str:
        """The job's status once its log has ended."""
        deadline = time.monotonic() + _FINISH_DEADLINE_S
        while True:
            status = self._client.get_job_status(job_id)
            if status.is_terminal() or time.monotonic() > deadline:
                return status.value
            time.sleep(0.1)


def _is_here(url: str) -> bool:
    """Whether the host of `url` is this machine."""
    host = urllib.parse.urlsplit(url).hostname or ""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind((host, 0))  # only an address of ours can be bound
        return True
    return False


def reason_of(lines: list[str]) -> str:
    """The last line of a log that says what went wrong, or its last line."""
    errors = [line for line in lines if line.startswith("error:")]
    text = [line for line in lines if line.strip()]
    return errors[-1].removeprefix("error:").strip() if errors else (text or ["the job printed nothing"])[-1]
