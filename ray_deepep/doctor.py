"""``ray-deepep doctor``: what this machine has, what is missing, and what to do about it. Needs no GPU."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import shutil

from . import shm


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report."""

    name: str
    status: str
    """``ok``, ``missing`` (an optional part) or ``broken``."""
    value: str
    advice: str = ""


def _package(name: str, advice: str) -> Finding:
    try:
        return Finding(name=name, status="ok", value=importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name=name, status="missing", value="not installed", advice=advice)


def _core() -> Finding:
    version, problem = shm.core_version()
    if version:
        return Finding(name="CPU core", status="ok", value=version)
    advice = "build it: python setup.py build_ext --inplace, or pip install ."
    return Finding(name="CPU core", status="broken", value=problem, advice=advice)


def _shared_memory() -> Finding:
    machine = shm.machine_id()
    if machine.startswith("pid "):
        advice = "ranks of this host cannot find each other; transport reference still works"
        return Finding(name="shared memory", status="broken", value=machine, advice=advice)
    return Finding(name="shared memory", status="ok", value="anonymous segments (memfd); /dev/shm is not used")


def _gpu() -> Finding:
    if shutil.which("nvidia-smi") is None:
        return Finding(
            name="GPU", status="missing", value="no nvidia-smi", advice="not needed: this version runs on CPUs"
        )
    return Finding(name="GPU", status="ok", value="nvidia-smi found; this version computes on CPUs")


def findings() -> list[Finding]:
    """All checks, in the order of the report."""
    return [
        _core(),
        _shared_memory(),
        Finding(name="CPU cores", status="ok", value=str(len(os.sched_getaffinity(0)))),
        _package("torch", "pip install 'torch>=2.11,<2.15'"),
        _package("ray", "pip install 'ray-deepep[ray]' to train on Ray"),
        _package("deepspeed", "pip install 'ray-deepep[deepspeed]' to swap DeepSpeed's MoE layers"),
        _gpu(),
    ]


def report(*, as_json: bool = False) -> int:
    """Print the report; the exit code is 1 if something is broken."""
    found = findings()
    if as_json:
        print(json.dumps([dataclasses.asdict(f) for f in found], indent=1))
    else:
        width = max(len(f.name) for f in found)
        for f in found:
            print(f"{f.status:8} {f.name:{width}}  {f.value}" + (f"  -> {f.advice}" if f.advice else ""))
    return 1 if any(f.status == "broken" for f in found) else 0
