"""Whole demos, each on a Ray of its own: what they print, and that nothing is left of them however they end."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from process_cases import processes_below, wait_until_gone

pytest.importorskip("ray", reason="the demo needs Ray")

pytestmark = pytest.mark.xdist_group("ray")
ROOT = Path(__file__).parents[1]


class Demo:
    """A demo process."""

    def __init__(self, out: Path, *arguments: str) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        command = [sys.executable, "-m", "train.demo", "--preset", "tiny", "--out", str(out), *arguments]
        self.out = out
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def wait_for(self, condition, deadline_s: float) -> None:
        end = time.monotonic() + deadline_s
        while not condition():
            assert time.monotonic() < end, f"the demo did not get there within {deadline_s:g} s"
            assert self.process.poll() is None, self.process.stdout.read()
            time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_demo_runs_both_backends_and_compares(tmp_path):
    shared_memory = set(os.listdir("/dev/shm"))
    demo = Demo(tmp_path / "demo", "--preset", "tiny")
    text, _ = demo.process.communicate(timeout=580)
    assert demo.process.returncode == 0, text
    assert re.search(r"ray_deepep +stock +ratio", text)
    for word in ("last loss", "tokens/s", "ms per step", "share of dispatch + combine"):
        assert word in text
    assert re.search(r"ray_deepep: time from submission to the first step [\d.]+ s \(job start", text)
    assert "dashboard, while it ran: http://127.0.0.1:" in text
    assert "RAY_DEEPEP_FAULT" not in text
    for name in ("loss.png", "ray_deepep/loss.png", "ray_deepep/metrics.jsonl", "stock/metrics.jsonl"):
        assert (demo.out / name).stat().st_size > 0
    losses = [
        [json.loads(line)["loss"] for line in (demo.out / backend / "metrics.jsonl").read_text().splitlines()]
        for backend in ("ray_deepep", "stock")
    ]
    assert losses[0] == losses[1], "the swapped backend is bit-equal to stock on the CPU"
    assert not [name for name in set(os.listdir("/dev/shm")) - shared_memory if "deepep" in name or "plasma" in name]


@pytest.mark.slow
def test_a_demo_that_is_ended_leaves_no_process(tmp_path):
    """Two side by side, each with a Ray of its own."""
    with socket.socket() as busy:  # another Ray's dashboard
        busy.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            busy.bind(("127.0.0.1", 8265))
            busy.listen()
        except OSError:
            pass  # there is one already
        options = ("--steps", "100000", "--backend", "ray_deepep")
        demos = {how: Demo(tmp_path / how.name, *options) for how in (signal.SIGKILL, signal.SIGTERM)}
        for how, demo in demos.items():
            log = demo.out / "job-ray_deepep.log"
            demo.wait_for(lambda log=log: log.is_file() and log.stat().st_size > 0, 120)
            pids = processes_below(demo.process.pid)
            assert len(pids) > 5
            demo.process.send_signal(how)
            assert wait_until_gone(pids, 20) == []
            text = demo.process.stdout.read()
            assert "port 8265 is busy" in text
            assert demo.process.wait(10) == (130 if how == signal.SIGTERM else -signal.SIGKILL)
