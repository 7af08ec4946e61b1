"""What the probes read, as they read it: plain text and numbers, so that tests can show them any machine."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """What a command or a file gave: its text, or why there is none."""

    text: str = ""
    problem: str = ""
    """Empty if it went well."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GpuReadings:
    """What the driver's tools say. All outputs are empty where there is no ``nvidia-smi``."""

    num_pci_gpus: int
    """NVIDIA display and 3D controllers on the PCI bus, whether or not a driver serves them."""
    has_nvidia_smi: bool
    gpus: Output
    """CSV, one GPU per line, columns as in ``GPU_COLUMNS``."""
    clocks: Output
    """CSV: index, bit mask of the reasons that hold the clocks down."""
    ecc: Output
    """CSV: index, uncorrected errors since the driver was loaded."""
    remapped_rows: Output
    """CSV: UUID, pending, failure."""
    nvlink: Output
    """``nvidia-smi nvlink --status``."""
    peer_access: Output
    """``nvidia-smi topo -p2p r``."""
    kernel_log: Output
    """``dmesg``, only lines of the NVIDIA driver."""
    torch: Output
    """JSON of ``TORCH_PROGRAM``: what torch's CUDA runtime sees, in a process of its own."""
    mps_pipe_directory: str
    mps_pipe_exists: bool
    mps_daemons: tuple[str, ...]
    """``pid`` of each running MPS control daemon."""


GPU_COLUMNS = ("index", "name", "uuid", "memory.total", "driver_version", "compute_mode", "mig.mode.current")

TORCH_PROGRAM = """\
import json, torch
error = ""
try:
    torch.cuda.init()
except Exception as e:
    error = str(e)
print(json.dumps({"error": error, "num_gpus": 0 if error else torch.cuda.device_count()}))
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class IbPort:
    """One port of an InfiniBand or RoCE device, as /sys/class/infiniband has it."""

    device: str
    port: int
    state: str
    """Such as ``4: ACTIVE``."""
    rate: str
    """Such as ``400 Gb/sec (4X NDR)``."""
    link_layer: str
    """``InfiniBand`` or ``Ethernet``."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SystemReadings:
    """What the kernel says."""

    num_cpus: int
    """Cores that this process may use."""
    machine_id: str
    """As ``shm.machine_id`` has it."""
    shm_bytes: int | None
    """Size of /dev/shm; None if there is none."""
    memlock_bytes: int | None
    """Largest locked memory of a process; None: unlimited."""
    ib_ports: tuple[IbPort, ...]
    kernel_modules: tuple[str, ...]
    """Those of ``nvidia_peermem`` and ``gdrdrv`` that are loaded."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftwareReadings:
    """What is installed."""

    python: str
    version: str
    """Of ray_deepep."""
    cpu_core: Output
    cuda_core: Output
    nvcc: Output
    """``nvcc --version``."""
    torch_cuda: str
    """CUDA release that torch was built with; empty for a CPU build."""
    packages: dict[str, str]
    """Installed versions of torch, ray, deepspeed and the NVSHMEM wheels."""
    requirements: tuple[str, ...]
    """What this package declares, such as ``torch<2.15,>=2.11``; empty where it runs uninstalled."""
    torch_requirements: tuple[str, ...]
    """What torch declares; a CUDA build pins its NVSHMEM."""
    num_modules: int
    """Modules that torch's import loaded from sources."""
    num_uncompiled: int
    """Those of them whose bytecode is not kept on disk."""
    nvshmem_core: Output
    """NVSHMEM release that the inter-node core was built with, or why it does not load; both empty: not built."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Readings:
    """All that was read on one machine."""

    host: str
    gpu: GpuReadings
    system: SystemReadings
    software: SoftwareReadings
