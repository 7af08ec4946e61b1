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
import random
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
_ABOVE_RAYS_WORKERS = 20000  # its workers listen from 10002 to 19999
_PORT_ATTEMPTS = 100
_START_DEADLINE_S = 120.0
_STOP_DEADLINE_S = 5.0
_WATCHDOG_DEADLINE_S = 30.0
"""More than twice what the watchdog takes at most: _STOP_DEADLINE_S for the head, as much for the rest."""
_OBJECT_STORE_BYTES = 200 * 2**20
_PR_SET_CHILD_SUBREAPER = 36
_SHORT_FOLDER = "/tmp"  # Ray makes sockets below it, whose paths may have 107 characters


class LocalRayError(RuntimeError):
    """Ray did not start; the message ends with the last lines of its log."""


class LocalRay:
    """A Ray head with a dashboard on this machine. A context manager: entering it blocks until jobs can be submitted.

    Attributes:
        url: of the dashboard and of job submission.
        address: for ``ray.init`` in a process of this machine.
        notes: what the user should know about this start, such as a port that was busy.

    Raises LocalRayError when Ray does not start, with the end of its log.
    """

    def __init__(self, *, num_workers: int) -> None:
        self.notes: list[str] = []
        self.address = ""
        self._num_workers = num_workers
        self._watchdog: subprocess.Popen | None = None
        self._set_environment()

    def __enter__(self) -> LocalRay:
        try:
            self._start(_dashboard_port(self.notes))
            if not self._wait_until_ready():
                # Most likely another Ray took a port between our look and its start.
                self.close()
                self._start(_free_ports(1)[0])
                if not self._wait_until_ready():
                    raise LocalRayError(f"Ray did not start:\n{self._last_words()}")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """End Ray and every process that came from it."""
        if self._watchdog is not None:
            if not self._watchdog.stdin.closed:
                self._watchdog.stdin.close()
            try:
                self._watchdog.wait(_WATCHDOG_DEADLINE_S)
            except subprocess.TimeoutExpired:
                self._end_watchdog()

    def _end_watchdog(self) -> None:
        """It does not end, so it is stopped or stuck: end all that came from it, then it, and tidy up in its place."""
        _kill_descendants(self._watchdog.pid)
        self._watchdog.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._watchdog.wait(_STOP_DEADLINE_S)
        shutil.rmtree(self._folder, ignore_errors=True)
        self.notes.append(f"the watchdog of Ray did not end within {_WATCHDOG_DEADLINE_S:g} s; it was killed")

    def _start(self, dashboard_port: int) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="ray_demo_", dir=_SHORT_FOLDER))
        self.url = f"http://127.0.0.1:{dashboard_port}"
        command = [sys.executable, "-m", "train.local_ray", str(self._folder)]
        self._watchdog = subprocess.Popen(
            [*command, json.dumps(self._head_command(dashboard_port))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parent.parent,
            text=True,
            start_new_session=True,  # Ctrl-C in the terminal is for us; the watchdog hears of it through the pipe
        )

    def _wait_until_ready(self) -> bool:
        """False if the head ended instead, or the deadline passed."""
        deadline = time.monotonic() + _START_DEADLINE_S
        while time.monotonic() < deadline and self._watchdog.poll() is None:
            if self._session_at_url() == (self._folder / "session_latest").resolve().name:
                return True
            time.sleep(0.1)
        return False

    def _session_at_url(self) -> str | None:
        """Name of the Ray that answers at our address: it could be another one."""
        token = os.environ.get("RAY_AUTH_TOKEN", "")
        request = urllib.request.Request(f"{self.url}/api/version", headers={"Authorization": f"Bearer {token}"})
        with contextlib.suppress(OSError, ValueError), urllib.request.urlopen(request, timeout=5) as answer:
            return json.load(answer).get("session_name")
        return None

    def _last_words(self) -> str:
        self.close()
        return self._watchdog.stdout.read() or "(no log)"

    def _set_environment(self) -> None:
        """For this process and all that come from it: this Ray's token, no reports to Ray's makers, no idle workers."""
        if "RAY_AUTH_MODE" not in os.environ:
            os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
            self.notes.append(f"the dashboard asks for this token: {os.environ['RAY_AUTH_TOKEN']}")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Workers of a job have an environment of their own, so spare ones without it would start in vain.
        os.environ.setdefault("RAY_prestart_worker_first_driver", "0")

    def _head_command(self, dashboard_port: int) -> list[str]:
        free = _free_ports(2)
        self.address = f"127.0.0.1:{free[0]}"
        options = {
            "port": free[0],
            "ray-client-server-port": free[1],
            "dashboard-agent-listen-port": 0,  # it binds late, and if its port is taken by then no job ever starts
            "dashboard-port": dashboard_port,
            "num-cpus": max(4, self._num_workers + 2, os.cpu_count() or 1),
            "object-store-memory": _OBJECT_STORE_BYTES,
            "temp-dir": self._folder,
        }
        start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
        return start + [f"--{name}={value}" for name, value in options.items()]


def _dashboard_port(notes: list[str]) -> int:
    """Ray's usual port, or a free one and a note that says so."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", _DASHBOARD_PORT))
        except OSError:
            port = _free_ports(1)[0]
            notes.append(f"port {_DASHBOARD_PORT} is busy (another Ray?); this Ray's dashboard is on port {port}")
            return port
    return _DASHBOARD_PORT


def _free_ports(count: int) -> list[int]:
    """Free ports that no connection is given by itself: one of those may be gone before Ray listens on it."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            _bind_somewhere(each)
        return [each.getsockname()[1] for each in sockets]


def _bind_somewhere(each: socket.socket) -> None:
    ports = range(_ABOVE_RAYS_WORKERS, _first_given_port())
    for port in random.sample(ports, min(len(ports), _PORT_ATTEMPTS)):
        with contextlib.suppress(OSError):
            return each.bind(("", port))
    each.bind(("", 0))


def _first_given_port() -> int:
    """Where the ports begin that the system gives to connections; 0 where it does not say."""
    try:
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()[0])
    except (OSError, ValueError, IndexError):
        return 0


# The watchdog


def watch(command: list[str], folder: Path) -> int:
    """Run `command` until it ends or stdin does; then end all that came from it and remove `folder`.

    Prints the end of the command's log if it ended by itself.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os.close(0))
    _adopt_orphans()
    with open(folder / "head.log", "wb") as log:
        head = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        ended_by_itself = _wait_for_end(head)
        head.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            head.wait(_STOP_DEADLINE_S)
    _kill_descendants(os.getpid())
    if ended_by_itself:
        with contextlib.suppress(OSError):
            lines = (folder / "head.log").read_text(encoding="utf-8", errors="replace").splitlines()
            print("\n".join(lines[-15:]), flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    return 1 if ended_by_itself else 0


def _adopt_orphans() -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _wait_for_end(head: subprocess.Popen) -> bool:
    """Wait until the head ends (True), or the starter does (False; stdin is then readable, and empty)."""
    while head.poll() is None:
        try:
            readable, _, _ = select.select([0], [], [], 0.5)
            if readable and not os.read(0, 1):
                return False
        except OSError:
            return False
    return True


def _kill_descendants(root: int) -> None:
    """SIGKILL all below ``root`` until nothing is left: a process may start another while it is being killed."""
    deadline = time.monotonic() + _STOP_DEADLINE_S
    while time.monotonic() < deadline:
        found = list(_descendants(root))
        if not found:
            return
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        # Only the watchdog has no other children.
        with contextlib.suppress(ChildProcessError):
            while root == os.getpid() and os.waitpid(-1, os.WNOHANG)[0]:
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
