"""The examples that need two processes alone run as a reader would run them. Those on Ray: test_train_ray.py."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest
from harness import shm_problem

ROOT = pathlib.Path(__file__).parents[1]


def run_example(name: str) -> str:
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name)], capture_output=True, text=True, timeout=120, env=env
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_two_processes() -> None:
    lines = run_example("01_two_processes.py").splitlines()
    assert "[rank 1] expert 3 gets tokens [3, 4, 7, 8] and multiplies them by 1,000" in lines
    results = {int(line.split()[3]): line.split(" = ")[1] for line in lines if "went to experts" in line}
    weights, experts = (0.75, 0.25), ((0, 1), (1, 2), (2, 3), (3, 0))
    for token in range(1, 9):
        expected = sum(w * 10**e * token for w, e in zip(weights, experts[(token - 1) % 4], strict=True))
        assert results[token] == f"{expected:,.2f}"


@pytest.mark.skipif(bool(shm_problem()), reason=shm_problem() or "-")
def test_deepspeed_layer_gives_equal_losses() -> None:
    header, *steps = run_example("02_deepspeed_layer.py").splitlines()
    assert header.split() == ["step", "stock", "loss", "swapped", "loss", "equal"]
    assert len(steps) == 8
    losses = [float(step.split()[1]) for step in steps]
    assert all(step.endswith("bit for bit") for step in steps)
    assert losses[-1] < losses[0]
