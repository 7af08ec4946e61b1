"""``ray-deepep``: the command line.

ray-deepep doctor [--json]              what is installed here and what is missing, with what to do about it
ray-deepep run script.py [args ...]     run a DeepSpeed script with its MoE layers swapped, unedited
"""

from __future__ import annotations

import argparse
import sys

from . import doctor
from .version import __version__


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(prog="ray-deepep", description=__doc__.split("\n")[0])
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("doctor", help="say what is installed and what is missing")
    check.add_argument("--json", action="store_true", help="machine-readable output")
    run = commands.add_parser("run", help="run a DeepSpeed script with its MoE layers swapped")
    run.add_argument("script")
    run.add_argument("args", nargs=argparse.REMAINDER)
    options = parser.parse_args(argv)
    if options.command == "doctor":
        return doctor.report(as_json=options.json)
    from .deepspeed.launch import run_script

    return run_script([options.script, *options.args]) or 0


if __name__ == "__main__":
    sys.exit(main())
