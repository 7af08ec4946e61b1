"""Running a training command as a Ray job: submit, follow its log, return the result that it prints."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train.errors import ConfigError

RESULT_PREFIX = "TRAIN_RESULT"
_REPOSITORY = Path(__file__).parent.parent


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
        # Late, since it brings Ray: programs that only need RESULT_PREFIX from here do not wait for them.
        from ray_deepep import InvalidArgumentError
        from ray_deepep.cluster.jobs import JobClient

        try:
            self._client = JobClient(url)
        except InvalidArgumentError as error:
            raise ConfigError(error.argument, error.value, error.rule) from error
        self.url = self._client.url
        self.local = local
        self.head_is_here = local or self._client.head_is_here

    def run(self, command: str, log_path: Path, show: Callable[[str], None]) -> dict[str, Any]:
        """Submit `command`, hand every line of its log to `show`, return its result.

        The log is also written to `log_path`. A job that is still running when this function is left (Ctrl-C) is
        stopped. Raises JobFailedError.
        """
        from ray_deepep.cluster.jobs import JobSpec

        if self.local:
            # Before what is there already: Ray itself may have been found through it.
            path = os.pathsep.join(filter(None, [str(_REPOSITORY), os.environ.get("PYTHONPATH", "")]))
            runtime_env = {"env_vars": {"PYTHONPATH": path}}
        else:
            runtime_env = {"py_modules": [str(_REPOSITORY / "train")]}
        job_id = self._client.submit(JobSpec(command=command, runtime_env=runtime_env))
        lines: list[str] = []
        with open(log_path, "w", encoding="utf-8") as log:

            def keep(line: str) -> None:
                log.write(line + "\n")
                log.flush()
                lines.append(line)
                show(line)

            try:
                status = self._client.follow(job_id, keep)
            except BaseException:
                with contextlib.suppress(Exception):
                    self._client.stop(job_id)
                raise
        results = [line.removeprefix(RESULT_PREFIX) for line in lines if line.startswith(RESULT_PREFIX)]
        if status != "SUCCEEDED" or not results:
            raise JobFailedError(f"{reason_of(lines)} (job {job_id} {status.lower()}; its log: {log_path})")
        return json.loads(results[-1])


def reason_of(lines: list[str]) -> str:
    """The last line of a log that says what went wrong, or its last line."""
    errors = [line for line in lines if line.startswith("error:")]
    text = [line for line in lines if line.strip()]
    return errors[-1].removeprefix("error:").strip() if errors else (text or ["the job printed nothing"])[-1]
