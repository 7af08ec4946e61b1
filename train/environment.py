"""What a run ran on: versions, machine, size of the job. One flat dict, written when a run starts."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

from ray_deepep.version import __version__
from train.distributed import World

_PACKAGES = ("torch", "deepspeed", "ray")
_GIT_DEADLINE_S = 5.0


def describe_environment(world: World, *, ep_size: int) -> dict[str, str | int]:
    """Of this process; names are what a reader sees."""
    found: dict[str, str | int] = {"ranks": world.world_size, "EP size": ep_size, "device": world.device.type}
    if world.device.type == "cuda":
        found |= {"GPU": torch.cuda.get_device_name(world.device), "CUDA": torch.version.cuda or ""}
    found |= {"host": platform.node(), "CPUs": os.cpu_count() or 0, "system": platform.platform()}
    found |= {"Python": platform.python_version(), "ray_deepep": __version__} | {
        name: _version(name) for name in _PACKAGES
    }
    return found | {"commit": _commit()}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """Of the checkout that this program lies in, with `-dirty` if it was edited; empty for an installed copy."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_DEADLINE_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
