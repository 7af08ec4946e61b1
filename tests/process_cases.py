"""Processes below another one, as /proc has them, and waiting for their end."""

import time
from pathlib import Path


def parents() -> dict[int, int]:
    """Of every living process. One that has ended may stay in /proc until whoever adopted it asks."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":
            found[int(stat.parent.name)] = int(fields[1])
    return found


def processes_below(root: int) -> list[int]:
    """Living processes that came from `root`."""
    children: dict[int, list[int]] = {}
    for pid, parent in parents().items():
        children.setdefault(parent, []).append(pid)
    found, stack = [], [root]
    while stack:
        below = children.get(stack.pop(), [])
        found += below
        stack += below
    return found


def wait_until_gone(pids: list[int], deadline_s: float) -> list[int]:
    end = time.monotonic() + deadline_s
    while time.monotonic() < end:
        living = parents()
        pids = [pid for pid in pids if pid in living]
        if not pids:
            break
        time.sleep(0.1)
    return pids
