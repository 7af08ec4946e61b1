"""From installed versions to findings. Pure functions."""

from __future__ import annotations

import re

from .findings import Finding, not_applicable, ok, problem, warning
from .readings import SoftwareReadings

NVSHMEM = "nvidia-nvshmem-cu"
BUILD = "python setup.py build_ext --inplace, or pip install ."


def judge_software(software: SoftwareReadings, *, has_gpus: bool) -> list[Finding]:
    """All findings about what is installed."""
    return [
        ok("ray_deepep", f"{software.version}, Python {software.python}"),
        judge_cpu_core(software),
        judge_cuda_core(software, has_gpus=has_gpus),
        judge_nvcc(software, has_gpus=has_gpus),
        judge_package(software, "torch", "pip install torch"),
        judge_package(software, "ray", "to train on Ray: pip install 'ray-deepep[ray]'"),
        judge_package(software, "deepspeed", "to swap DeepSpeed's MoE layers: pip install 'ray-deepep[deepspeed]'"),
        judge_nvshmem(software),
        judge_nvshmem_core(software),
        judge_bytecode(software),
    ]


def judge_cpu_core(software: SoftwareReadings) -> Finding:
    """The compiled core that every transport but ``reference`` needs."""
    core = software.cpu_core
    return problem("CPU core", core.problem, f"build it: {BUILD}") if core.problem else ok("CPU core", core.text)


def judge_cuda_core(software: SoftwareReadings, *, has_gpus: bool) -> Finding:
    """The CUDA core: a must where there are GPUs."""
    core = software.cuda_core
    if not core.problem:
        return ok("CUDA core", core.text)
    if has_gpus:
        return problem("CUDA core", core.problem, f"build it where nvcc is: RAY_DEEPEP_CUDA=1 {BUILD}")
    return not_applicable("CUDA core", "not built; not needed without GPUs")


def judge_nvcc(software: SoftwareReadings, *, has_gpus: bool) -> Finding:
    """The compiler, needed only to build the CUDA core, and its major release against torch's."""
    release = re.search(r"release (\d+)\.(\d+)", software.nvcc.text)
    if release is None:
        advice = (
            "needed to build the CUDA core: install the CUDA toolkit" if has_gpus and software.cuda_core.problem else ""
        )
        return not_applicable("nvcc", software.nvcc.problem or "no release in its output", advice)
    value = ".".join(release.groups())
    if software.torch_cuda and software.torch_cuda.split(".")[0] != release.group(1):
        advice = "build the CUDA core with the toolkit of torch's CUDA release"
        return warning("nvcc", f"{value}, but torch is built for CUDA {software.torch_cuda}", advice)
    return ok("nvcc", value)


def judge_package(software: SoftwareReadings, name: str, advice: str) -> Finding:
    """One package against the range that ray_deepep declares."""
    version = software.packages.get(name)
    if version is None:
        return not_applicable(name, "not installed", advice)
    wanted = requirement(software.requirements, name)
    if not wanted or satisfies(version, wanted):
        return ok(name, version)
    return problem(name, f"{version}, supported is {wanted}", f"pip install '{name}{wanted}'")


def judge_nvshmem(software: SoftwareReadings) -> Finding:
    """The NVSHMEM wheel against torch's pin and the release that the inter-node core was built with: its device state
    differs between releases, so build and run need the same one."""
    built = software.nvshmem_core.text
    installed = {name: version for name, version in software.packages.items() if name.startswith(NVSHMEM)}
    if not installed:
        if built:
            advice = f"pip install 'nvidia-nvshmem-cu13=={built}'"
            return problem("NVSHMEM", f"not installed, but the core is built with {built}", advice)
        return not_applicable("NVSHMEM", "not installed; only needed for GPUs of several hosts")
    value = ", ".join(f"{name} {version}" for name, version in installed.items())
    for name, version in installed.items():
        pin = requirement(software.torch_requirements, name)
        if pin and not satisfies(version, pin):
            return problem("NVSHMEM", f"{value}, but torch wants {pin}", f"pip install '{name}{pin}'")
        if built and version != built:
            advice = f"build the inter-node core again, or pip install '{name}=={built}'"
            return problem("NVSHMEM", f"{value}, but the core is built with {built}", advice)
    return ok("NVSHMEM", value)


def judge_nvshmem_core(software: SoftwareReadings) -> Finding:
    """The inter-node core."""
    name, core = "NVSHMEM core", software.nvshmem_core
    if core.problem:
        return problem(name, core.problem, f"pip install the NVSHMEM that it names, or build it again: {BUILD}")
    if not core.text:
        return not_applicable(name, "not built; only needed for GPUs of several hosts")
    return ok(name, f"built with NVSHMEM {core.text}")


def judge_bytecode(software: SoftwareReadings) -> Finding:
    """Whether each new process, so each worker that starts again after a fault, compiles its imports once more."""
    missing, of_all = software.num_uncompiled, software.num_modules
    if missing <= of_all // 2:
        return ok("bytecode", f"kept on disk for {of_all - missing} of torch's {of_all} modules")
    value = f"not kept on disk for {missing} of torch's {of_all} modules: each new process compiles them, for seconds"
    return warning("bytecode", value, "unset PYTHONDONTWRITEBYTECODE, or set PYTHONPYCACHEPREFIX to a writable folder")


def requirement(requirements: tuple[str, ...], name: str) -> str:
    """The versions that ``requirements`` allow for a package, such as ``<2.15,>=2.11``; empty if they say nothing."""
    for line in requirements:
        split = re.match(r"([A-Za-z0-9._-]+?)([<>=~!].*)", line)
        if split and split.group(1).lower().replace("_", "-") == name:
            return split.group(2)
    return ""


def satisfies(version: str, wanted: str) -> bool:
    """Whether a release lies in a range of ``==``, ``>=``, ``<=``, ``<``, ``>`` and ``!=``. Local parts (``+cu130``)
    and suffixes (``rc1``) do not count."""
    own = _release(version)
    tests = {
        "==": lambda a, b: a == b,
        ">=": lambda a, b: a >= b,
        "<=": lambda a, b: a <= b,
        "!=": lambda a, b: a != b,
        "<": lambda a, b: a < b,
        ">": lambda a, b: a > b,
    }
    for part in wanted.split(","):
        operator = re.match(r"[<>=!]=|[<>]", part)
        if operator is not None and not tests[operator.group()](own, _release(part[operator.end() :])):
            return False
    return True


def _release(version: str) -> tuple[int, ...]:
    """Padded with zeros, so that 2.60 and 2.60.0 are equal."""
    numbers = re.match(r"\s*(\d+(?:\.\d+)*)", version)
    parts = tuple(map(int, numbers.group(1).split("."))) if numbers else ()
    return parts + (0,) * (6 - len(parts))
