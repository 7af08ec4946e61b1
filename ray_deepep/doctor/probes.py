"""Reads the machine: files, short commands, package metadata. Never raises, never waits long; judges nothing."""

from __future__ import annotations

import concurrent.futures
import importlib.metadata
import importlib.util
import os
import pathlib
import platform
import re
import resource
import shutil
import socket
import sys
import tomllib
from collections.abc import Iterable

import torch

from .. import cuda, env, nvshmem, shm
from ..version import __version__
from .commands import entries, first_that_works, last_line, read, run
from .readings import (
    GPU_COLUMNS,
    TORCH_PROGRAM,
    GpuReadings,
    IbPort,
    Output,
    Readings,
    SoftwareReadings,
    SystemReadings,
)

PACKAGES = ("torch", "ray", "deepspeed", "nvidia-nvshmem-cu12", "nvidia-nvshmem-cu13")
_NVIDIA_VENDOR, _DISPLAY_CLASS = "0x10de", "0x03"
_TORCH_TIMEOUT_S = 60.0


def read_machine() -> Readings:
    """Everything the judgements need; some seconds with GPUs, less without."""
    return Readings(host=socket.gethostname(), gpu=read_gpus(), system=read_system(), software=read_software())


def read_gpus() -> GpuReadings:
    """What ``nvidia-smi``, the kernel and torch's CUDA runtime say about the GPUs."""
    has_nvidia_smi = shutil.which("nvidia-smi") is not None
    nothing = Output()
    outputs = _run_all(_gpu_commands()) if has_nvidia_smi else {}
    pipe_directory = env.cuda_mps_pipe_directory()
    return GpuReadings(
        num_pci_gpus=_num_pci_gpus(),
        has_nvidia_smi=has_nvidia_smi,
        **{name: outputs.get(name, nothing) for name in _gpu_commands()},
        kernel_log=_kernel_log() if has_nvidia_smi else nothing,
        torch=_torch() if has_nvidia_smi else nothing,
        mps_pipe_directory=pipe_directory,
        mps_pipe_exists=os.path.exists(os.path.join(pipe_directory, "control")),
        mps_daemons=_processes("nvidia-cuda-mps-control"),
    )


