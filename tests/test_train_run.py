"""Whole runs on the stock backend: files written, same numbers after a resume, damage to checkpoints noticed.

Cases run in processes of their own: one alone (it makes its own process group), or two with a group that exists.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from harness import RankPool, error_of, shm_problem

from train.config import TrainConfig
from train.metrics import read_metrics
from train.presets import get_preset

PNG = b"\x89PNG\r\n\x1a\n"
STEPS = 8
HALF = 4


def tiny(out: Path, **fields) -> TrainConfig:
    return get_preset("tiny").replace(**({"run.out_dir": str(out), "run.device": "cpu"} | fields))


def losses(out: Path) -> list[tuple]:
    """What must be equal between two runs; times are not."""
    return [(m.step, m.loss, m.aux_loss, m.lr, m.val_loss) for m in read_metrics(out / "metrics.jsonl")]


def flip_a_byte(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


# Run on the ranks


class Recorder:
    """Callback that notes what it hears."""

    def __init__(self):
        self.heard = []

    def on_step(self, metrics):
        self.heard.append(("step", metrics.step))

    def on_checkpoint(self, info):
        assert (info.folder / "trainer_state.json").is_file()
        self.heard.append(("checkpoint", info.step, info.folder.name))

    def on_end(self, summary):
        assert summary.plot_path.is_file()
        self.heard.append(("end", summary.stats.num_steps))


class SilentComm:
    """A backend without times: with it the trainer leaves DeepSpeed's all-to-all alone."""

    def comm_stats(self, reset=True):
        return {"dispatch_ms": 0.0, "combine_ms": 0.0, "num_calls": 0}


def train(_, config_json: str, swap=None):
    """Train on this rank; returns the summary as a dict and what a callback heard."""
    import torch.distributed as dist
    from deepspeed.moe import sharded_moe

    from train.trainer import run

    before = sharded_moe._AllToAll, dist.is_initialized()
    recorder = Recorder()
    summary = run(TrainConfig.from_json(config_json), swap=swap, callbacks=[recorder])
    assert (sharded_moe._AllToAll, dist.is_initialized()) == before
    return dataclasses.asdict(summary), recorder.heard


def train_error(_, config_json: str):
    """Type and text of the error that a run ends with on this rank."""
    from train.trainer import run

    error = error_of(Exception, lambda: run(TrainConfig.from_json(config_json)))
    return type(error).__name__, str(error)


def choose(_, root: Path):
    """Name of the checkpoint a resuming run picks and what it passed over, or the error."""
    import torch

    from train.checkpoint import choose_checkpoint
    from train.distributed import World
    from train.errors import CheckpointError

    try:
        choice = choose_checkpoint(root, World(rank=0, world_size=1, device=torch.device("cpu")))
    except CheckpointError as error:
        return "error", (str(error),)
    return choice and (choice.folder.name, choice.skipped)


def initial_weights(_, ep_size: int, ep_rank: int):
    """Initial weights by global name, as [sum, first element]."""
    from train.model import _EXPERT_NAME, MoELanguageModel, init_weights

    config = get_preset("tiny").model
    model = MoELanguageModel(config, vocab_size=264, ep_size=ep_size)
    init_weights(model, seed=3, ep_rank=ep_rank)
    local = config.num_experts // ep_size
    return {
        _EXPERT_NAME.sub(lambda m: str(ep_rank * local + int(m.group())), name): (float(p.sum()), float(p.view(-1)[0]))
        for name, p in model.named_parameters()
    }


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


# One process


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


def test_divergence_is_an_error_and_not_saved(alone, tmp_path):
    [(kind, text)] = alone.run(train_error, tiny(tmp_path / "run", **{"optim.lr": 1e30}).to_json())
    assert kind == "TrainingDivergedError"
    assert "the loss of step" in text and "lower optim.lr" in text
    assert not list((tmp_path / "run" / "checkpoints").glob("step_*"))


def test_experts_start_different_and_independent_of_ep(alone):
    [whole] = alone.run(initial_weights, 1, 0)
    halves = [alone.run(initial_weights, 2, r)[0] for r in range(2)]
    assert {**halves[0], **halves[1]} == whole
    firsts = [value for name, value in whole.items() if name.endswith("down.weight")]
    assert len(set(firsts)) == len(firsts) == 2 * get_preset("tiny").model.num_experts


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
        "{": "readable JSON file",
        "[]": "JSON object",
    }.items():
        path.write_text(content)
        with pytest.raises(ConfigError, match=problem):
            deepspeed_config(config)


# Two processes


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


@pytest.mark.slow
def test_timing_stock_communication_changes_no_number(ranks, tmp_path):
    fields = {"run.steps": 3, "run.checkpoint_every": 0, "run.sample_tokens": 0}
    ranks.run(2, train, tiny(tmp_path / "timed", **fields).to_json(), deadline_s=120)
    ranks.run(2, train, tiny(tmp_path / "plain", **fields).to_json(), SilentComm(), deadline_s=120)
    assert losses(tmp_path / "timed") == losses(tmp_path / "plain")
    for m in read_metrics(tmp_path / "timed" / "metrics.jsonl"):
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
