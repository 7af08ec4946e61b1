"""How a run uses Ray: options, their arguments, and what follows from them. Ray itself is not needed here."""

from __future__ import annotations

import argparse
import math
import os
from dataclasses import dataclass

from train.config import TrainConfig
from train.errors import ConfigError
from train.inject import Injection
from train.sizes import ep_size_by_workers, parse_workers


@dataclass(frozen=True, kw_only=True)
class RayOptions:
    """How a run uses Ray."""

    num_workers: int = 2
    """Workers, one EP rank each; of an elastic run those of its full size."""
    min_workers: int | None = None
    """The least that an elastic run goes on with; None: the number is fixed."""
    min_ep_size: int = 1
    """The smallest EP degree of an elastic run: numbers of workers with a smaller one are not used."""
    resize_check_s: float = 30.0
    """How often an elastic run looks for room for more workers, in seconds."""
    cpus_per_worker: float = 1.0
    """CPUs that Ray sets aside for each."""
    gpus_per_worker: float = 1.0
    """GPUs that Ray sets aside for each, where workers train on GPUs; less than 1: they share them."""
    max_failures: int = 3
    """How often the workers are started again after a fault."""
    address: str = ""
    """The cluster; empty: start a Ray here."""
    inject: tuple[Injection, ...] = ()
    """Faults on purpose, one for each attempt from the first on."""
    num_sms: int | None = None
    """Multiprocessors of communication kernels; None: the default."""
    submitted: float = 0.0
    """When the job was submitted, in seconds since the epoch; 0: when this process began."""

    def __post_init__(self) -> None:
        if self.num_workers < 1:
            raise ConfigError("--workers", self.num_workers, "must be at least 1")
        if self.min_workers is not None and not 1 <= self.min_workers <= self.num_workers:
            raise ConfigError("--workers", self.min_workers, f"MIN must be from 1 to MAX = {self.num_workers}")
        if self.min_ep_size < 1:
            raise ConfigError("--min-ep-size", self.min_ep_size, "must be at least 1")
        if not 0 <= self.resize_check_s < math.inf:
            raise ConfigError("--resize-check", self.resize_check_s, "must be at least 0 and finite")
        if not 0 < self.cpus_per_worker < math.inf:
            raise ConfigError("--cpus-per-worker", self.cpus_per_worker, "must be positive and finite")
        if not 0 < self.gpus_per_worker <= 1:
            rule = "must be more than 0 and at most 1: a worker uses one GPU"
            raise ConfigError("--gpus-per-worker", self.gpus_per_worker, rule)
        if self.max_failures < 0:
            raise ConfigError("--max-failures", self.max_failures, "must be at least 0")
        for injection in self.inject:
            if injection.rank >= self.num_workers:
                raise ConfigError("--inject", injection.rank, f"rank must be less than --workers {self.num_workers}")

    @property
    def is_elastic(self) -> bool:
        """Whether the number of workers may change."""
        return self.min_workers is not None

    @property
    def shares_gpus(self) -> bool:
        """Whether workers may be on the same GPU."""
        return self.gpus_per_worker < 1

    @property
    def least_workers(self) -> int:
        """Workers without which there is no start."""
        return self.num_workers if self.min_workers is None else self.min_workers

    def __str__(self) -> str:
        """As `--workers` has it."""
        return f"{self.min_workers}:{self.num_workers}" if self.is_elastic else str(self.num_workers)


def add_ray_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that `options_from_args` reads."""
    parser.add_argument(
        "--workers",
        default="2",
        metavar="N|MIN:MAX",
        help="workers, or the least and most of an elastic run (default: 2)",
    )
    parser.add_argument(
        "--min-ep-size", type=int, default=1, metavar="N", help="smallest EP degree of an elastic run (default: 1)"
    )
    parser.add_argument(
        "--resize-check",
        type=float,
        default=RayOptions.resize_check_s,
        metavar="S",
        help="how often an elastic run looks for room for more workers (default: %(default)g s)",
    )
    parser.add_argument("--cpus-per-worker", type=float, default=1.0, metavar="N", help="CPUs of each (default: 1)")
    parser.add_argument(
        "--gpus-per-worker",
        type=float,
        default=1.0,
        metavar="G",
        help="GPUs of each (default: 1); less: they share them, to try things out, best under MPS",
    )
    parser.add_argument("--max-failures", type=int, default=3, metavar="N", help="restarts after faults (default: 3)")
    parser.add_argument(
        "--address", default=os.environ.get("RAY_ADDRESS", ""), help="Ray cluster (default: RAY_ADDRESS, or a new Ray)"
    )
    parser.add_argument(
        "--inject", nargs="+", default=[], metavar="FAULT", help="faults, one per attempt, e.g. kill:rank=1,step=7"
    )
    parser.add_argument("--submitted", type=float, default=0.0, help=argparse.SUPPRESS)


def options_from_args(args: argparse.Namespace) -> RayOptions:
    """The options that parsed arguments ask for. Raises ConfigError naming the first wrong one."""
    least, most = (None, RayOptions.num_workers) if args.workers is None else parse_workers(str(args.workers))
    return RayOptions(
        num_workers=most,
        min_workers=least,
        min_ep_size=args.min_ep_size,
        resize_check_s=args.resize_check,
        cpus_per_worker=args.cpus_per_worker,
        gpus_per_worker=args.gpus_per_worker,
        max_failures=args.max_failures,
        address=args.address,
        inject=tuple(Injection.parse(text) for text in args.inject),
        submitted=args.submitted,
    )


def with_shares(config: TrainConfig, options: RayOptions) -> TrainConfig:
    """The config of a run with these workers: an elastic one has a share of the batch for each worker of its full size.

    Raises ConfigError when the number of workers, the shares and the EP degree do not fit each other.
    """
    if not options.is_elastic:
        config.resolve_ep_size(options.num_workers)
        return config
    if config.run.num_shares not in (0, options.num_workers):
        rule = f"contradicts --workers {options}: an elastic run has a share for each worker of its full size"
        raise ConfigError("run.num_shares", config.run.num_shares, rule)
    config = config.replace(**{"run.num_shares": options.num_workers})
    ep_size_by_workers(config, min_workers=options.least_workers, min_ep_size=options.min_ep_size)
    return config


def ep_sizes_of(config: TrainConfig, options: RayOptions) -> dict[int, int] | None:
    """The EP degree at each number of workers of a `with_shares` config; None where the number is fixed."""
    if not options.is_elastic:
        return None
    return ep_size_by_workers(config, min_workers=options.least_workers, min_ep_size=options.min_ep_size)
