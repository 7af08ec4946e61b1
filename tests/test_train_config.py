"""Config: rules are enforced with an error that names field, value and rule; JSON and the command line round-trip."""

import argparse
import dataclasses
import json
import pickle
import re

import pytest

from train.cli import add_config_arguments, config_from_args
from train.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from train.errors import CheckpointError, ConfigError, DataError, TrainingDivergedError
from train.presets import PRESETS, get_preset


def parse(*argv: str) -> TrainConfig:
    parser = argparse.ArgumentParser()
    add_config_arguments(parser)
    return config_from_args(parser.parse_args(argv))


@pytest.mark.parametrize(
    ("section", "field", "value", "rule"),
    [
        (ModelConfig, "hidden", 0, "at least 1"),
        (ModelConfig, "num_heads", 3, "even head size"),
        (ModelConfig, "num_topk", 9, "at most num_experts=8"),
        (ModelConfig, "ep_size", 3, "divide num_experts=8"),
        (ModelConfig, "capacity_factor", float("nan"), "positive"),
        (ModelConfig, "dtype", "fp8", "one of fp32, bf16"),
        (ModelConfig, "noisy_gate_policy", "Loud", "one of"),
        (DataConfig, "seq_len", 1, "at least 2"),
        (DataConfig, "val_fraction", 1.0, "between 0 and 1"),
        (DataConfig, "tokenizer", "words", "one of bytes, bpe"),
        (OptimConfig, "lr", -1.0, "positive"),
        (OptimConfig, "zero_stage", 3, "0, 1 or 2"),
        (OptimConfig, "warmup_steps", 1, "at least 2"),
        (RunConfig, "steps", 0, "at least 1"),
        (RunConfig, "backend", "nccl", "one of stock, ray_deepep"),
        (RunConfig, "on_existing", "ignore", "one of"),
        (RunConfig, "dist_timeout_s", 0.0, "positive"),
        (RunConfig, "dist_timeout_s", float("inf"), "at most 1e+07"),
    ],
)
def test_rule_names_field_value_and_rule(section, field, value, rule):
    with pytest.raises(ConfigError) as caught:
        section(**{field: value})
    assert isinstance(caught.value, ValueError)
    assert caught.value.field.endswith(f".{field}")
    assert repr(value) in str(caught.value)
    assert rule in str(caught.value)


def test_rules_across_sections():
    with pytest.raises(ConfigError, match=r"optim\.zero_stage = 0: must be 1 or 2 when model\.dtype is bf16"):
        TrainConfig(model=ModelConfig(dtype="bf16"))
    with pytest.raises(ConfigError, match=r"model\.min_capacity"):
        TrainConfig(model=ModelConfig(min_capacity=100), data=DataConfig(seq_len=8), optim=OptimConfig(micro_batch=2))


@pytest.mark.parametrize(
    ("make", "text"),
    (
        (lambda: ModelConfig(hidden="64"), "model.hidden = '64': must be of type int"),
        (lambda: ModelConfig(num_layers=2.0), "model.num_layers = 2.0: must be of type int"),
        (lambda: ModelConfig(drop_tokens=1), "model.drop_tokens = 1: must be of type bool"),
        (lambda: DataConfig(paths="a.txt"), "data.paths = 'a.txt': must be of type tuple"),
        (lambda: DataConfig(val_fraction=None), "data.val_fraction = None: must be of type float"),
        (lambda: OptimConfig(lr="fast"), "optim.lr = 'fast': must be of type float"),
        (lambda: RunConfig(steps=True), "run.steps = True: must be of type int"),
        (lambda: RunConfig(dist_timeout_s="9"), "run.dist_timeout_s = '9': must be of type float"),
        (lambda: TrainConfig(model={}), "model = {}: must be of type ModelConfig"),
    ),
)
def test_values_of_another_type(make, text):
    with pytest.raises(ConfigError, match=re.escape(text)):
        make()


def test_configs_are_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig().hidden = 1
    with pytest.raises(TypeError):
        ModelConfig(64)


