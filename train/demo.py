"""The demo: a small MoE language model trained as a Ray job, with ray_deepep and with stock DeepSpeed, and compared.

    make demo
    python -m train.demo --data my_texts/ --steps 400 --workers 4
    python -m train.demo --resume runs/demo --steps 400
    RAY_ADDRESS=http://HEAD:8265 python -m train.demo --out /shared/demo

Without RAY_ADDRESS it starts a Ray of its own with a dashboard, and ends it, whatever happens to this process. On a
cluster, all nodes need this project installed and must see --out.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from train.cli import fields_from
from train.config import BACKENDS, TrainConfig
from train.errors import ConfigError, DataError
from train.job_bar import JobBar
from train.local_ray import LocalRay, LocalRayError
from train.presets import get_preset
from train.ray_jobs import JobFailedError, JobRunner
from train.ray_options import RayOptions
from train.readers import find_files
from train.timeline import StartTimes


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """What the demo is asked to do."""

    preset: str
    data: tuple[str, ...]
    workers: int
    gpus_per_worker: float = 1.0
    """As `train.ray_main` has it."""
    steps: int | None
    """None: the preset's."""
    out: Path
    resume: bool
    backends: tuple[str, ...]
    fields: tuple[str, ...] = ()
    """FIELD=VALUE each, as `train.ray_main --set` takes them."""
    python: str = ""
    """Python of the cluster's nodes; empty: ours where the head is this machine, else `python`."""

    def entrypoint(self, backend: str, *, here: bool) -> str:
        """The command of one backend's job. here: whether the head node is this machine."""
        command = [
            self.python or (sys.executable if here else "python"),
            "-m",
            "train.ray_main",
            "--preset",
            self.preset,
            "--backend",
            backend,
        ]
        command += ["--workers", str(self.workers), "--out", str(self.out / backend)]
        command += ["--gpus-per-worker", f"{self.gpus_per_worker:g}"] if self.gpus_per_worker != 1 else []
        command += ["--submitted", f"{time.time():.3f}"]
        command += ["--data", *self.data] if self.data else []
        command += ["--steps", str(self.steps)] if self.steps is not None else []
        command += ["--resume"] if self.resume else []
        command += ["--set", *self.fields] if self.fields else []
        return shlex.join(command)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of each run."""
        return self.config.run.steps if self.steps is None else self.steps

    @property
    def config(self) -> TrainConfig:
        """Of both runs, as far as they share it. Raises ConfigError."""
        return get_preset(self.preset).replace(**fields_from(self.fields))


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, 1 when a job failed, 2 after an error the user can do something about."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        options = options_from_args(argv)
        return run_demo(options)
    except (ConfigError, DataError, LocalRayError, ConnectionError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except JobFailedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def _terminate(*_: object) -> None:
    raise KeyboardInterrupt


def options_from_args(argv: list[str] | None) -> DemoOptions:
    """Parse and check. Raises ConfigError, DataError."""
    parser = argparse.ArgumentParser(
        prog="train.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", nargs="+", default=[], metavar="PATH", help="text: files or folders (txt, jsonl, parquet)"
    )
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="workers (default: 2)")
    parser.add_argument(
        "--gpus-per-worker",
        type=float,
        default=1.0,
        metavar="G",
        help="GPUs of each (default: 1); less: they share them",
    )
    parser.add_argument("--steps", type=int, metavar="N", help="optimizer steps (default: the preset's)")
    parser.add_argument("--preset", default="demo", help="size of the run (default: demo)")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the demo (default: runs/demo, or a new one beside it)"
    )
    parser.add_argument(
        "--resume", nargs="?", const="runs/demo", metavar="DIR", help="continue the demo in this folder"
    )
    parser.add_argument("--python", default="", metavar="PATH", help="with RAY_ADDRESS: Python of the cluster's nodes")
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, default=["ray_deepep", "stock"], help="which to run")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="FIELD=VALUE", help="other fields, as in train.main"
    )
    args = parser.parse_args(argv)
    RayOptions(num_workers=args.workers, gpus_per_worker=args.gpus_per_worker)  # checks them
    if args.steps is not None and args.steps < 1:
        raise ConfigError("--steps", args.steps, "must be at least 1")
    if args.resume and not (Path(args.resume) / args.backend[0] / "checkpoints").is_dir():
        raise ConfigError("--resume", args.resume, "must be the folder of an earlier demo")
    if args.data:
        find_files(tuple(args.data))
    out = Path(args.resume) if args.resume else args.out or _new_folder(Path("runs/demo"))
    _check_out(out.absolute())
    options = DemoOptions(
        preset=args.preset,
        data=tuple(str(Path(path).absolute()) for path in args.data),
        workers=args.workers,
        gpus_per_worker=args.gpus_per_worker,
        steps=args.steps,
        out=out.absolute(),
        resume=bool(args.resume),
        backends=tuple(args.backend),
        fields=tuple(args.set),
        python=args.python,
    )
    options.config.model.resolve_ep_size(options.workers)
    return options


def _check_out(out: Path) -> None:
    """Before Ray is started, which takes seconds. Makes nothing: a demo that does not start leaves no folder."""
    parent = next(path for path in (out, *out.parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ConfigError("--out", str(out), f"must be a folder that can be written to, and {parent} is none")


def _new_folder(wanted: Path) -> Path:
    """`wanted`, or the first of wanted-2, wanted-3, ... that does not exist: an earlier demo's results stay."""
    number, folder = 1, wanted
    while folder.exists():
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    return folder


