"""The command line of a run, shared by every program that starts one: arguments in, `TrainConfig` out."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

from train.config import BACKENDS, TrainConfig
from train.errors import ConfigError
from train.presets import PRESETS, get_preset


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that `config_from_args` reads."""
    parser.add_argument("--preset", default="demo", help=f"one of {', '.join(PRESETS)} (default: demo)")
    parser.add_argument("--config", metavar="FILE", help="a config as JSON, instead of a preset")
    parser.add_argument("--data", nargs="+", metavar="PATH", help="text: files or folders (txt, jsonl, parquet)")
    parser.add_argument("--out", metavar="DIR", help="folder of this run (default: runs/PRESET)")
    parser.add_argument("--backend", choices=BACKENDS, help="who moves tokens between experts")
    parser.add_argument("--steps", type=int, help="optimizer steps")
    parser.add_argument("--seed", type=int, help="seed of weights, batches and gate noise")
    parser.add_argument(
        "--deepspeed-config", metavar="FILE", help="DeepSpeed JSON whose keys replace the generated ones"
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="CHECKPOINT",
        help="continue from the newest good checkpoint of --out, or from this one",
    )
    parser.add_argument("--overwrite", action="store_true", help="delete the checkpoints that --out already holds")
    parser.add_argument("--tensorboard", action="store_true", help="write the numbers of steps for TensorBoard too")
    parser.add_argument("--no-progress", action="store_true", help="no progress bars")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="FIELD=VALUE",
        help="any other field, e.g. model.hidden=256",
    )


def config_from_args(args: argparse.Namespace) -> TrainConfig:
    """The config that parsed arguments ask for. Raises ConfigError naming the first wrong one."""
    config = TrainConfig.from_file(args.config) if args.config else get_preset(args.preset)
    if args.resume and args.overwrite:
        raise ConfigError("--overwrite", True, "cannot be combined with --resume")
    return config.replace(**_overrides(args))


def fields_from(items: Iterable[str]) -> dict[str, Any]:
    """What `--set` asks for, as `TrainConfig.replace` takes it. Raises ConfigError."""
    values: dict[str, Any] = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals:
            raise ConfigError("--set", item, "must be FIELD=VALUE, e.g. model.hidden=256")
        values[name] = value.split(",") if name == "data.paths" else value
    return values


def _overrides(args: argparse.Namespace) -> dict[str, Any]:
    values = fields_from(args.set)
    named = {
        "data.paths": args.data,
        "run.out_dir": args.out,
        "run.backend": args.backend,
        "run.steps": args.steps,
        "run.seed": args.seed,
        "run.deepspeed_config": args.deepspeed_config,
    }
    values |= {name: value for name, value in named.items() if value is not None}
    if args.resume:
        values["run.on_existing"] = "resume"
        values["run.resume_from"] = "" if args.resume == "auto" else args.resume
    if args.overwrite:
        values["run.on_existing"] = "overwrite"
    if args.tensorboard:
        values["run.tensorboard"] = True
    if args.no_progress:
        values["run.progress"] = False
    return values
