"""From what the kernel says to findings. Pure functions."""

from __future__ import annotations

import collections

from .findings import Finding, not_applicable, ok, problem, warning
from .readings import SystemReadings

GIB = 2**30
SMALL_SHM_BYTES = GIB
"""Docker gives 64 MiB. NCCL wants some ten MiB a rank there, Ray's object store as much as it can get."""


def judge_system(system: SystemReadings, *, has_gpus: bool) -> list[Finding]:
    """All findings about the host."""
    return [
        ok("CPU cores", str(system.num_cpus)),
        judge_heap(system),
        judge_shm(system),
        judge_ib(system),
        judge_memlock(system),
        judge_modules(system, has_gpus=has_gpus),
    ]


def judge_heap(system: SystemReadings) -> Finding:
    """Whether ranks of this host can find and reach each other's memory."""
    if system.machine_id.startswith("pid "):
        advice = "ranks of this host cannot find each other (is /proc mounted?); transport reference still works"
        return problem("heap", system.machine_id, advice)
    return ok("heap", "anonymous shared memory (memfd), which needs no /dev/shm")


def judge_shm(system: SystemReadings) -> Finding:
    """Size of /dev/shm, which NCCL and Ray use."""
    advice = "NCCL and Ray's object store need it: docker run --shm-size=8g, or mount a larger tmpfs there"
    if system.shm_bytes is None:
        return warning("/dev/shm", "not there", advice)
    value = f"{system.shm_bytes / GIB:.1f} GiB"
    return warning("/dev/shm", value, advice) if system.shm_bytes < SMALL_SHM_BYTES else ok("/dev/shm", value)


def judge_ib(system: SystemReadings) -> Finding:
    """InfiniBand and RoCE ports: state and rate."""
    name, ports = "IB devices", system.ib_ports
    if not ports:
        return not_applicable(name, "none: ranks of several hosts meet over TCP")
    active = [port for port in ports if "ACTIVE" in port.state]
    kinds = collections.Counter((port.rate, port.link_layer) for port in active)
    value = ", ".join(f"{count} x {rate} {layer}" for (rate, layer), count in kinds.items()) or "no active port"
    down = [port for port in ports if "ACTIVE" not in port.state]
    if down:
        states = [port.state.split(": ")[-1] or "unknown" for port in down]
        names = ", ".join(f"{port.device} port {port.port} ({state})" for port, state in zip(down, states))
        return warning(name, f"{value}; down: {names}", "check cables and switch")
    return ok(name, value)


def judge_memlock(system: SystemReadings) -> Finding:
    """Locked memory, which RDMA registers."""
    if system.memlock_bytes is None:
        return ok("memlock limit", "unlimited")
    value = f"{system.memlock_bytes / 2**20:g} MiB"
    if not system.ib_ports:
        return not_applicable("memlock limit", f"{value}, enough without RDMA")
    return problem(
        "memlock limit", value, "RDMA cannot register memory: ulimit -l unlimited (docker: --ulimit memlock=-1)"
    )


def judge_modules(system: SystemReadings, *, has_gpus: bool) -> Finding:
    """Kernel modules that let a network card read GPU memory."""
    name, loaded = "GPUDirect RDMA", ", ".join(system.kernel_modules)
    if not (has_gpus and system.ib_ports):
        return not_applicable(name, f"needs GPUs and IB devices; loaded: {loaded or 'no module'}")
    if "nvidia_peermem" not in system.kernel_modules:
        advice = "modprobe nvidia_peermem (root); with DMA-BUF in kernel and NIC driver it is not needed"
        return warning(name, f"nvidia_peermem is not loaded; loaded: {loaded or 'no module'}", advice)
    if "gdrdrv" not in system.kernel_modules:
        advice = "optional: GDRCopy (module gdrdrv) makes small messages between hosts faster"
        return ok(name, "nvidia_peermem is loaded, GDRCopy is not", advice)
    return ok(name, f"loaded: {loaded}")
