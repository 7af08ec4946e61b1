"""Elastic runs of real processes, without Ray: another number of ranks at each start, the same numbers throughout."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from train_cases import (
    clipped_gradients,
    convert_optimizer,
    losses,
    tiny,
    train,
    train_error,
    train_handover,
    train_until,
)

from train.metrics import read_metrics

SIZES = (4, 2, 3, 4)
EP_SIZES = [4, 2, 1, 4]
EACH = 2


def elastic(out: Path, **fields):
    # A small norm, so that every step is clipped; and a checkpoint after each start's steps.
    defaults = {"run.num_shares": 4, "optim.grad_clip": 0.1, "run.checkpoint_every": EACH, "run.keep_checkpoints": 9}
    return tiny(out, **(defaults | {"run.sample_tokens": 0} | fields))


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    # Clipping hides a factor that all gradients share; the second has none.
    [{"optim.zero_stage": 0}, {"optim.zero_stage": 2, "optim.grad_accum": 2, "optim.grad_clip": 0.0}],
    ids=["zero0", "zero2_accum"],
)
def test_a_run_that_changes_its_size_has_the_losses_of_one_that_does_not(ranks, tmp_path, fields):
    whole, changing = tmp_path / "whole", tmp_path / "changing"
    ranks.run(4, train, elastic(whole, **fields).to_json(), deadline_s=180)
    fields = fields | {"run.checkpoint_every": 0, "run.on_existing": "resume"}
    for size in SIZES:
        ranks.run(size, train_until, elastic(changing, **fields).to_json(), 0, EACH, deadline_s=180)
    starts = [json.loads(line)["environment"] for line in (changing / "starts.jsonl").read_text().splitlines()]
    assert [(start["ranks"], start["EP size"]) for start in starts] == list(zip(SIZES, EP_SIZES, strict=True))
    steps = read_metrics(changing / "metrics.jsonl")
    assert [step.world_size for step in steps] == [size for size in SIZES for _ in range(EACH)]
    theirs = read_metrics(whole / "metrics.jsonl")
    assert theirs[-1].loss < theirs[0].loss - 0.3
    for ours, other in zip(losses(changing), losses(whole), strict=True):
        assert ours == pytest.approx(other, rel=1e-5)
    # Every token was routed, and none twice: passes of weight zero do not count.
    assert steps[0].expert_tokens == theirs[0].expert_tokens
    assert [[sum(row) for row in step.expert_tokens] for step in steps] == [
        [sum(row) for row in step.expert_tokens] for step in theirs
    ]
    for done in range(EACH, 9, EACH):
        same_state(changing / f"checkpoints/step_{done:06d}", whole / f"checkpoints/step_{done:06d}")


def optimizer_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the optimizer's files, by name; each has one file."""
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("optimizer_*.pt"):
        raw = torch.load(path, weights_only=True)
        for name, state in raw["params"].items():
            assert f"{name}/step" not in found
            found |= {f"{name}/{key}": value for key, value in state.items()}
            found[f"{name}/step"] = torch.tensor(raw["step"])
    return found


