"""Looking at, and ending, a worker's process on whatever node it is: what no actor call can do to a stopped one."""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

logger = logging.getLogger("ray_deepep")

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessId:
    """A Ray worker process of the cluster."""

    node_id: str
    host: str
    pid: int

    @classmethod
    def of(cls, metadata: Any) -> ProcessId:
        """From Ray Train's metadata of a worker."""
        return cls(node_id=metadata.node_id, host=metadata.hostname, pid=metadata.pid)

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host}, node {self.node_id[:12]}"


def own_process() -> ProcessId:
    """The calling process; inside a Ray worker or driver."""
    return ProcessId(node_id=ray.get_runtime_context().get_node_id(), host=socket.gethostname(), pid=os.getpid())


def process_state(process: ProcessId) -> str:
    """``running``, ``stopped``, ``gone``, or ``unknown`` where there is no /proc. For a process of this node."""
    if not Path("/proc/self/stat").exists():
        return "unknown"
    try:
        text = Path(f"/proc/{process.pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return "gone"
    except PermissionError:
        return "unknown"
    letter = text[text.rindex(")") + 2]
    return "gone" if letter in "ZX" else "stopped" if letter in "Tt" else "running"


def kill_process(process: ProcessId) -> bool:
    """SIGKILL a Ray worker of this node, which ends a stopped one too. Whether one was killed."""
    try:
        # The pid may have been given to a stranger since.
        if b"ray::" not in Path(f"/proc/{process.pid}/cmdline").read_bytes():
            return False
        os.kill(process.pid, signal.SIGKILL)
    except (FileNotFoundError, ProcessLookupError):
        return False
    except PermissionError as error:
        # Of another user, so none of this run's; or /proc hides it.
        logger.warning("cannot kill %s: %s", process, error)
        return False
    return True


def on_nodes(function: Callable[[ProcessId], T], processes: Sequence[ProcessId], timeout_s: float) -> list[T | None]:
    """``function(process)`` run on each process's node, all at once; None where no answer came in ``timeout_s``."""
    here = ray.get_runtime_context().get_node_id()
    results: list[T | None] = [function(p) if p.node_id == here else None for p in processes]
    refs = {}
    for index, process in enumerate(processes):
        if process.node_id != here:
            strategy = NodeAffinitySchedulingStrategy(process.node_id, soft=False)
            task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=strategy)(function)
            refs[task.remote(process)] = index
    done, late = ray.wait(list(refs), num_returns=len(refs), timeout=timeout_s) if refs else ([], [])
    for ref in done:
        try:
            results[refs[ref]] = ray.get(ref)
        except ray.exceptions.RayError as error:
            logger.debug("no answer from the node of %s: %s", processes[refs[ref]], error)
    for ref in late:
        ray.cancel(ref, force=True)
    return results
