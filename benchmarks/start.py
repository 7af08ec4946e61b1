"""How long a training run takes from its submission as a Ray job to its first step, and where that time goes.

    python -m benchmarks.start                 # 2 CPU workers, on a Ray of this machine
    python -m benchmarks.start --rounds 5 --workers 4

The first job of a Ray also pays for helpers of Ray Train that stay; the others find them there.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm

from train.local_ray import LocalRay
from train.ray_jobs import JobRunner
from train.timeline import StartTimes

from .records import RESULTS, Record, append, gpu_facts, markdown_table, origin, run_facts, workers_text

NAME = "start"
EXPLANATION = (
    "From handing `train.ray_main` to Ray as a job to the end of its first training step, s, median; caches of files "
    "are warm. *Driver*: its process starts and imports Ray Train and torch. *Controller*: Ray Train's processes start "
    "and place the workers. *Workers*: they import torch and DeepSpeed, and the ranks meet."
)
FIRST, FURTHER = "first job of a Ray", "further jobs"


def main(argv: list[str] | None = None) -> None:
    """Run the jobs, append the lines, print the table."""
    args = parse(argv)
    facts = run_facts() | {"benchmark": NAME, "nice": 0}
    with tempfile.TemporaryDirectory(prefix="rd") as folder, LocalRay(num_workers=args.workers) as local:
        runner = JobRunner(local.url, local=True)
        found = [start(runner, args, Path(folder) / str(i)) for i in tqdm(range(args.rounds + 1), unit="job")]
    config = {"workers": args.workers, "preset": args.preset}
    if args.workers * args.gpus_per_worker <= torch.cuda.device_count():  # else they train on CPUs
        facts |= gpu_facts()
        config |= {"gpus_per_worker": args.gpus_per_worker}
    variants = {FIRST: found[:1], FURTHER: found[1:]}
    records = [facts | {"config": config} | summarise(name, times) for name, times in variants.items()]
    append(args.out, records)
    print(table(records))
    print(origin(records, args.out))


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="workers (default: 2)")
    parser.add_argument(
        "--gpus-per-worker", type=float, default=1.0, metavar="G", help="less than 1: they share them (default: 1)"
    )
    parser.add_argument("--preset", default="tiny", help="as of train.main (default: tiny)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="jobs after the first one (default: 3)")
    parser.add_argument("--out", type=Path, default=RESULTS / f"{NAME}.jsonl", help="results file to append to")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"argument --rounds: must be at least 1, got {args.rounds}")
    return args


def start(runner: JobRunner, args: argparse.Namespace, folder: Path) -> StartTimes:
    """Times of one job."""
    folder.mkdir()
    command = [sys.executable, "-m", "train.ray_main", "--preset", args.preset, "--backend", "ray_deepep"]
    command += ["--workers", str(args.workers), "--gpus-per-worker", f"{args.gpus_per_worker:g}"]
    command += ["--out", str(folder / "run"), "--set", "run.steps=2"]
    command += ["--submitted", f"{time.time():.3f}"]
    result = runner.run(" ".join(command), folder / "job.log", lambda line: None)
    return StartTimes(**result["start"])


def summarise(name: str, found: list[StartTimes]) -> Record:
    """Medians of the whole and of its parts, s."""
    totals, parts = [times.total_s for times in found], [times.parts_s() for times in found]
    return {
        "variant": name,
        "num_rounds": len(found),
        "median_s": round(statistics.median(totals), 3),
        "min_s": round(min(totals), 3),
        "max_s": round(max(totals), 3),
        "parts": {part: round(statistics.median(each[part] for each in parts), 3) for part in parts[0]},
    }


def table(records: list[Record]) -> str:
    """A row for each variant, s."""
    rows = []
    for r in records:
        job, imports, connect, controller, workers, engine, step = r["parts"].values()
        split = (job, imports + connect, controller, workers, engine + step)
        spread = f"{r['min_s']:.1f}–{r['max_s']:.1f}"
        rows.append(
            [
                r["variant"],
                workers_text(r["config"]["workers"], r["config"].get("gpus_per_worker", 0.0)),
                str(r["num_rounds"]),
                f"**{r['median_s']:.1f}**",
            ]
            + [spread, *(f"{seconds:.1f}" for seconds in split)]
        )
    header = [
        "to the first step",
        "workers",
        "jobs",
        "s",
        "least–most",
        "of it: job start",
        "driver",
        "controller",
        "workers",
    ]
    return markdown_table([*header, "model, step"], rows)


if __name__ == "__main__":
    main()
