"""Train a model, alone or under torchrun, or on Ray.

python -m train.main --preset demo
torchrun --nproc-per-node 2 -m train.main --preset demo --backend ray_deepep
python -m train.main --preset demo --ray --workers 2
python -m train.main --preset demo --ray --workers 2:4
ray job submit -- python -m train.main --preset demo --workers 2 --out /shared/runs/demo
python -m train.main --preset demo --data my_texts/ --steps 500 --out runs/mine --resume
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading

from train.cli import add_config_arguments, config_from_args
from train.config import TrainConfig
from train.errors import CheckpointError, ConfigError, DataError, TrainingDivergedError
from train.ray_main import RayOptions, add_ray_arguments, metadata_of, options_from_args, run_on_ray

_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
_TORCHRUN_VARIABLE = "TORCHELASTIC_RUN_ID"


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, 1 when training on Ray failed, 2 after an error the user can do something about, 143
    when it was stopped by SIGTERM (with a checkpoint)."""
    args = _parser().parse_args(argv)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("train").setLevel(logging.INFO)
    try:
        config = config_from_args(args)
        return run_on_ray(config, options=options_from_args(args)) if _on_ray(args) else _run_here(config)
    except (ConfigError, DataError, CheckpointError, TrainingDivergedError) as error:
        print(f"{_rank_prefix()}error: {error}", file=sys.stderr)
        return 2


def describe_job(argv: list[str]) -> dict[str, str]:
    """What a job with these arguments is, for `ray-deepep submit`. Raises ConfigError (a ValueError) as `main` does."""
    args = _parser().parse_args(argv)
    options = RayOptions(num_workers=1) if args.ray is False else options_from_args(args)
    return metadata_of(config_from_args(args), options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train.main", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_config_arguments(parser)
    parser.add_argument(
        "--ray",
        action=argparse.BooleanOptionalAction,
        help="run the workers on Ray instead of in this process (default: in a Ray job, and where --workers is given)",
    )
    add_ray_arguments(parser)
    parser.set_defaults(workers=None)
    return parser


def _on_ray(args: argparse.Namespace) -> bool:
    if args.ray is not None:
        return args.ray
    # A job's entry point is one process on one node: workers are what the cluster is for. Unless torchrun started them.
    in_job = _JOB_VARIABLE in os.environ and _TORCHRUN_VARIABLE not in os.environ
    return in_job or args.workers is not None


def _run_here(config: TrainConfig) -> int:
    # Imported late: --help and a mistyped option should not wait for torch and DeepSpeed.
    from train.report import SummaryPrinter
    from train.trainer import run

    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    summary = run(config, callbacks=[SummaryPrinter()], stop=stop.is_set)
    return 128 + signal.SIGTERM if summary.stopped else 0


def _rank_prefix() -> str:
    """`[rank n] ` where several processes share one terminal, else nothing."""
    dist = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_initialized() or dist.get_world_size() == 1:
        return ""
    return f"[rank {dist.get_rank()}] "


if __name__ == "__main__":
    sys.exit(main())
