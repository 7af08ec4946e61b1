"""Build of ray_deepep: the CPU core always, the CUDA core where nvcc is found, NVSHMEM's part where its wheel is, too.

Plain pybind11, no torch headers. RAY_DEEPEP_CORES=0 builds nothing (``setup.py build_ext --inplace`` does it later).
RAY_DEEPEP_CUDA=0 leaves the CUDA core and NVSHMEM out, =1 insists on the CUDA core. RAY_DEEPEP_CUDA_ARCHS="90" or
"80;90;100" says for which chips, RAY_DEEPEP_BUILD_JOBS how many compilers run at once.
"""

from __future__ import annotations

import concurrent.futures
import importlib.util
import os
import pathlib
import re
import shutil
import sys
import sysconfig

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "ray_deepep/version.py").read_text()).group(1)
JOBS = int(os.environ.get("RAY_DEEPEP_BUILD_JOBS", "2"))
SHARED_FOLDERS = ("common", "heap")
CUDA_FOLDERS = ("cuda", "bindings_cuda")
NVSHMEM_FOLDERS = ("nvshmem", "bindings_nvshmem")
BINDINGS_FOLDERS = ("bindings", "bindings_cuda", "bindings_nvshmem")
# No fused multiply-add: results carry the same bits on every processor, and the bits that torch gives.
CXX_FLAGS = ["-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-Wall", "-Wextra"]
CXX_FLAGS += ["-fPIC", "-pthread", f'-DRAY_DEEPEP_VERSION="{VERSION}"']


def sources(*folders: str) -> list[str]:
    """Sources below csrc, relative to the root."""
    found = (path for folder in folders for path in (ROOT / "csrc" / folder).iterdir())
    return sorted(str(path.relative_to(ROOT)) for path in found if path.suffix in (".cpp", ".cu"))


def is_bindings(source: str) -> bool:
    """Whether a source includes pybind11."""
    return pathlib.Path(source).parent.name in BINDINGS_FOLDERS


