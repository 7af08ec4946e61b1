"""Readings of machines that are not here, for the tests of the doctor."""

from __future__ import annotations

import dataclasses
import pathlib

from ray_deepep.doctor.readings import GpuReadings, IbPort, Output, Readings, SoftwareReadings, SystemReadings

FOLDER = pathlib.Path(__file__).parent / "readings"
REQUIREMENTS = ("torch>=2.11,<2.15", "ray>=2.60,<2.61", "deepspeed<0.20,>=0.19.4")


def gpu_readings(name: str, **changes: object) -> GpuReadings:
    """What the driver's tools print on the machine ``name``, with some readings replaced."""
    files = {path.stem: Output(text=path.read_text()) for path in (FOLDER / name).glob("*.*")}
    readings = GpuReadings(
        num_pci_gpus=len(files["gpus"].text.splitlines()),
        has_nvidia_smi=True,
        kernel_log=Output(problem="dmesg: read kernel buffer failed: Operation not permitted"),
        mps_pipe_directory="/tmp/nvidia-mps",
        mps_pipe_exists=False,
        mps_daemons=(),
        **files,
    )
    return dataclasses.replace(readings, **changes)


def no_gpu_readings(**changes: object) -> GpuReadings:
    """A machine without ``nvidia-smi``."""
    names = ("gpus", "clocks", "ecc", "remapped_rows", "nvlink", "peer_access", "kernel_log", "torch")
    readings = GpuReadings(
        num_pci_gpus=0,
        has_nvidia_smi=False,
        mps_pipe_directory="/tmp/nvidia-mps",
        mps_pipe_exists=False,
        mps_daemons=(),
        **{name: Output() for name in names},
    )
    return dataclasses.replace(readings, **changes)


def system_readings(**changes: object) -> SystemReadings:
    """A host with eight network cards and all that belongs to them."""
    ports = tuple(
        IbPort(device=f"mlx5_{i}", port=1, state="4: ACTIVE", rate="400 Gb/sec (4X NDR)", link_layer="InfiniBand")
        for i in range(8)
    )
    readings = SystemReadings(
        num_cpus=96,
        machine_id="boot net:[1] uid 0",
        shm_bytes=64 * 2**30,
        memlock_bytes=None,
        ib_ports=ports,
        kernel_modules=("nvidia_peermem", "gdrdrv"),
    )
    return dataclasses.replace(readings, **changes)


def software_readings(**changes: object) -> SoftwareReadings:
    """A full installation for GPUs."""
    readings = SoftwareReadings(
        python="3.12.3",
        version="0.1.0",
        cpu_core=Output(text="0.1.0"),
        cuda_core=Output(text="0.1.0"),
        nvcc=Output(text="Cuda compilation tools, release 13.0, V13.0.88\n"),
        torch_cuda="13.0",
        packages={
            "torch": "2.11.0+cu130",
            "ray": "2.60.0",
            "deepspeed": "0.19.8",
            "nvidia-nvshmem-cu13": "3.4.5",
        },
        requirements=REQUIREMENTS,
        torch_requirements=("nvidia-nvshmem-cu13==3.4.5", "nvidia-nccl-cu13==2.28.9"),
        num_modules=1700,
        num_uncompiled=0,
        nvshmem_core=Output(text="3.4.5"),
    )
    return dataclasses.replace(readings, **changes)


def machine(
    *,
    gpu: GpuReadings | None = None,
    system: SystemReadings | None = None,
    software: SoftwareReadings | None = None,
) -> Readings:
    """Eight healthy H100s, with parts replaced."""
    return Readings(
        host="node-a",
        gpu=gpu_readings("h100x8") if gpu is None else gpu,
        system=system_readings() if system is None else system,
        software=software_readings() if software is None else software,
    )