@pytest.mark.parametrize("name", PRESETS)
def test_preset_survives_json(name):
    config = get_preset(name)
    assert TrainConfig.from_json(config.to_json()) == config
    assert config.name == name


def test_unknown_names_and_types_are_refused():
    with pytest.raises(ConfigError, match=r"preset = 'huge': must be one of tiny, demo"):
        get_preset("huge")
    with pytest.raises(ConfigError, match=r"^data = 3: must be a JSON object"):
        TrainConfig.from_dict({"data": 3})
    with pytest.raises(ConfigError, match=r"model\.hiden = 3: no such field"):
        TrainConfig.from_dict({"model": {"hiden": 3}})
    with pytest.raises(ConfigError, match=r"model\.hidden = 'wide': must be of type int"):
        TrainConfig().replace(**{"model.hidden": "wide"})
    with pytest.raises(ConfigError, match=r"run\.progress = 'maybe': must be true or false"):
        TrainConfig().replace(**{"run.progress": "maybe"})
    with pytest.raises(ConfigError, match=r"model\.num_layers = 1\.5: must be of type int"):
        TrainConfig().replace(**{"model.num_layers": 1.5})


def test_command_line_overrides():
    config = parse(
        "--preset", "tiny", "--steps", "3", "--backend", "ray_deepep", "--data", "a.txt", "b",
        "--out", "o", "--set", "model.hidden=64", "run.progress=true", "optim.lr=1e-2", "--resume",
    )  # fmt: skip
    assert config.run.steps == 3
    assert config.run.backend == "ray_deepep"
    assert config.data.paths == ("a.txt", "b")
    assert (config.run.out_dir, config.run.on_existing, config.run.resume_from) == ("o", "resume", "")
    assert (config.model.hidden, config.run.progress, config.optim.lr) == (64, True, 1e-2)
    assert parse("--resume", "runs/x/checkpoints/step_000004").run.resume_from == "runs/x/checkpoints/step_000004"
    assert parse("--overwrite").run.on_existing == "overwrite"


def test_command_line_errors(tmp_path):
    with pytest.raises(ConfigError, match="must be FIELD=VALUE"):
        parse("--set", "model.hidden")
    with pytest.raises(ConfigError, match="cannot be combined with --resume"):
        parse("--resume", "--overwrite")
    broken = tmp_path / "c.json"
    broken.write_text("{")
    with pytest.raises(ConfigError, match=r"--config.*readable JSON"):
        parse("--config", str(broken))


def test_config_file_on_the_command_line(tmp_path):
    path = tmp_path / "c.json"
    path.write_text(get_preset("tiny").to_json())
    assert parse("--config", str(path), "--steps", "5").run.steps == 5
    assert json.loads(path.read_text())["run"]["steps"] == get_preset("tiny").run.steps


def test_digest_follows_what_decides_the_losses():
    config = get_preset("tiny")
    same = config.replace(**{"run.steps": 99, "run.backend": "ray_deepep", "run.out_dir": "x"})
    assert same.digest() == config.digest()
    for name, value in {"model.hidden": 64, "optim.lr": 1e-3, "run.seed": 2, "data.seq_len": 16}.items():
        assert config.replace(**{name: value}).digest() != config.digest(), name


@pytest.mark.parametrize(
    ("world", "experts", "fixed", "want"), [(2, 8, 0, 2), (3, 8, 0, 1), (6, 8, 0, 2), (8, 8, 4, 4)]
)
def test_ep_size(world, experts, fixed, want):
    assert ModelConfig(num_experts=experts, ep_size=fixed).resolve_ep_size(world) == want


def test_ep_size_must_divide_the_world():
    with pytest.raises(ConfigError, match=r"model\.ep_size = 4: must divide the world size 6"):
        ModelConfig(ep_size=4).resolve_ep_size(6)


@pytest.mark.parametrize(
    "error",
    [ConfigError("a.b", 1, "r"), DataError("p", "x", "y"), CheckpointError("p", "x"), TrainingDivergedError(3, 1.0)],
)
def test_errors_survive_pickling(error):
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert (str(copy), vars(copy)) == (str(error), vars(error))
