"""``ray-deepep``: the command line.

ray-deepep doctor [--bandwidth] [--json]     what this machine has, what is missing or sick, what to do about it
ray-deepep doctor --cluster [ADDRESS]        the same on every node of a Ray cluster, and where nodes differ
ray-deepep report RUN [RUN ...] [--out FILE] one HTML page about training runs, from their folders
ray-deepep plan --nodes N --gpus-per-node G .. predict time, bytes and memory of a layer on a cluster
ray-deepep submit MODULE [args ...]          run a module, or a command, as a job of a Ray cluster
ray-deepep status [JOB | RUN] [--json]       how jobs and runs are doing: phase, step, loss, restarts, last fault
ray-deepep stop JOB                          end a job, which writes a checkpoint first
ray-deepep dashboard install|show            the Grafana board of training runs, for a running head node
ray-deepep run script.py [args ...]          run a DeepSpeed script with its MoE layers swapped, unedited
"""

from __future__ import annotations

import argparse
import os
import sys

from . import cli_jobs, doctor, env, planning
from .errors import InvalidArgumentError
from .version import __version__


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(prog="ray-deepep", description=__doc__.split("\n")[0])
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_doctor(commands)
    _add_report(commands)
    planning.add_plan(commands)
    run = commands.add_parser("run", help="run a DeepSpeed script with its MoE layers swapped")
    run.add_argument("script")
    run.add_argument("args", nargs=argparse.REMAINDER)
    job_handlers = cli_jobs.register(commands)
    options = parser.parse_args(argv)
    handlers = {"doctor": _doctor, "report": _report, "run": _run} | job_handlers
    # Those that live in a package of their own bring what is to be called with them.
    return getattr(options, "handler", handlers.get(options.command))(options)


def _add_doctor(commands: argparse._SubParsersAction) -> None:
    check = commands.add_parser(
        "doctor", help="say what this machine has, what is missing or sick, what to do about it"
    )
    check.add_argument("--json", action="store_true", help="machine-readable output")
    where = check.add_mutually_exclusive_group()
    where.add_argument("--bandwidth", action="store_true", help="also move rows between all pairs of ranks here")
    where.add_argument(
        "--cluster",
        nargs="?",
        const="auto",
        metavar="ADDRESS",
        help="every node of a Ray cluster: RAY_ADDRESS or the one of this machine, if no address is given",
    )
    check.add_argument("--ranks", type=int, help="processes of --bandwidth; one per GPU, or 2 to 4 on CPUs")
    check.add_argument("--deadline", type=float, metavar="S", help="seconds for --bandwidth or --cluster (120)")


def _run(options: argparse.Namespace) -> int:
    try:
        # Asked here, where nothing of the script's own can be mistaken for it.
        env.enabled()
        if not os.path.isfile(options.script):
            raise InvalidArgumentError("script", options.script, "must be an existing file")
    except InvalidArgumentError as error:
        print(f"ray-deepep run: {error}", file=sys.stderr)
        return 2
    from .deepspeed.launch import run_script

    run_script([options.script, *options.args])
    return 0


def _doctor(options: argparse.Namespace) -> int:
    deadline_s = 120.0 if options.deadline is None else options.deadline
    try:
        if options.ranks is not None and not options.bandwidth:
            raise InvalidArgumentError("--ranks", options.ranks, "goes with --bandwidth only")
        if options.deadline is not None and not options.bandwidth and options.cluster is None:
            raise InvalidArgumentError("--deadline", options.deadline, "goes with --bandwidth or --cluster only")
        if options.cluster is not None:
            from .cluster.doctor import run_cluster

            return run_cluster(options.cluster, as_json=options.json, deadline_s=deadline_s)
        test = doctor.PairTest(num_ranks=options.ranks, deadline_s=deadline_s) if options.bandwidth else None
    except InvalidArgumentError as error:
        print(f"ray-deepep doctor: {error}", file=sys.stderr)
        return 2
    return doctor.run(as_json=options.json, bandwidth=test)


def _add_report(commands: argparse._SubParsersAction) -> None:
    page = commands.add_parser("report", help="write one HTML page about training runs, from their folders")
    page.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, or a folder of such folders")
    page.add_argument("--out", default="report.html", metavar="FILE", help="the page (default: report.html)")


def _report(options: argparse.Namespace) -> int:
    from .report import write_report

    try:
        runs = write_report(options.runs, options.out)
    except InvalidArgumentError as error:
        print(f"ray-deepep report: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {', '.join(run.label for run in runs)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
