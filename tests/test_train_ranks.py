"""Whole runs of two processes with a group that exists: the same numbers after a resume and on the swapped backend."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from harness import RankPool, shm_problem
from train_cases import (
    HALF,
    SilentComm,
    gradient_norms,
    losses,
    tiny,
    train,
    train_error,
    train_until,
    train_with_broken_gradients,
)

from train.metrics import read_metrics


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [{"optim.zero_stage": 0}, {"optim.zero_stage": 1}, {"optim.zero_stage": 2, "optim.grad_accum": 2}],
    ids=["zero0", "zero1", "zero2_accum"],
)
def test_resume_is_bit_identical(ranks, resumers, tmp_path, fields):
    """Losses, rates, sample text and weights of a run resumed by new processes are those of an undisturbed run."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    results = ranks.run(2, train, tiny(whole, **fields).to_json(), deadline_s=120)
    assert all(summary["ep_size"] == 2 for summary, _ in results)
    assert results[0][1] == results[1][1]  # callbacks hear the same on every rank
    middle = whole / "checkpoints" / "step_000004"
    again = resumers.run(train, tiny(resumed, **fields, **{"run.resume_from": str(middle)}).to_json(), deadline_s=120)
    assert again[0][0]["resumed_from_step"] == HALF
    assert losses(resumed) == losses(whole)
    assert again[1][0]["sample"] == results[0][0]["sample"] == (whole / "sample.txt").read_text()[:-1]
    assert weights(resumed) == weights(whole)


@pytest.fixture(scope="module")
def resumers():
    """Processes that have not seen the run they resume."""
    with RankPool(2) as pool:
        yield pool


def weights(out: Path) -> dict[str, list]:
    """Every tensor of the last checkpoint's dense and expert files."""
    import torch

    found = {}
    for path in sorted((out / "checkpoints" / "step_000008").glob("*model_states.pt")):
        raw = torch.load(path, map_location="cpu", weights_only=False)
        tensors = raw.get("module", raw)
        found |= {f"{path.name}/{k}": v.tolist() for k, v in tensors.items() if torch.is_tensor(v)}
    assert any("expert_3" in name for name in found)
    return found