def find_nvcc() -> str | None:
    """nvcc of the environment or of the usual place."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")


def cuda_home(nvcc: str) -> pathlib.Path:
    """The toolkit that ``nvcc`` belongs to; it may be a wrapper script elsewhere."""
    for home in (os.environ.get("CUDA_HOME"), pathlib.Path(nvcc).resolve().parents[1], "/usr/local/cuda"):
        if home and (pathlib.Path(home) / "include/cuda_runtime_api.h").exists():
            return pathlib.Path(home)
    found = sorted(pathlib.Path("/usr/local").glob("cuda-*/include/cuda_runtime_api.h"))
    if not found:
        sys.exit("ray_deepep: nvcc is there, but not CUDA's headers; set CUDA_HOME or RAY_DEEPEP_CUDA=0")
    return found[-1].parents[1]


def find_nvshmem() -> pathlib.Path | None:
    """Headers and libraries of the wheel nvidia-nvshmem-cu13."""
    try:
        spec = importlib.util.find_spec("nvidia.nvshmem")
    except ModuleNotFoundError:
        return None
    homes = [pathlib.Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    return next((home for home in homes if (home / "include/nvshmem_host.h").exists()), None)


def extensions() -> list[Extension]:
    """What can be built here; what cannot is said in one line."""
    if os.environ.get("RAY_DEEPEP_CORES") == "0":
        return []
    depends = [str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cuh")]
    cpu = Extension("ray_deepep._core", sources(*SHARED_FOLDERS, "host", "bindings"), depends=depends)
    wanted, nvcc = os.environ.get("RAY_DEEPEP_CUDA", ""), find_nvcc()
    if wanted == "0" or not nvcc:
        if wanted == "1":
            sys.exit("ray_deepep: RAY_DEEPEP_CUDA=1, but nvcc was not found; set CUDA_HOME")
        print(f"ray_deepep: CPU core only ({'RAY_DEEPEP_CUDA=0' if wanted == '0' else 'no nvcc'})")
        return [cpu]
    translation = ["csrc/bindings/error_translation.cpp"]
    cuda = Extension("ray_deepep._cuda", sources(*SHARED_FOLDERS, *CUDA_FOLDERS) + translation, depends=depends)
    if not find_nvshmem():
        print("ray_deepep: without NVSHMEM (pip install nvidia-nvshmem-cu13==3.4.5 and build again to have it)")
        return [cpu, cuda]
    nvshmem_sources = sources("common", *NVSHMEM_FOLDERS) + translation
    return [cpu, cuda, Extension("ray_deepep._nvshmem", nvshmem_sources, depends=depends)]


class Build(build_ext):
    """Compiles .cpp with the C++ compiler and .cu with nvcc, several at once, only what changed.

    A source that several cores share is compiled once: how follows from its folder alone.
    """

    def build_extensions(self) -> None:
        """All objects in one go, so that no compiler idles between cores; then each core is linked."""
        depends = {header for ext in self.extensions for header in ext.depends}
        newest_header = max(
            os.path.getmtime(ROOT / header) for header in [*depends, "setup.py", "ray_deepep/version.py"]
        )
        outdated = []
        # CUDA sources take longest, so they go first.
        every = {source for ext in self.extensions for source in ext.sources}
        for source in sorted(every, key=lambda source: (not source.endswith(".cu"), source)):
            output = self._object(source)
            if output.exists() and output.stat().st_mtime > max(newest_header, os.path.getmtime(ROOT / source)):
                continue
            output.parent.mkdir(parents=True, exist_ok=True)
            outdated.append(source)
        with concurrent.futures.ThreadPoolExecutor(max(JOBS, 1)) as pool:
            # First of all, so that no source of the bindings waits for it in vain.
            header = pool.submit(self._precompile) if any(map(is_bindings, outdated)) else None
            list(pool.map(lambda source: self._compile(source, header), outdated))
        for ext in self.extensions:
            self.build_extension(ext)

    def build_extension(self, ext: Extension) -> None:
        """Link one core."""
        target = pathlib.Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # Unlinked first: a process may have the old file mapped.
        target.unlink(missing_ok=True)
        libraries = []
        if ext.name != "ray_deepep._core":
            home = cuda_home(find_nvcc())
            libraries += [f"-L{home}/lib64", f"-L{home}/lib", "-lcudart_static", "-ldl", "-lrt"]
        if ext.name == "ray_deepep._nvshmem":
            libraries += self._nvshmem_link_flags(find_nvshmem())
        objects = [str(self._object(source)) for source in ext.sources]
        if ext.name == "ray_deepep._nvshmem":
            objects.append(self._link_device_code(ext, find_nvshmem()))
        link = ["-shared", "-pthread", "-Wl,--no-undefined-version", *objects, *libraries, "-o", str(target)]
        self.spawn([self._cxx(), *link])

    def _object(self, source: str) -> pathlib.Path:
        return pathlib.Path(self.build_temp) / f"{source}.o"

    def _link_device_code(self, ext: Extension, nvshmem: pathlib.Path) -> str:
        """NVSHMEM's device functions are in an archive of device code, which only nvcc can link."""
        output = str(pathlib.Path(self.build_temp) / "nvshmem_device_code.o")
        objects = [str(self._object(source)) for source in ext.sources if source.endswith(".cu")]
        options = ["-dlink", "-Xcompiler=-fPIC", *self._gencode(), f"-L{nvshmem}/lib", "-lnvshmem_device"]
        self.spawn([find_nvcc(), *objects, *options, "-o", output])
        return output

    @staticmethod
    def _gencode() -> list[str]:
        archs = os.environ.get("RAY_DEEPEP_CUDA_ARCHS", "80;90;100").split(";")
        return [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]

    def _nvshmem_link_flags(self, nvshmem: pathlib.Path) -> list[str]:
        # torch's own NVSHMEM library is in the process too: only the module's entry is visible.
        exports = pathlib.Path(self.build_temp) / "nvshmem_exports.map"
        exports.write_text("{ global: PyInit__nvshmem; local: *; };\n")
        return [
            f"-L{nvshmem}/lib",
            "-l:libnvshmem_device.a",
            "-l:libnvshmem_host.so.3",
            "-Wl,-rpath,$ORIGIN/../nvidia/nvshmem/lib",
            f"-Wl,--version-script={exports}",
        ]

    def _cxx(self) -> str:
        return os.environ.get("CXX") or shutil.which("c++") or "g++"

    def _precompile(self) -> None:
        """pybind11's headers, which cost each source of the bindings 7 s else."""
        header = self._pybind11_header()
        header.write_text("#include <pybind11/pybind11.h>\n#include <pybind11/stl.h>\n")
        options = ["-x", "c++-header", *self._bindings_options()]
        self.spawn([self._cxx(), *options, str(header), "-o", f"{header}.gch"])

    def _pybind11_header(self) -> pathlib.Path:
        return pathlib.Path(self.build_temp) / "pybind11_headers.h"

    def _bindings_options(self) -> list[str]:
        # Bindings convert arguments: -O3 has nothing to gain there, and takes a third longer.
        includes = [pybind11.get_include(), sysconfig.get_paths()["include"]]
        return [*CXX_FLAGS, "-O1", *(f"-isystem{path}" for path in includes)]

    def _compile(self, source: str, header: concurrent.futures.Future | None) -> None:
        if header and is_bindings(source):
            header.result()
        self.spawn(self._compile_command(source, str(self._object(source))))

    def _compile_command(self, source: str, output: str) -> list[str]:
        folder, includes = pathlib.Path(source).parent.name, ["-Icsrc"]
        if folder in NVSHMEM_FOLDERS:
            # As headers of the system: their warnings are not ours.
            cccl = cuda_home(find_nvcc()) / "include/cccl"
            includes += ["-isystem", f"{find_nvshmem()}/include", "-isystem", str(cccl)]
        if source.endswith(".cu"):
            options = ["-std=c++17", "-O3", "-fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden"]
            if folder == "nvshmem":
                options.append("-rdc=true")
            return [find_nvcc(), *options, *self._gencode(), *includes, "-c", source, "-o", output]
        options = [*CXX_FLAGS, "-O3"]
        if is_bindings(source):
            options = ["-include", str(self._pybind11_header()), *self._bindings_options()]
        if folder in CUDA_FOLDERS + NVSHMEM_FOLDERS:
            includes.append(f"-I{cuda_home(find_nvcc())}/include")
        return [self._cxx(), *options, *includes, "-c", source, "-o", output]


setup(version=VERSION, ext_modules=extensions(), cmdclass={"build_ext": Build})
