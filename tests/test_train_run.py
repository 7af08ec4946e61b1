"""Whole runs of one process: files written, same numbers after a resume, damage to checkpoints noticed.

They run in a process of their own, which makes its own process group.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from harness import RankPool
from train_cases import HALF, STEPS, choose, flip_a_byte, initial_weights, losses, tiny, train, train_error

from train.config import TrainConfig
from train.metrics import read_metrics
from train.presets import get_preset

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def alone():
    """One process that has no process group until a run makes one."""
    with RankPool(1, init_group=False) as pool:
        yield pool


@pytest.fixture(scope="module")
def uninterrupted(alone, tmp_path_factory):
    """A finished run of one process; tests work on copies of it."""
    out = tmp_path_factory.mktemp("train") / "whole"
    [(summary, heard)] = alone.run(train, tiny(out).to_json(), deadline_s=120)
    return out, summary, heard


def copy_of(uninterrupted, tmp_path: Path) -> Path:
    return Path(shutil.copytree(uninterrupted[0], tmp_path / "run"))


def test_run_writes_everything(uninterrupted):
    out, summary, heard = uninterrupted
    steps = read_metrics(out / "metrics.jsonl")
    assert [m.step for m in steps] == list(range(1, STEPS + 1))
    assert [m.step for m in steps if m.val_loss is not None] == [HALF, STEPS]
    assert steps[-1].loss < steps[0].loss - 0.3
    for m in steps:
        assert m.forward_ms + m.backward_ms + m.optimizer_ms <= m.step_ms * 1.001
        assert (m.dispatch_ms, m.combine_ms) == (0.0, 0.0)  # one rank: nothing to exchange
    assert (out / "loss.png").read_bytes().startswith(PNG)
    assert "⟶" in (out / "sample.txt").read_text()
    assert TrainConfig.from_file(out / "config.json") == tiny(out)
    stats = summary["stats"]
    assert (stats["num_steps"], stats["first_loss"], stats["last_loss"]) == (STEPS, steps[0].loss, steps[-1].loss)
    assert (summary["world_size"], summary["ep_size"], summary["resumed_from_step"]) == (1, 1, 0)
    assert heard == [
        *[("step", s) for s in range(1, HALF + 1)],
        ("checkpoint", HALF, "step_000004"),
        *[("step", s) for s in range(HALF + 1, STEPS + 1)],
        ("checkpoint", STEPS, "step_000008"),
        ("end", STEPS),
    ]


def test_existing_checkpoints_are_not_touched_unasked(alone, uninterrupted, tmp_path):
    out = copy_of(uninterrupted, tmp_path)
    before = losses(out)
    [(kind, text)] = alone.run(train_error, tiny(out).to_json())
    assert kind == "ConfigError"
    assert "run.out_dir" in text and "holds checkpoints (newest: step_000008)" in text
    assert losses(out) == before
    alone.run(train, tiny(out, **{"run.on_existing": "overwrite", "run.steps": 2}).to_json())
    assert [row[0] for row in losses(out)] == [1, 2]


def test_corrupt_checkpoint_falls_back_to_the_one_before(alone, uninterrupted, tmp_path):
    out = copy_of(uninterrupted, tmp_path)
    expert = next((out / "checkpoints" / "step_000008").glob("layer_*expert_2*"))
    flip_a_byte(expert)
    reason = f"{expert}: is corrupt: its checksum differs from the recorded one"
    assert alone.run(choose, out / "checkpoints") == [("step_000004", (reason,))]
    [(summary, heard)] = alone.run(train, tiny(out, **{"run.on_existing": "resume"}).to_json())
    assert summary["resumed_from_step"] == HALF
    assert heard[0] == ("step", HALF + 1)
    assert losses(out) == losses(uninterrupted[0])


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        ("flip", "is corrupt: its checksum differs"),
        ("cut", "is corrupt: 10 bytes instead of"),
        ("remove", "is missing: the checkpoint is incomplete"),
    ],
)
def test_no_good_checkpoint_names_the_file(alone, uninterrupted, tmp_path, damage, problem):
    out = copy_of(uninterrupted, tmp_path)
    for folder in (out / "checkpoints").glob("step_*"):
        victim = next(folder.glob("mp_rank_*"))
        if damage == "flip":
            flip_a_byte(victim)
        elif damage == "cut":
            victim.write_bytes(victim.read_bytes()[:10])
        else:
            victim.unlink()
    [(kind, text)] = alone.run(train_error, tiny(out, **{"run.on_existing": "resume"}).to_json())
    assert kind == "CheckpointError"
    assert f"step_000008/mp_rank_00_model_states.pt: {problem}" in text
    assert "no other good checkpoint" in text


def test_interrupted_save_is_passed_over(alone, uninterrupted, tmp_path):
    root = copy_of(uninterrupted, tmp_path) / "checkpoints"
    (root / "step_000012").mkdir()
    (root / "step_000012" / "mp_rank_00_model_states.pt").write_bytes(b"half")
    assert alone.run(choose, root) == [("step_000008", ())]
    (root / "step_000008" / "trainer_state.json").unlink()
    [(name, skipped)] = alone.run(choose, root)
    assert name == "step_000004"
    assert "step_000008/trainer_state.json: is missing" in skipped[0]
    assert alone.run(choose, tmp_path / "nothing") == [None]


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"model.expert_hidden": 64}, "belongs to another run (model.expert_hidden: 32 there, 64 here)"),
        ({"data.max_bytes": 32768}, "belongs to another run (tokens (SHA-256): "),
        ({"run.steps": 6}, "is at step 8, beyond run.steps = 6"),
    ],
)
def test_checkpoint_of_another_run_is_refused(alone, uninterrupted, tmp_path, fields, problem):
    out = copy_of(uninterrupted, tmp_path)
    [(kind, text)] = alone.run(train_error, tiny(out, **{"run.on_existing": "resume"}, **fields).to_json())
    assert kind == "CheckpointError"
    assert f"step_000008/trainer_state.json: {problem}" in text
    assert losses(out) == losses(uninterrupted[0])


def test_more_steps_continue_a_finished_run(alone, uninterrupted, tmp_path):
    out = tmp_path / "longer"
    fields = {"run.resume_from": str(uninterrupted[0]), "run.steps": STEPS + 2, "run.keep_checkpoints": 1}
    [(summary, _)] = alone.run(train, tiny(out, **fields).to_json())
    assert summary["resumed_from_step"] == STEPS
    assert [row[0] for row in losses(out)] == list(range(1, STEPS + 3))
    assert losses(out)[:STEPS] == losses(uninterrupted[0])
    assert [p.name for p in (out / "checkpoints").glob("step_*")] == ["step_000010"]


def test_activation_checkpointing_changes_no_number(alone, uninterrupted, tmp_path):
    fields = {"model.activation_checkpointing": True, "run.steps": 3, "run.eval_every": HALF}
    alone.run(train, tiny(tmp_path / "a", **fields).to_json())
    fields["model.activation_checkpointing"] = False
    alone.run(train, tiny(tmp_path / "b", **fields).to_json())
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    load_a, load_b = ([m.expert_tokens for m in read_metrics(tmp_path / x / "metrics.jsonl")] for x in "ab")
    assert load_a == load_b and None not in load_a


@pytest.mark.parametrize(
    "fields",
    [
        {"model.num_topk": 1, "model.noisy_gate_policy": "RSample", "model.use_residual": True},
        {"model.num_topk": 3, "model.drop_tokens": False, "model.moe_every": 2},
        {"model.dtype": "bf16", "optim.zero_stage": 1, "optim.grad_accum": 2},
    ],
    ids=["top1_noise_residual", "top3_no_drop_alternate", "bf16_zero1_accum"],
)
def test_model_variants_learn(alone, tmp_path, fields):
    [(summary, _)] = alone.run(train, tiny(tmp_path, **fields).to_json())
    assert summary["stats"]["last_loss"] < summary["stats"]["first_loss"] - 0.2
    config = TrainConfig.from_file(tmp_path / "config.json")
    optim, model = config.optim, config.model
    routed = optim.micro_batch * optim.grad_accum * config.data.seq_len * model.num_topk
    for m in read_metrics(tmp_path / "metrics.jsonl"):
        assert [len(row) for row in m.expert_tokens] == [model.num_experts] * (model.num_layers // model.moe_every)
        assert [sum(row) for row in m.expert_tokens] == [routed] * len(m.expert_tokens)


def test_expert_load_is_written_every_nth_step_and_last(alone, tmp_path):
    alone.run(train, tiny(tmp_path, **{"run.load_every": 3}).to_json())
    steps = read_metrics(tmp_path / "metrics.jsonl")
    assert [m.step for m in steps if m.expert_tokens is not None] == [3, 6, STEPS]


def test_divergence_is_an_error_and_not_saved(alone, tmp_path):
    [(kind, text)] = alone.run(train_error, tiny(tmp_path / "run", **{"optim.lr": 1e30}).to_json())
    assert kind == "TrainingDivergedError"
    assert re.search(r"the (loss|gradients' norm) of step", text) and "lower optim.lr" in text
    assert not list((tmp_path / "run" / "checkpoints").glob("step_*"))


def test_experts_start_different_and_independent_of_ep(alone):
    [whole] = alone.run(initial_weights, 1, 0)
    halves = [alone.run(initial_weights, 2, r)[0] for r in range(2)]
    assert {**halves[0], **halves[1]} == whole
    firsts = [value for name, value in whole.items() if name.endswith("down.weight")]
    assert len(set(firsts)) == len(firsts) == 2 * get_preset("tiny").model.num_experts


def test_a_folder_that_cannot_be_written(tmp_path):
    from train.errors import ConfigError
    from train.trainer import run

    (tmp_path / "file").touch()
    config = tiny(tmp_path, **{"run.out_dir": str(tmp_path / "file" / "run")})
    with pytest.raises(ConfigError, match=r"run\.out_dir = .*can be written to \(Not a directory\)"):
        run(config)


def test_deepspeed_config_file(tmp_path):
    from train.engine import deepspeed_config
    from train.errors import ConfigError

    path = tmp_path / "ds.json"
    config = tiny(tmp_path, **{"run.deepspeed_config": str(path)})
    path.write_text(json.dumps({"gradient_clipping": 0.5, "gradient_accumulation_steps": "auto"}))
    merged = deepspeed_config(config)
    assert (merged["gradient_clipping"], merged["gradient_accumulation_steps"]) == (0.5, 1)
    assert merged["optimizer"]["type"] == "AdamW"
    for content, problem in {
        '{"train_micro_batch_size_per_gpu": 3}': "contradicts this run's 4",
        '{"zero_optimization": {"stage": 3}}': "supports 0, 1 and 2",
        '{"zero_optimization": 1}': "zero_optimization = 1: must be a JSON object",
        '{"optimizer": "Adam"}': "optimizer = 'Adam': must be a JSON object",
        "{": "readable JSON file",
        "[]": "JSON object",
    }.items():
        path.write_text(content)
        with pytest.raises(ConfigError, match=problem):
            deepspeed_config(config)