def test_a_stop_that_one_rank_hears_of_ends_all_after_the_same_step(ranks, tmp_path):
    """With a checkpoint, from which the run goes on as if nothing had been."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    ranks.run(2, train, tiny(whole, **{"run.steps": 4}).to_json(), deadline_s=120)
    fields = {"run.steps": 4, "run.checkpoint_every": 0}
    results = ranks.run(2, train_until, tiny(stopped, **fields).to_json(), 1, 2, deadline_s=120)
    assert results == [(2, True, "", [("checkpoint", 2, "step_000002"), ("end", 2)])] * 2
    assert [row[0] for row in losses(stopped)] == [1, 2]
    fields["run.on_existing"] = "resume"
    [(summary, _), _] = ranks.run(2, train, tiny(stopped, **fields).to_json(), deadline_s=120)
    assert (summary["resumed_from_step"], summary["stopped"]) == (2, False)
    assert losses(stopped) == losses(whole)


@pytest.mark.slow
def test_timing_stock_communication_changes_no_number(ranks, tmp_path):
    fields = {"run.steps": 3, "run.checkpoint_every": 0, "run.sample_tokens": 0}
    ranks.run(2, train, tiny(tmp_path / "timed", **fields).to_json(), deadline_s=120)
    ranks.run(2, train, tiny(tmp_path / "plain", **fields).to_json(), SilentComm(), deadline_s=120)
    assert losses(tmp_path / "timed") == losses(tmp_path / "plain")
    for m in read_metrics(tmp_path / "timed" / "metrics.jsonl"):
        assert [sum(row) for row in m.expert_tokens] == [2 * 4 * 32 * 2] * 2  # ranks, sequences, tokens, top-2
        assert m.comm_calls == 2 * 2 * 2  # two layers, two directions, forward and backward
        assert m.dispatch_ms > 0 and m.combine_ms > 0
        assert m.dispatch_ms + m.combine_ms < m.step_ms


@pytest.mark.slow
def test_error_on_the_reading_rank_reaches_all(ranks, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    config = tiny(tmp_path / "run", **{"data.paths": [str(empty)]})
    errors = ranks.run(2, train_error, config.to_json())
    assert errors[0] == errors[1]
    assert errors[0][0] == "DataError"
    assert f"{empty}: the folder holds no files" in errors[0][1]


@pytest.mark.parametrize("backend", ["stock", "ray_deepep"])
def test_a_split_step_has_the_same_numbers_and_its_parts(ranks, tmp_path, backend):
    """With activation checkpointing, which runs blocks twice."""
    fields = {"run.backend": backend, "model.activation_checkpointing": True}
    plain = tiny(tmp_path / "plain", **fields)
    split = tiny(tmp_path / "split", **fields, **{"run.split": True})
    for config in (plain, split):
        ranks.run(2, train, config.to_json())
    assert losses(tmp_path / "split") == losses(tmp_path / "plain")
    for m in read_metrics(tmp_path / "split" / "metrics.jsonl"):
        parts = (m.attention_ms, m.gate_ms, m.experts_ms)
        assert all(ms > 0 for ms in parts), m
        assert sum(parts) < m.forward_ms + m.backward_ms, m
    assert all(m.attention_ms is None for m in read_metrics(tmp_path / "plain" / "metrics.jsonl"))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_broken_gradients_are_an_error_before_anything_is_saved(ranks, tmp_path, dtype):
    """On one rank, with losses that are numbers still: the checkpoint of that very step must not be written."""
    stage = 1 if dtype == "bf16" else 0
    fields = {"model.dtype": dtype, "optim.zero_stage": stage, "run.checkpoint_every": 1}
    config = tiny(tmp_path / "run", **fields)
    errors = ranks.run(2, train_with_broken_gradients, config.to_json(), 3)
    for kind, text in errors:
        assert kind == "TrainingDivergedError" and "the gradients' norm of step 3 is nan" in text
    saved = sorted(folder.name for folder in (tmp_path / "run" / "checkpoints").glob("step_*"))
    assert saved and saved[-1] == "step_000002"


@pytest.mark.parametrize(("zero_stage", "dtype"), [(1, "bf16"), (2, "fp32")])
def test_norms_taken_at_once_are_deepspeeds(ranks, tmp_path, zero_stage, dtype):
    """Of every partition of dense weights and experts, in every step; DeepSpeed's are sums in float64."""
    fields = {"optim.zero_stage": zero_stage, "model.dtype": dtype, "run.steps": 3, "run.eval_every": 0}
    config = tiny(tmp_path / "run", **fields, **{"run.checkpoint_every": 0, "run.sample_tokens": 0})
    for pairs in ranks.run(2, gradient_norms, config.to_json()):
        assert len(pairs) >= 3 * 2 and all(norm > 0 for norm, _ in pairs)
        for norm, deepspeeds in pairs:
            assert norm == pytest.approx(deepspeeds, rel=1e-6)


@pytest.mark.slow
def test_swapped_backend_gives_the_same_losses(ranks, tmp_path):
    """Stock and ray_deepep agree bit for bit, and either continues the other's checkpoint."""
    if shm_problem():
        pytest.skip(shm_problem())
    stock, swapped = tmp_path / "stock", tmp_path / "swapped"
    ranks.run(2, train, tiny(stock).to_json(), deadline_s=120)
    ranks.run(2, train, tiny(swapped, **{"run.backend": "ray_deepep"}).to_json(), deadline_s=120)
    assert losses(swapped) == losses(stock)
    for m in read_metrics(swapped / "metrics.jsonl"):
        assert m.comm_calls == 2 * 2 * 2
        assert m.dispatch_ms > 0 and m.combine_ms > 0
    crossed = tmp_path / "crossed"
    fields = {"run.backend": "ray_deepep", "run.resume_from": str(stock / "checkpoints" / "step_000004")}
    ranks.run(2, train, tiny(crossed, **fields).to_json(), deadline_s=120)
    assert losses(crossed) == losses(stock)


@pytest.mark.slow
def test_command_line_under_torchrun(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question. " * 100)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = ["--preset", "tiny", "--steps", "2", "--data", str(text), "--out", str(tmp_path / "run")]
    root = Path(__file__).resolve().parent.parent
    result = subprocess.run(
        [*launch, "-m", "train.main", *options],
        cwd=root,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("loss, first → last") == 1
    assert [row[0] for row in losses(tmp_path / "run")] == [1, 2]
