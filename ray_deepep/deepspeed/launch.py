"""Runs an unmodified script; with ``RAY_DEEPEP=1`` its DeepSpeed MoE layers are swapped.

    RAY_DEEPEP=1 ray-deepep run train.py --args
    RAY_DEEPEP=1 torchrun --nproc-per-node 2 -m ray_deepep.deepspeed.launch train.py --args
    RAY_DEEPEP=1 deepspeed --num_gpus 2 --module ray_deepep.deepspeed.launch train.py --args

``RAY_DEEPEP_LAYOUT``, ``RAY_DEEPEP_COMBINE`` and the others of ``ray_deepep/env.py`` say how.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence
from contextlib import nullcontext

from .. import env
from ..errors import InvalidArgumentError
from .autoswap import AutoSwap


def run_script(argv: Sequence[str]) -> None:
    """Run ``argv[0]`` as ``__main__`` with the rest as its arguments, as ``python script args`` would.

    Options before the script are handed on to it: DeepSpeed's launcher puts ``--local_rank=N`` first. The swap is
    closed when the script ends, however it ends.

    Raises:
        InvalidArgumentError: no script is named, or there is no such file.
    """
    _run(*_split(argv))


def _split(argv: Sequence[str]) -> tuple[str, list[str]]:
    """Script and arguments."""
    position = next((i for i, argument in enumerate(argv) if not argument.startswith("-")), None)
    if position is None:
        raise InvalidArgumentError("argv", list(argv), "must name a script")
    script = argv[position]
    if not os.path.isfile(script):
        raise InvalidArgumentError("script", script, "must be an existing file")
    return script, [*argv[:position], *argv[position + 1 :]]


def _run(script: str, arguments: list[str]) -> None:
    saved_argv, saved_path = sys.argv, list(sys.path)
    sys.argv = [script, *arguments]
    # As python does: modules beside the script are importable.
    sys.path[0] = os.path.dirname(os.path.abspath(script))
    try:
        with AutoSwap() if env.enabled() else nullcontext():
            runpy.run_path(script, run_name="__main__")
    finally:
        sys.argv, sys.path[:] = saved_argv, saved_path


def main() -> None:
    """``python -m ray_deepep.deepspeed.launch script.py args``."""
    try:
        script, arguments = _split(sys.argv[1:])
    except InvalidArgumentError as error:
        raise SystemExit(f"ray_deepep.deepspeed.launch: {error}") from None
    _run(script, arguments)


if __name__ == "__main__":
    main()
