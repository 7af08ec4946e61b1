"""What a run ran on: versions, machine, size of the job. One flat dict, written when a run starts."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import torch

from ray_deepep.checkout import commit_of
from ray_deepep.version import __version__
from train.distributed import World

_PACKAGES = ("torch", "deepspeed", "ray")


def describe_environment(world: World, *, ep_size: int) -> dict[str, str | int]:
    """Of this process; names are what a reader sees."""
    found: dict[str, str | int] = {"ranks": world.world_size, "EP size": ep_size, "device": world.device.type}
    if world.device.type == "cuda":
        found |= {"GPU": torch.cuda.get_device_name(world.device), "CUDA": torch.version.cuda or ""}
    found |= {"host": platform.node(), "CPUs": os.cpu_count() or 0, "system": platform.platform()}
    found |= {"Python": platform.python_version(), "ray_deepep": __version__} | {
        name: _version(name) for name in _PACKAGES
    }
    return found | {"commit": commit_of(Path(__file__).parent)}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
