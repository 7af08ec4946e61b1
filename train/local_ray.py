"""A Ray of our own on this machine, which ends with the process that started it, whatever ends that one.

`LocalRay` starts a small watchdog process; the watchdog starts the Ray head, adopts every process that comes from it
(as a "subreaper"), and waits for the end of a pipe. The kernel closes that pipe when the starter is gone, SIGKILL
included; then the watchdog ends all of Ray and removes its folder.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

_DASHBOARD_PORT = 8265
_START_DEADLINE_S = 90.0
_STOP_DEADLINE_S = 5.0
_OBJECT_STORE_BYTES = 200 * 2**20
_PR_SET_CHILD_SUBREAPER = 36
_SHORT_FOLDER = "/tmp"  # Ray makes sockets below it, whose paths may have 107 characters


class LocalRayError(RuntimeError):
    """Ray did not start; the message ends with the last lines of its log."""


class LocalRay:
    """A Ray head with a dashboard on this machine. A context manager.

    Attributes:
        url: of the dashboard and of job submission.
        notes: what the user should know about this start, such as a port that was busy.
    """

    def __init__(self, *, num_workers: int) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="ray_demo_", dir=_SHORT_FOLDER))
        port, self.notes = _dashboard_port()
        self.url = f"http://127.0.0.1:{port}"
        self._set_environment()
        self._log = self._folder / "head.log"
        self._watchdog = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "train.local_ray",
                str(self._folder),
                json.dumps(self._head_command(num_workers, port)),
            ],
            stdin=subprocess.PIPE,
            cwd=Path(__file__).parent.parent,
            start_new_session=True,  # Ctrl-C in the terminal is for us; the watchdog hears of it through the pipe
        )

    def wait_until_ready(self) -> None:
        """Block until jobs can be submitted. Raises LocalRayError."""
        deadline = time.monotonic() + _START_DEADLINE_S
        while time.monotonic() < deadline:
            if self._watchdog.poll() is not None:
                raise LocalRayError(f"Ray did not start:\n{self._log_tail()}")
            # An answer that refuses (401) is an answer: it asks for the token, which job submission has.
            with contextlib.suppress(OSError):
                with contextlib.suppress(urllib.error.HTTPError):
                    urllib.request.urlopen(f"{self.url}/api/version", timeout=5).close()
                return
            time.sleep(0.1)
        raise LocalRayError(f"Ray did not start within {_START_DEADLINE_S:g} s:\n{self._log_tail()}")

    def close(self) -> None:
        """End Ray and every process that came from it."""
        if self._watchdog.stdin and not self._watchdog.stdin.closed:
            self._watchdog.stdin.close()
        self._watchdog.wait()

    def __enter__(self) -> LocalRay:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _set_environment(self) -> None:
        """For this process and all that come from it: this Ray's token, no reports to Ray's makers, no idle workers."""
        if "RAY_AUTH_MODE" not in os.environ:
            os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
            self.notes.append(f"the dashboard asks for this token: {os.environ['RAY_AUTH_TOKEN']}")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Workers of a job have an environment of their own, so spare ones without it would start in vain.
        os.environ.setdefault("RAY_prestart_worker_first_driver", "0")

    def _head_command(self, num_workers: int, dashboard_port: int) -> list[str]:
        free = _free_ports(3)
        options = {
            "port": free[0],
            "ray-client-server-port": free[1],
            "dashboard-agent-listen-port": free[2],
            "dashboard-port": dashboard_port,
            "num-cpus": max(4, num_workers + 2, os.cpu_count() or 1),
            "object-store-memory": _OBJECT_STORE_BYTES,
            "temp-dir": self._folder,
        }
        start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
        return start + [f"--{name}={value}" for name, value in options.items()]

    def _log_tail(self) -> str:
        with contextlib.suppress(OSError):
            return "\n".join(self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        return "(no log)"


def _dashboard_port() -> tuple[int, list[str]]:
    """Ray's usual port, or a free one and a note that says so."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", _DASHBOARD_PORT))
        except OSError:
            port = _free_ports(1)[0]
            return port, [f"port {_DASHBOARD_PORT} is busy (another Ray?); this Ray's dashboard is on port {port}"]
    return _DASHBOARD_PORT, []


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("", 0))
        return [each.getsockname()[1] for each in sockets]


# The watchdog


def watch(command: list[str], folder: Path) -> int:
    """Run `command` until it ends or stdin does; then end all that came from it and remove `folder`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os.close(0))
    _adopt_orphans()
    with open(folder / "head.log", "wb") as log:
        head = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        _wait_for_end(head)
        head.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            head.wait(_STOP_DEADLINE_S)
    _kill_descendants()
    failed = head.returncode not in (0, -signal.SIGTERM, 128 + signal.SIGTERM, None)
    time.sleep(1.0 if failed else 0.0)  # the starter reads the log of a head that failed
    shutil.rmtree(folder, ignore_errors=True)
    return 1 if failed else 0


def _adopt_orphans() -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _wait_for_end(head: subprocess.Popen) -> None:
    """Return when the head ends, or the starter does (stdin is then readable, and empty)."""
    while head.poll() is None:
        try:
            readable, _, _ = select.select([0], [], [], 0.5)
            if readable and not os.read(0, 1):
                return
        except OSError:
            return


def _kill_descendants() -> None:
    """SIGKILL until nothing is left: a process may start another while it is being killed."""
    deadline = time.monotonic() + _STOP_DEADLINE_S
    while time.monotonic() < deadline:
        found = list(_descendants(os.getpid()))
        if not found:
            return
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.05)


def _descendants(root: int) -> Iterator[int]:
    """Living processes below `root`, by /proc; none where there is no /proc."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            fields = entry.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            if fields[0] not in "ZX":
                parents.setdefault(int(fields[1]), []).append(int(entry.parent.name))
    stack = [root]
    while stack:
        for child in parents.get(stack.pop(), []):
            stack.append(child)
            yield child


if __name__ == "__main__":
    sys.exit(watch(json.loads(sys.argv[2]), Path(sys.argv[1])))
