"""Looking at processes and nodes, without a Ray: what the system refuses is an answer, not an exception."""

from __future__ import annotations

import errno
import itertools
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="ray_deepep.cluster needs Ray")

from ray_deepep.cluster import nodes
from ray_deepep.cluster.nodes import reachable
from ray_deepep.cluster.processes import ProcessId, kill_process, process_state


def of_this_node(pid: int) -> ProcessId:
    return ProcessId(node_id="n", host="h", pid=pid)


def refuse(*_: object) -> None:
    raise PermissionError(1, "Operation not permitted")


@pytest.fixture
def worker():
    """A process that looks like a worker of Ray's."""
    code = "import time; print(flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code, "ray::Worker"], stdout=subprocess.PIPE)
    process.stdout.readline()  # the arguments of a process that is just being started are not in /proc yet
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_worker_is_killed_and_a_stranger_is_not(worker):
    assert kill_process(of_this_node(worker.pid)) is True
    assert worker.wait(10) == -9
    assert kill_process(of_this_node(os.getpid())) is False


def test_a_process_that_may_not_be_killed_is_not_an_exception(monkeypatch, caplog, worker):
    with monkeypatch.context() as refusing:
        refusing.setattr(os, "kill", refuse)
        assert kill_process(of_this_node(worker.pid)) is False
    assert f"cannot kill pid {worker.pid} on h" in caplog.text


def test_a_process_that_may_not_be_looked_at_is_unknown(monkeypatch, worker):
    with monkeypatch.context() as refusing:
        refusing.setattr(Path, "read_bytes", refuse)
        refusing.setattr(Path, "read_text", refuse)
        assert kill_process(of_this_node(worker.pid)) is False
        assert process_state(of_this_node(worker.pid)) == "unknown"


@pytest.fixture
def listener():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()


def test_a_node_that_answers_is_there_though_this_process_slept(monkeypatch, listener):
    """All of the time may pass before its answer is looked at, on a machine that starts many workers."""
    clock = itertools.count(step=10.0)
    monkeypatch.setattr(nodes.time, "monotonic", lambda: next(clock))
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = server.getsockname()
    assert reachable({"node": listener, "gone": closed}, 1.0) == {"node"}


def test_what_this_machine_lacks_says_nothing_of_a_node(monkeypatch, listener):
    monkeypatch.setattr(socket.socket, "connect_ex", lambda *_: errno.EADDRNOTAVAIL)
    assert reachable({"node": listener}, 1.0) == {"node"}
    monkeypatch.setattr(socket.socket, "connect_ex", lambda *_: errno.ECONNREFUSED)
    assert reachable({"node": listener}, 1.0) == set()


def test_an_address_that_is_refused_at_once_is_not_reachable():
    """TCP cannot be spoken with a broadcast address, and the system says so before anything is sent."""
    address = ("255.255.255.255", 9)
    with socket.socket() as probe:
        probe.setblocking(False)
        assert probe.connect_ex(address) != 0
    assert reachable({"broadcast": address}, 0.5) == set()
