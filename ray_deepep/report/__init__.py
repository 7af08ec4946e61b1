"""``ray-deepep report``: one self-contained HTML page about training runs, from the files in their folders.

    ray-deepep report runs/demo/ray_deepep runs/demo/stock --out compare.html

The page needs no network and no JavaScript: tables, and SVG drawn here. Runs that crashed, still go or were cut in the
middle of a line are shown as far as they came.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from ..errors import InvalidArgumentError
from .page import render_page
from .reader import Run, find_runs, read_run

__all__ = ["Run", "find_runs", "read_run", "render_page", "write_report"]

_SUFFIXES = (".html", ".htm")


def write_report(paths: Sequence[str | Path], out: str | Path) -> list[Run]:
    """Write the page about the runs in ``paths`` (folders of runs, or folders that hold some) to ``out``.

    Returns the runs, in the order of the page.

    Raises:
        InvalidArgumentError: a path is no run and holds none, or ``out`` cannot be written.
    """
    target = Path(out)
    if target.suffix not in _SUFFIXES:
        raise InvalidArgumentError("out", str(out), f"must end in {' or '.join(_SUFFIXES)}")
    runs = find_runs(paths)
    page = render_page(runs, now=time.time())
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(page, encoding="utf-8")
        os.replace(temporary, target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InvalidArgumentError("out", str(out), f"must be a file that can be written ({error.strerror})") from error
    return runs
