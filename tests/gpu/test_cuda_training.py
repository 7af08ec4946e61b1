"""Short training runs on GPUs under torchrun, both backends: two ranks, which share a GPU where there is but one.

tests/gpu/run.sh tests/gpu/test_cuda_training.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ray_deepep.cuda import cuda_problem

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed here")
pytestmark = pytest.mark.skipif(bool(cuda_problem()), reason=f"transport cuda: {cuda_problem()}")

ROOT = Path(__file__).resolve().parents[2]
NUM_STEPS = 8


def train(out: Path, backend: str, **fields: object) -> list[float]:
    """Losses of a run, one a step."""
    from train.metrics import read_metrics

    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    options = ["train.main", "--preset", "tiny", "--backend", backend, "--steps", str(NUM_STEPS), "--out", str(out)]
    fields = {"run.checkpoint_every": 0, "run.eval_every": 0, "run.sample_tokens": 0, **fields}
    done = subprocess.run(
        [*launch, *options, "--set", *(f"{name}={value}" for name, value in fields.items())],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    metrics = read_metrics(out / "metrics.jsonl")
    assert all(step.comm_calls > 0 for step in metrics)
    return [step.loss for step in metrics]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("dtype", "zero_stage", "rel"),
    # Grouped experts, which bfloat16 has on GPUs, add up in another order.
    [("fp32", 0, 1e-4), ("bf16", 1, 2e-2)],
)
def test_both_backends_learn_the_same(tmp_path: Path, dtype: str, zero_stage: int, rel: float) -> None:
    fields = {"model.dtype": dtype, "optim.zero_stage": zero_stage, "model.hidden": 64, "model.expert_hidden": 64}
    stock = train(tmp_path / "stock", "stock", **fields)
    swapped = train(tmp_path / "swapped", "ray_deepep", **fields)
    assert len(stock) == len(swapped) == NUM_STEPS
    assert swapped == pytest.approx(stock, rel=rel)
    assert swapped[-1] < swapped[0]
