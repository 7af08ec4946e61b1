"""Train a model, alone or under torchrun, or on Ray.

python -m train.main --preset demo
torchrun --nproc-per-node 2 -m train.main --preset demo --backend ray_deepep
python -m train.main --preset demo --ray --workers 2
python -m train.main --preset demo --data my_texts/ --steps 500 --out runs/mine --resume
"""

from __future__ import annotations

import argparse
import logging
import sys

from train.cli import add_config_arguments, config_from_args
from train.config import TrainConfig
from train.errors import CheckpointError, ConfigError, DataError, TrainingDivergedError


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 after an error the user can do something about."""
    parser = argparse.ArgumentParser(
        prog="train.main", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_config_arguments(parser)
    parser.add_argument("--ray", action="store_true", help="run the workers on Ray instead of in this process")
    parser.add_argument(
        "--workers", type=int, default=2, metavar="N", help="with --ray: number of workers (default: 2)"
    )
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("train").setLevel(logging.INFO)
    try:
        config = config_from_args(args)
        if args.ray:
            from train.ray_main import run_on_ray

            return run_on_ray(config, num_workers=args.workers)
        return _run_here(config)
    except (ConfigError, DataError, CheckpointError, TrainingDivergedError) as error:
        print(f"{_rank_prefix()}error: {error}", file=sys.stderr)
        return 2


def _run_here(config: TrainConfig) -> int:
    # Imported late: --help and a mistyped option should not wait for torch and DeepSpeed.
    from train.report import SummaryPrinter
    from train.trainer import run

    run(config, callbacks=[SummaryPrinter()])
    return 0


def _rank_prefix() -> str:
    """`[rank n] ` where several processes share one terminal, else nothing."""
    dist = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_initialized() or dist.get_world_size() == 1:
        return ""
    return f"[rank {dist.get_rank()}] "


if __name__ == "__main__":
    sys.exit(main())
