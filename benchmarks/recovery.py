"""How long a Ray run takes from a fault to its report, and to training again: one row for each kind of fault.

    python -m benchmarks.recovery                       # CPU workers on a Ray of this machine
    python -m benchmarks.recovery --transport cuda      # GPU workers, and a failed assertion in a kernel
    python -m benchmarks.recovery --kinds kill hang --rounds 3

One training run has all faults of a round, one after the other, each in an attempt of its own; a node that dies has a
run on a cluster of several (pretended) nodes on this machine. What a rank does to others is seen at the deadline of
their collectives where its process lives on (``stop``, ``hang``), else when its process or its communicator is gone.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from train.timeline import RecoveryTimes

from .records import RESULTS, ROOT, Record, append, gpu_facts, markdown_table, origin, run_facts, workers_text

NAME = "recovery"
EXPLANATION = (
    "A worker of a training run under Ray Train is killed, stopped, raises, hangs in user code, runs out of memory, or "
    "loses its node; s. *To report*: from the fault to the line that names the culprit, for `stop` and `hang` the "
    "deadline of a collective included, and without it beside that. *Training again*: from the fault to the end of the "
    "first step from the last checkpoint, in new processes."
)
KINDS = ("kill", "stop", "raise", "hang", "oom", "assert", "node")
AT_THE_DEADLINE = ("stop", "hang")
STEPS_PER_FAULT = 4
_RESULT, _FAULT = "TRAIN_RESULT ", "RAY_DEEPEP_FAULT "


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """What all runs of this benchmark share."""

    num_workers: int
    transport: str
    deadline_s: float
    """Of a collective."""
    timeout_s: float
    """Of a whole run."""
    gpus_per_worker: float = 1.0
    """Less than 1: they share them."""


def main(argv: list[str] | None = None) -> int:
    """Run the rounds, append their lines, print the table. Returns the exit status: 2 where nothing can be measured."""
    args = parse(argv)
    setup = Setup(
        num_workers=args.workers,
        transport=args.transport,
        deadline_s=args.deadline,
        timeout_s=args.timeout,
        gpus_per_worker=args.gpus_per_worker,
    )
    kinds = [kind for kind in args.kinds if not why_not(kind, setup)]
    for kind in args.kinds:
        if reason := why_not(kind, setup):
            print(f"{kind} is left out: {reason}")
    if not kinds:
        print("no fault is left to measure", file=sys.stderr)
        return 2
    records: list[Record] = []
    runs = [[kind for kind in kinds if kind != "node"], [kind for kind in kinds if kind == "node"]]
    with tqdm(total=args.rounds * len(kinds), unit="fault") as bar:
        for _ in range(args.rounds):
            for group in filter(None, runs):
                found = measure(group, setup)
                append(args.out, found)
                records += found
                bar.update(len(group))
    print(table(records))
    print(origin(records, args.out))
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="faults (default: all)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="workers (default: 2)")
    parser.add_argument("--transport", choices=("shm", "cuda"), default="shm", help="what the run trains over")
    parser.add_argument(
        "--gpus-per-worker", type=float, default=1.0, metavar="G", help="less than 1: they share them (default: 1)"
    )
    parser.add_argument("--deadline", type=float, default=4.0, metavar="S", help="of a collective, s (default: 4)")
    parser.add_argument("--timeout", type=float, default=900.0, metavar="S", help="of a whole run, s (default: 900)")
    parser.add_argument("--rounds", type=int, default=1, metavar="N", help="how often each fault is done (default: 1)")
    parser.add_argument("--out", type=Path, default=RESULTS / f"{NAME}.jsonl", help="results file to append to")
    args = parser.parse_args(argv)
    if args.transport == "cuda" and not torch.cuda.is_available():
        parser.error("argument --transport: cuda needs a GPU, and torch sees none")
    return args


def why_not(kind: str, setup: Setup) -> str:
    """Why a kind cannot be done over a transport, or with so many workers; empty if it can."""
    if kind == "hang" and setup.num_workers == 1:
        return "nobody waits for the only worker (`hang_deadline_s` ends it, after many minutes)"
    if kind == "assert" and setup.transport != "cuda":
        return "it needs a GPU (--transport cuda)"
    if kind == "node" and setup.transport == "cuda":
        return "pretended nodes of one machine cannot share its GPUs"
    return ""


def measure(kinds: list[str], setup: Setup) -> list[Record]:
    """One line per fault of a run that has all of ``kinds``."""
    facts = run_facts() | {"benchmark": NAME, "nice": 0} | (gpu_facts() if setup.transport == "cuda" else {})
    with tempfile.TemporaryDirectory(prefix="rd") as folder, ray_for(kinds, setup, folder) as env:
        text = train(kinds, setup, Path(folder) / "run", env)
    config = dataclasses.asdict(setup)
    del config["timeout_s"]  # a longer one changes no figure
    if setup.gpus_per_worker == 1:
        del config["gpus_per_worker"]  # lines of before this was a choice are of the same case
    return [facts | {"config": config | {"kind": r.pop("kind")}} | r for r in recoveries(text)]


@contextlib.contextmanager
def ray_for(kinds: list[str], setup: Setup, folder: str) -> Iterator[dict[str, str]]:
    """Variables that lead a run to its Ray: none where it starts one itself, a cluster where a node is to die."""
    if "node" not in kinds:
        yield {}
        return
    from ray.cluster_utils import Cluster

    # A folder of its own, so that no other Ray of this machine takes the cluster's address for its own.
    os.environ["RAY_TMPDIR"] = folder
    cluster = Cluster()
    try:
        # With a dashboard: Ray Train's helpers ask it for the state of actors.
        head = {
            "include_dashboard": True,
            "dashboard_port": 0,
            "_system_config": {"prestart_worker_first_driver": False},
        }
        cluster.add_node(num_cpus=0, **head)
        for _ in range(setup.num_workers + 1):
            cluster.add_node(num_cpus=1)
        yield {"RAY_ADDRESS": cluster.address}
    finally:
        cluster.shutdown()
        del os.environ["RAY_TMPDIR"]


def train(kinds: list[str], setup: Setup, out: Path, env: dict[str, str]) -> str:
    """The output of a training run whose last rank suffers a fault of each kind.

    Raises:
        RuntimeError: it failed, with the end of its output.
    """
    rank = setup.num_workers - 1
    faults = [f"{kind}:rank={rank},step={STEPS_PER_FAULT * i + 3}" for i, kind in enumerate(kinds)]
    steps = STEPS_PER_FAULT * len(kinds) + 4
    command = [sys.executable, "-m", "train.ray_main", "--preset", "tiny", "--backend", "ray_deepep"]
    command += ["--workers", str(setup.num_workers), "--out", str(out), "--max-failures", str(len(kinds) + 1)]
    command += ["--gpus-per-worker", f"{setup.gpus_per_worker:g}"]
    command += ["--inject", *faults, "--set", f"run.steps={steps}", "run.checkpoint_every=2", "data.max_bytes=65536"]
    env = {"RAY_DEEPEP_DEADLINE_S": str(setup.deadline_s), "RAY_DEEPEP_TRANSPORT": setup.transport, **env}
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=setup.timeout_s,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-4000:]}")
    return done.stdout


def recoveries(text: str) -> list[Record]:
    """From the output of a run: each fault's kind, cause, seconds to its report and to training again.

    A fault that nobody reported has ``report_s`` NaN and no cause.
    """
    lines = text.splitlines()
    reports: dict[int, dict[str, Any]] = {}
    for line in lines:
        if _FAULT in line:
            report = json.loads(line.partition(_FAULT)[2])
            reports.setdefault(report["attempt"], report)
    (result,) = (json.loads(line.partition(_RESULT)[2]) for line in lines if line.startswith(_RESULT))
    found = []
    for attempt, recovery in enumerate(result["recoveries"], start=1):
        kind, report = recovery.pop("kind"), reports.get(attempt, {})
        times = RecoveryTimes(**recovery)
        found.append(
            {
                "kind": kind,
                "cause": report.get("cause", ""),
                "named_rank": report.get("rank", -1),
                "report_s": round(report.get("time_s", math.nan) - times.fault, 3),
                "training_again_s": round(times.total_s, 3),
                "parts": {name: round(seconds, 3) for name, seconds in times.parts_s().items()},
            }
        )
    return found


def table(records: list[Record]) -> str:
    """A row for each fault, s."""
    rows = []
    for r in records:
        kind, config = r["config"]["kind"], r["config"]
        beyond = r["report_s"] - config["deadline_s"] if kind in AT_THE_DEADLINE else r["report_s"]
        parts = list(r["parts"].values())
        share = config.get("gpus_per_worker", 1.0) if config["transport"] == "cuda" else 0.0
        workers = workers_text(config["num_workers"], share)
        rows.append(
            [kind, workers, r["cause"], f"{r['report_s']:.1f}", f"{beyond:.1f}", f"{r['training_again_s']:.1f}"]
            + [f"{seconds:.1f}" for seconds in (parts[0], parts[1], parts[2] + parts[3])]
        )
    header = ["fault", "workers", "named as", "to report", "beyond deadline", "training again"]
    return markdown_table([*header, "of it: teardown", "new workers", "engine, step"], rows)


if __name__ == "__main__":
    sys.exit(main())
