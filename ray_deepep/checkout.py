"""Which commit a folder's files are of."""

from __future__ import annotations

import subprocess
from pathlib import Path

_DEADLINE_S = 5.0


def commit_of(folder: str | Path) -> str:
    """Of the git checkout that ``folder`` lies in, with ``-dirty`` if it was edited; empty where there is none."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude", "*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_DEADLINE_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
