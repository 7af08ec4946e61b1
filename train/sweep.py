"""Train many small runs that differ in a few values, and compare them: a grid, random search, or a scaling study.

    python -m train.sweep --preset tiny --param backend=stock,ray_deepep --param topk=1,2 --out runs/grid
    python -m train.sweep --preset demo --param lr=1e-3..1e-2 --param capacity=1.0,1.25 --samples 8 --out runs/search
    python -m train.sweep --preset demo --scaling 1 2 4 --out runs/scaling
    python -m train.sweep --out runs/grid --resume

`--param` takes backend, ep, experts, topk, capacity, lr, sms and workers. Trials run on Ray Tune, as many at once as
the cluster has room for. A trial that fails has a row that says why. At the end there is a table, and in the folder
results.csv, sweep.png, loss.png and, for a scaling study, scaling.png; each trial's run folder is under trials/.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path

from train.cli import add_config_arguments, config_from_args
from train.config import TrainConfig
from train.errors import ConfigError
from train.files import write_text_atomic
from train.ray_main import RayOptions, add_ray_arguments, options_from_args, with_absolute_paths
from train.sweep_results import (
    DONE,
    FAILED,
    UNFINISHED,
    Row,
    csv_text,
    efficiencies,
    efficiency_lines,
    read_row,
    table_lines,
    trial_folder,
)
from train.sweep_space import (
    METRICS,
    SCALING_MODES,
    Choice,
    Trial,
    check_trials,
    make_trials,
    scaling_trials,
    trials_from_json,
    trials_to_json,
)

SWEEP_FILE = "sweep.json"


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What a sweep's folder holds, so that it can go on."""

    base: TrainConfig
    """All paths absolute."""
    trials: list[Trial]
    metric: str

    def save(self, folder: Path) -> None:
        """Write `sweep.json`."""
        folder.mkdir(parents=True, exist_ok=True)
        record = {"base": self.base.to_dict(), "metric": self.metric, "trials": json.loads(trials_to_json(self.trials))}
        write_text_atomic(folder / SWEEP_FILE, json.dumps(record, indent=1))

    @classmethod
    def load(cls, folder: Path) -> Sweep:
        """Raises ConfigError where there is none, or it cannot be read."""
        path = folder / SWEEP_FILE
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            return cls(
                base=TrainConfig.from_dict(record["base"]),
                trials=trials_from_json(json.dumps(record["trials"])),
                metric=record["metric"],
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError("--out", str(folder), f"must hold a sweep to resume ({error})") from error


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, 1 when no trial succeeded, 2 after an error the user can do something about."""
    args = _parser().parse_args(argv)
    logging.basicConfig(format="%(message)s")
    try:
        options = options_from_args(args)
        if options.is_elastic:
            raise ConfigError("--workers", str(options), "must be a fixed number: the trials of a sweep are compared")
        folder = Path(args.out or "runs/sweep").absolute()
        sweep = _resumed(args, folder) if args.resume else _new(args, folder, options)
        rows = run_sweep(sweep, folder, options=options, at_once=args.at_once, retry_failed=args.retry_failed)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if any(row.status == DONE for row in rows) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train.sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_config_arguments(parser)
    add_ray_arguments(parser)
    parser.add_argument(
        "--param", action="append", default=[], metavar="NAME=VALUES", help="a list V,V or range LOW..HIGH"
    )
    parser.add_argument(
        "--samples", type=int, default=0, metavar="N", help="N random trials instead of all combinations"
    )
    parser.add_argument("--scaling", type=int, nargs="+", metavar="N", help="a scaling study over numbers of workers")
    parser.add_argument("--modes", nargs="+", default=list(SCALING_MODES), help="weak, strong (default: both)")
    parser.add_argument("--metric", default="val_loss", help=f"ranks trials: {', '.join(METRICS)} (default: val_loss)")
    parser.add_argument("--at-once", type=int, default=0, metavar="N", help="most trials at once (default: what fits)")
    parser.add_argument("--retry-failed", action="store_true", help="with --resume: run failed trials again too")
    return parser


def _new(args: argparse.Namespace, folder: Path, options: RayOptions) -> Sweep:
    if args.metric not in METRICS:
        raise ConfigError("--metric", args.metric, f"must be one of {', '.join(METRICS)}")
    if args.at_once < 0:
        raise ConfigError("--at-once", args.at_once, "must be at least 0")
    if args.retry_failed:
        raise ConfigError("--retry-failed", True, "goes with --resume only")
    if (folder / SWEEP_FILE).exists():
        raise ConfigError("--out", str(folder), "holds a sweep; --resume it, or choose another folder")
    base = with_absolute_paths(config_from_args(args)).replace(**{"run.progress": False, "run.sample_tokens": 0})
    if args.scaling:
        if args.param:
            raise ConfigError("--param", args.param[0], "cannot be combined with --scaling")
        trials = scaling_trials(base, args.scaling, args.modes)
    else:
        if not args.param:
            raise ConfigError("--param", "", "must be given, or --scaling, or --resume")
        choices = [Choice.parse(text) for text in args.param]
        trials = make_trials(choices, num_samples=args.samples, seed=base.run.seed, num_workers=options.num_workers)
    return Sweep(base=base, trials=trials, metric=args.metric)


def _resumed(args: argparse.Namespace, folder: Path) -> Sweep:
    if args.param or args.scaling:
        raise ConfigError("--resume", True, "goes on with the trials it has: leave --param and --scaling out")
    return Sweep.load(folder)


def run_sweep(
    sweep: Sweep, folder: Path, *, options: RayOptions, at_once: int = 0, retry_failed: bool = False
) -> list[Row]:
    """Run what has no result yet, print the table, write CSV and pictures; returns all rows, in order."""
    check_trials(sweep.base, sweep.trials)
    from train.ray_sweep import run_trials  # Ray, which takes seconds

    fresh = not (folder / SWEEP_FILE).exists()
    sweep.save(folder)
    again = {UNFINISHED, FAILED} if retry_failed else {UNFINISHED}
    todo = [trial for trial in sweep.trials if read_row(trial, trial_folder(folder, trial)).status in again]
    if len(todo) < len(sweep.trials):
        print(f"{len(sweep.trials) - len(todo)} of {len(sweep.trials)} trials have ended before")
    # A study of speed is one only if its runs have the machine to themselves.
    alone = any("mode" in trial.values for trial in sweep.trials)
    try:
        if todo:
            run_trials(sweep.base, todo, out_dir=folder, options=options, at_once=1 if alone else at_once)
    except ConfigError:
        # Nothing was started: another attempt with other options may have this folder.
        if fresh:
            (folder / SWEEP_FILE).unlink()
        raise
    except KeyboardInterrupt:
        write_report(_rows(sweep, folder), sweep.metric, folder)
        raise
    rows = _rows(sweep, folder)
    write_report(rows, sweep.metric, folder)
    return rows


def _rows(sweep: Sweep, folder: Path) -> list[Row]:
    return [read_row(trial, trial_folder(folder, trial)) for trial in sweep.trials]


def write_report(rows: list[Row], metric: str, folder: Path) -> None:
    """The table to the terminal, the rest into the folder."""
    from train.sweep_plots import plot_curves, plot_scaling, plot_sweep  # matplotlib takes most of a second

    found = efficiencies(rows)
    print("\n".join(["", *table_lines(rows, metric), *([""] if found else []), *efficiency_lines(found)]))
    write_text_atomic(folder / "results.csv", csv_text(rows))
    files = [folder / "results.csv"]
    for path, drawn in (
        (folder / "sweep.png", plot_sweep(rows, metric, folder / "sweep.png")),
        (folder / "loss.png", plot_curves(rows, metric, folder / "loss.png")),
        (folder / "scaling.png", plot_scaling(found, folder / "scaling.png")),
    ):
        files += [path] if drawn else []
    print(f"\n{', '.join(map(str, files))}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
