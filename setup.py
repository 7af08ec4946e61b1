"""Build of ray_deepep: the CPU core always, with plain pybind11 and no torch headers."""

from __future__ import annotations

import pathlib
import re

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, naive_recompile
from setuptools import setup

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "ray_deepep/version.py").read_text()).group(1)


def cpu_core() -> Pybind11Extension:
    """The CPU core as ``ray_deepep._core``."""
    sources = sorted(
        str(path.relative_to(ROOT))
        for folder in ("common", "heap", "host", "bindings")
        for path in (ROOT / "csrc" / folder).glob("*.cpp")
    )
    headers = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h"))
    return Pybind11Extension(
        "ray_deepep._core",
        sources,
        include_dirs=["csrc"],
        depends=headers,
        define_macros=[("RAY_DEEPEP_VERSION", f'"{VERSION}"')],
        # No fused multiply-add: results carry the same bits on every processor, and the bits that torch gives.
        extra_compile_args=["-O3", "-ffp-contract=off", "-Wall", "-Wextra", "-fno-math-errno"],
        cxx_std=17,
    )


print("ray_deepep: building the CPU core; no CUDA core in this version")
ParallelCompile("RAY_DEEPEP_BUILD_JOBS", default=2, needs_recompile=naive_recompile).install()
setup(version=VERSION, ext_modules=[cpu_core()])