def read_system() -> SystemReadings:
    """What /proc and /sys say."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    modules = ("nvidia_peermem", "gdrdrv")
    return SystemReadings(
        num_cpus=len(os.sched_getaffinity(0)),
        machine_id=shm.machine_id(),
        shm_bytes=_filesystem_bytes("/dev/shm"),
        memlock_bytes=None if limit == resource.RLIM_INFINITY else limit,
        ib_ports=_ib_ports(),
        kernel_modules=tuple(name for name in modules if os.path.isdir(f"/sys/module/{name}")),
    )


def read_software() -> SoftwareReadings:
    """Versions, and whether the compiled cores load."""
    version, trouble = shm.core_version()
    cuda_version, cuda_trouble = cuda.core_version()
    return SoftwareReadings(
        python=platform.python_version(),
        version=__version__,
        cpu_core=Output(text=version, problem=trouble),
        cuda_core=Output(text=cuda_version, problem=cuda_trouble),
        nvcc=first_that_works(("nvcc", "--version"), ("/usr/local/cuda/bin/nvcc", "--version")),
        torch_cuda=torch.version.cuda or "",
        packages={name: version for name in PACKAGES if (version := _version(name))},
        requirements=_own_requirements(),
        torch_requirements=_requirements("torch"),
        num_modules=len(bytecode := _bytecode_files("torch")),
        num_uncompiled=sum(not os.path.exists(path) for path in bytecode),
        nvshmem_core=_nvshmem_core(),
    )


def _gpu_commands() -> dict[str, tuple[tuple[str, ...], ...]]:
    """By reading: commands to try in turn. Apart from each other, because an old driver refuses a whole query for one
    field that it does not know."""

    def query(*columns: str, what: str = "gpu") -> tuple[str, ...]:
        return ("nvidia-smi", f"--query-{what}={','.join(columns)}", "--format=csv,noheader,nounits")

    return {
        "gpus": (query(*GPU_COLUMNS),),
        "clocks": (query("index", "clocks_event_reasons.active"), query("index", "clocks_throttle_reasons.active")),
        "ecc": (query("index", "ecc.errors.uncorrected.volatile.total"),),
        "remapped_rows": (query("gpu_uuid", "remapped_rows.pending", "remapped_rows.failure", what="remapped-rows"),),
        "nvlink": (("nvidia-smi", "nvlink", "--status"),),
        "peer_access": (("nvidia-smi", "topo", "-p2p", "r"),),
    }


def _run_all(commands: dict[str, tuple[tuple[str, ...], ...]]) -> dict[str, Output]:
    with concurrent.futures.ThreadPoolExecutor(len(commands)) as pool:
        runs = {name: pool.submit(first_that_works, *variants) for name, variants in commands.items()}
        return {name: done.result() for name, done in runs.items()}


def _torch() -> Output:
    # In a process of its own: a driver that hangs must not take this one along.
    output = run(sys.executable, "-c", TORCH_PROGRAM, timeout_s=_TORCH_TIMEOUT_S)
    answers = [line for line in output.text.splitlines() if line.startswith("{")]
    return Output(text=answers[-1]) if answers else Output(problem=output.problem or last_line(output.text))


def _kernel_log() -> Output:
    log = run("dmesg")
    if log.problem:
        return log
    return Output(text="\n".join(line for line in log.text.splitlines() if "NVRM:" in line))


def _num_pci_gpus() -> int:
    devices = entries("/sys/bus/pci/devices")
    return sum(
        read(device / "vendor") == _NVIDIA_VENDOR and read(device / "class").startswith(_DISPLAY_CLASS)
        for device in devices
    )


def _ib_ports() -> tuple[IbPort, ...]:
    return tuple(
        IbPort(
            device=device.name,
            port=int(port.name),
            state=read(port / "state"),
            rate=read(port / "rate"),
            link_layer=read(port / "link_layer"),
        )
        for device in entries("/sys/class/infiniband")
        for port in entries(device / "ports")
        if port.name.isdigit()
    )


def _processes(program: str) -> tuple[str, ...]:
    """Process ids of a program, as far as this user may see them."""
    found = []
    for folder in entries("/proc"):
        if folder.name.isdigit() and os.path.basename(read(folder / "cmdline").split("\0")[0]) == program:
            found.append(folder.name)
    return tuple(found)


def _filesystem_bytes(path: str) -> int | None:
    try:
        status = os.statvfs(path)
    except OSError:
        return None
    return status.f_blocks * status.f_frsize


def _nvshmem_core() -> Output:
    if importlib.util.find_spec("ray_deepep._nvshmem") is None:
        return Output()
    try:
        return Output(text=nvshmem.load().built_version())
    except (ImportError, OSError) as error:
        return Output(problem=str(error))


def _bytecode_files(package: str) -> list[str]:
    """Where Python looks for the bytecode of a package's loaded modules."""
    specs = [module.__spec__ for name, module in list(sys.modules.items()) if name.split(".")[0] == package]
    return [spec.cached for spec in specs if spec is not None and spec.cached]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _own_requirements() -> tuple[str, ...]:
    """Those of this package: installed, or run from its sources."""
    if installed := _requirements("ray-deepep"):
        return installed
    text = read(pathlib.Path(__file__).parents[2] / "pyproject.toml")
    project = tomllib.loads(text).get("project", {}) if text else {}
    declared = [project.get("dependencies", []), *project.get("optional-dependencies", {}).values()]
    return _plain(line for lines in declared for line in lines)


def _requirements(package: str) -> tuple[str, ...]:
    try:
        return _plain(importlib.metadata.requires(package) or [])
    except importlib.metadata.PackageNotFoundError:
        return ()


def _plain(requirements: Iterable[str]) -> tuple[str, ...]:
    """Without markers and extras: ``ray>=2.60,<2.61`` for ``ray[default,train]>=2.60,<2.61; extra == "ray"``."""
    plain = (re.sub(r"\[.*?\]|\s", "", line.split(";")[0]) for line in requirements)
    return tuple(line for line in plain if re.search(r"[<>=~!]", line))