def same_state(ours: Path, theirs: Path) -> None:
    """Moments and weights agree up to the order of sums."""
    found, wanted = optimizer_of(ours), optimizer_of(theirs)
    assert found.keys() == wanted.keys()
    assert sum("deepspeed_experts.3." in name for name in found) == 2 * 2 * 3  # layers, matrices, moments and step
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-5 * float(tensor.abs().max()), msg=name)
    assert not list(ours.glob("*optim_states.pt"))
    weights = sorted(path.name for path in theirs.glob("*model_states.pt"))
    assert len(weights) == 1 + 2 * 4 == len(list(ours.glob("*model_states.pt")))
    for name in weights:
        a, b = (torch.load(folder / name, map_location="cpu", weights_only=False) for folder in (ours, theirs))
        a, b = a.get("module", a), b.get("module", b)
        for key, tensor in b.items():
            torch.testing.assert_close(a[key], tensor, rtol=1e-3, atol=2e-5, msg=f"{name}: {key}")


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [{"optim.zero_stage": 0}, {"optim.zero_stage": 1, "model.dtype": "bf16"}, {"optim.zero_stage": 2}],
    ids=["zero0", "zero1_bf16", "zero2"],
)
def test_state_is_the_same_bits_at_another_size(ranks, tmp_path, fields):
    """Written by 4 ranks, read and written again by 2 and by 3, without a step in between."""
    fields = fields | {"run.steps": 2}
    ranks.run(4, train, elastic(tmp_path / "run", **fields).to_json(), deadline_s=120)
    source = tmp_path / "run" / "checkpoints" / "step_000002"
    wanted = optimizer_of(source)
    assert any(name.endswith("/fp32") for name in wanted) == ("model.dtype" in fields)
    for size, ep_size in ((2, 2), (3, 1)):
        again = tmp_path / f"again{size}"
        config = elastic(again, **fields, **{"run.resume_from": str(source)})
        per_rank = ranks.run(size, convert_optimizer, config.to_json(), again, deadline_s=120)
        assert [num_experts for num_experts, _ in per_rank] == [4 // ep_size] * size
        assert len({lr for _, lr in per_rank}) == 1 and per_rank[0][1] == pytest.approx(5e-3, rel=0.5)
        found = optimizer_of(again)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


@pytest.mark.slow
def test_clipping_is_by_the_whole_gradient_at_every_ep_degree(ranks, tmp_path):
    """Without ZeRO. Made-up gradients, those of experts by far the largest; the same factor and norm on every rank."""
    wanted = {}
    for size, ep_size in ((4, 4), (2, 2), (3, 1)):
        config = elastic(tmp_path / str(size), **{"model.expert_hidden": 16})
        results = ranks.run(size, clipped_gradients, config.to_json(), deadline_s=120)
        found = {name: value for result in results for name, value in result.items()}
        assert all(found[name] == value for result in results for name, value in result.items())
        assert {len(result) for result in results} == {len(found) - 2 * 2 * (4 - 4 // ep_size)}  # layers, matrices
        assert math.fsum(norm**2 for norm in found.values()) == pytest.approx(0.1**2, rel=1e-5)
        wanted = wanted or found
        assert found == pytest.approx(wanted, rel=1e-6)


@pytest.mark.slow
def test_at_full_size_an_elastic_run_is_the_run_that_is_not(ranks, tmp_path):
    """Bit for bit, with ZeRO, whose norm is that of the whole gradient in both, and one micro-batch for each seed."""
    fields = {"optim.zero_stage": 1, "run.steps": 4, "run.eval_batches": 1}
    ranks.run(2, train, elastic(tmp_path / "elastic", **fields, **{"run.num_shares": 2}).to_json(), deadline_s=120)
    ranks.run(2, train, elastic(tmp_path / "fixed", **fields, **{"run.num_shares": 0}).to_json(), deadline_s=120)
    assert losses(tmp_path / "elastic") == losses(tmp_path / "fixed")
    # A run with a fixed number of ranks goes on from there, as its batch has as many shares.
    out, source = tmp_path / "on", tmp_path / "elastic" / "checkpoints" / "step_000002"
    on = elastic(out, **fields, **{"run.num_shares": 0, "run.resume_from": str(source)})
    ranks.run(2, train, on.to_json(), deadline_s=120)
    assert losses(out) == losses(tmp_path / "fixed")
    refused(ranks, tmp_path)


def refused(ranks, tmp_path):
    """What does not fit says so."""
    for source, shares in (("elastic", 3), ("fixed", 4)):
        fields = {"optim.zero_stage": 1, "run.steps": 4, "run.num_shares": shares}
        config = elastic(tmp_path / f"to{shares}", **fields, **{"run.resume_from": str(tmp_path / source)})
        (kind, text), _ = ranks.run(2, train_error, config.to_json())
        assert kind == "CheckpointError"
        assert f"belongs to another run (shares of the batch: 2 there, {shares} here)" in text
    sgd = tmp_path / "sgd.json"
    sgd.write_text('{"optimizer": {"type": "SGD", "params": {"lr": 0.1}}}')
    fields = {"run.num_shares": 2, "run.deepspeed_config": str(sgd)}
    (kind, text), _ = ranks.run(2, train_error, elastic(tmp_path / "sgd", **fields).to_json())
    assert (kind, "optimizer = 'SGD': runs with run.num_shares need torch's Adam" in text) == ("ConfigError", True), (
        text
    )
    (kind, text), _ = ranks.run(2, train_error, elastic(tmp_path / "few", **{"run.num_shares": 1}).to_json())
    assert (kind, text) == ("ConfigError", "run.num_shares = 1: must be at least the world size 2")


@pytest.mark.slow
def test_a_handover_comes_after_a_checkpoint_of_the_step(ranks, tmp_path):
    """One rank hears of it; all save, and all wait to be replaced. After the last step nobody does."""
    fields = {"run.steps": 4, "run.num_shares": 2, "run.checkpoint_every": 0}
    for asked_in, heard in ((2, [2, 2]), (4, [0, 0])):
        out = tmp_path / str(asked_in)
        assert ranks.run(2, train_handover, elastic(out, **fields).to_json(), 1, asked_in, deadline_s=120) == heard
        assert [path.name for path in (out / "checkpoints").glob("step_*")] == [f"step_{asked_in:06d}"]