def run_demo(options: DemoOptions) -> int:
    """Run every backend's job and print the comparison. Returns the exit status."""
    with _ray(options) as (runner, url):
        options.out.mkdir(parents=True, exist_ok=True)
        results = {backend: run_backend(options, backend, runner) for backend in options.backends}
    print_summary(options, results, url)
    return 0


@contextlib.contextmanager
def _ray(options: DemoOptions) -> Iterator[tuple[JobRunner, str]]:
    """Job submission to the cluster of RAY_ADDRESS, or to a Ray started for this demo; and the dashboard's address."""
    if os.environ.get("RAY_ADDRESS"):
        runner = JobRunner(None, local=False)
        print(f"submitting to the cluster at {runner.url}")
        yield runner, runner.url
        return
    print("starting Ray on this machine", flush=True)
    begin = time.monotonic()
    with LocalRay(num_workers=options.workers) as local:
        print(f"Ray is up after {time.monotonic() - begin:.1f} s; dashboard: {local.url}")
        for note in local.notes:
            print(f"  {note}")
        yield JobRunner(local.url, local=True), local.url


def run_backend(options: DemoOptions, backend: str, runner: JobRunner) -> dict:
    """Submit one backend's job, show its progress, return its result."""
    command = options.entrypoint(backend, here=runner.head_is_here)
    log_path = options.out / f"job-{backend}.log"
    print(f"\n{backend}: submitted as a Ray job; its log: {log_path}")
    with JobBar(backend, num_steps=options.num_steps) as bar:
        return runner.run(command, log_path, bar.show)


def print_summary(options: DemoOptions, results: dict[str, dict], url: str) -> None:
    """The comparison, where everything is, and where the time to the first step went."""
    from train.metrics import RunStats
    from train.report import compare_runs, format_comparison

    print()
    folders = [options.out / backend for backend in results]
    if all((folder / "metrics.jsonl").is_file() for folder in folders):
        print(compare_runs(folders, plot=options.out / "loss.png"))
    else:  # the cluster's folder is not mounted here
        print(format_comparison({name: RunStats(**result["stats"]) for name, result in results.items()}))
    print()
    for backend, result in results.items():
        if result["start"]:  # a demo that is resumed at its end has no step to do
            print(f"{backend}: time from submission to the first step {StartTimes(**result['start'])}")
        print(f"{backend}: checkpoint {result['checkpoint']}")
        print(f"{backend}: metrics {result['metrics']}")
    print(f"loss plot {options.out / 'loss.png'}")
    print(f"dashboard, while it ran: {url}")


if __name__ == "__main__":
    sys.exit(main())
