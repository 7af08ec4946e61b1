"""Imports point one way, as docs/design.md says."""

from __future__ import annotations

import ast
import importlib
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]

CPP_MAY_INCLUDE = {
    "common": {"common"},
    "heap": {"common", "heap"},
    "host": {"common", "heap", "host"},
    "cuda": {"common", "heap", "cuda"},
    # Its kernels go in front of a domain's, and report faults as those do.
    "nvshmem": {"common", "cuda", "nvshmem"},
    "bindings": {"common", "heap", "host", "bindings"},
    "bindings_cuda": {"common", "heap", "cuda", "bindings", "bindings_cuda"},
    "bindings_nvshmem": {"common", "cuda", "nvshmem", "bindings", "bindings_nvshmem"},
}

# From the bottom: a module imports only from lower rows and from its own.
PYTHON_LAYERS = [
    {
        "version",
        "lazy_names",
        "errors",
        "env",
        "fields",
        "config",
        "run_files",
        "job_log",
        "checkout",
        "entrypoint",
        "dashboard",
    },
    {
        "handle",
        "domains",
        "rank_info",
        "telemetry",
        "gpu_times",
        "float8",
        "work",
        "symm_pool",
        "nvshmem_decisions",
        "progress",
        "bounded",
        "gpu_events",
        "low_latency",
    },
    {"transport", "low_latency_transport"},
    {
        "low_latency_checks",
        "checks",
        "argument_checks",
        "overlap",
        "rendezvous",
        "bounded_store",
        "core_errors",
        "fixed_shapes",
        "guessed_rows",
        "streams",
        "fault_board",
        "transport_choice",
    },
    {
        "shm",
        "cuda",
        "cuda_arguments",
        "nvshmem",
        "reference",
        "reference_group",
        "store_meeting",
        "plan_reference",
        "hop",
        "hop_cuda",
        "hop_group",
        "hop_plan",
        "hop_zone",
        "cuda_heap",
        "low_latency_cuda",
        "low_latency_shm",
        "low_latency_reference",
        "low_latency_mailbox",
        "communicator",
        "captured_graph",
    },
    {
        "buffer",
        "expert_rows",
        "heap_tensors",
        "low_latency_buffer",
        "low_latency_flight",
        "low_latency_masks",
        "health",
        "row_dots",
        "expert_bias",
        "local_kernel",
    },
    {"autograd"},
    {"__init__"},
    {"deepspeed", "doctor", "report", "run_state", "step_telemetry"},
    {"planning"},
    {"cluster"},
    {"cli", "cli_jobs"},
]
LAYER = {name: level for level, names in enumerate(PYTHON_LAYERS) for name in names}
# Who may import a heavy package at all.
MAY_IMPORT = {
    "ray": {"ray_deepep/cluster", "train/ray_", "train/demo.py", "train/local_ray.py"},
    "deepspeed": {"ray_deepep/deepspeed", "train"},
    "train": {"train"},
}


def python_files() -> list[pathlib.Path]:
    return sorted(path for folder in ("ray_deepep", "train") for path in (ROOT / folder).rglob("*.py"))


def runtime_imports(path: pathlib.Path) -> list[tuple[str, int]]:
    """Absolute dotted names that a file imports, those under ``if TYPE_CHECKING`` left out."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    found: list[tuple[str, int]] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            found.extend((alias.name, node.lineno) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            name = ".".join(part for part in (base, node.module or "") if part)
            names = [name] if node.module else [f"{name}.{alias.name}" for alias in node.names]
            found.extend((name, node.lineno) for name in names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


def layer_name(dotted: str) -> str:
    parts = dotted.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


@pytest.mark.parametrize("path", python_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_python_imports_point_down(path: pathlib.Path) -> None:
    relative = path.relative_to(ROOT)
    for name, line in runtime_imports(path):
        top = name.split(".")[0]
        if top in MAY_IMPORT:
            allowed = any(str(relative).startswith(place) for place in MAY_IMPORT[top])
            assert allowed, f"{relative}:{line} imports {top}, which only {sorted(MAY_IMPORT[top])} may"
        if top == "ray_deepep" and relative.parts[0] == "ray_deepep":
            own, other = layer_name(".".join(relative.with_suffix("").parts)), layer_name(name)
            assert own in LAYER and other in LAYER, (
                f"{relative}:{line}: give {own} and {other} a place in PYTHON_LAYERS"
            )
            assert LAYER[other] <= LAYER[own], f"{relative}:{line} imports {other}, which is above {own}"


@pytest.mark.parametrize("path", python_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_environment_is_read_in_one_file(path: pathlib.Path) -> None:
    if path.relative_to(ROOT).parts[0] != "ray_deepep" or path.name == "env.py":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        text = ast.unparse(node) if isinstance(node, ast.expr) else ""
        read = isinstance(node, ast.Call) and text.startswith(("os.getenv(", "os.environ.get("))
        read |= isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load) and text.startswith("os.environ[")
        assert not read, f"{path}:{node.lineno} reads the environment: {text}; that belongs to env.py"


@pytest.mark.parametrize("package", ("ray_deepep", "ray_deepep.cluster"))
def test_names_loaded_when_first_used_are_those_that_tools_see(package: str) -> None:
    if package == "ray_deepep.cluster":
        pytest.importorskip("ray", reason="ray_deepep.cluster needs Ray")
    module = importlib.import_module(package)
    blocks = [node for node in ast.parse(pathlib.Path(module.__file__).read_text()).body if isinstance(node, ast.If)]
    seen = {node.module: {alias.name for alias in node.names} for node in blocks[0].body}
    assert seen == {name: set(names) for name, names in module._NAMES_OF.items()}
    assert set(module.__all__) - {"__version__"} == set().union(*seen.values()) <= set(dir(module))
    for name in module.__all__:
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError, match=r"has no attribute 'no_such_name'"):
        _ = module.no_such_name


def test_what_needs_no_torch_does_not_wait_for_it() -> None:
    """Nor actors for Ray Train: seconds of every such start."""
    pytest.importorskip("ray", reason="ray_deepep.cluster needs Ray")
    program = """
import sys
import ray_deepep.job_log, ray_deepep.cluster.jobs, train.demo, train.report
print("torch" in sys.modules)
from ray_deepep.cluster import bootstrap, current
print("torch" in sys.modules, "ray.train" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.stdout.split() == ["False", "True", "False"], done.stderr


@pytest.mark.parametrize("folder", sorted(CPP_MAY_INCLUDE))
def test_cpp_includes_point_down(folder: str) -> None:
    files = sorted((ROOT / "csrc" / folder).glob("*"))
    assert files
    for path in files:
        text = path.read_text()
        for included in re.findall(r'#include "([^"]+)"', text):
            assert included.split("/")[0] in CPP_MAY_INCLUDE[folder], f"{path} includes {included}"
        assert "torch/" not in text, f"{path}: torch stays out of C++"
        if not folder.startswith("bindings"):
            assert "pybind11" not in text, f"{path}: pybind11 belongs to bindings"


def test_every_cpp_folder_has_a_rule() -> None:
    assert {path.name for path in (ROOT / "csrc").iterdir() if path.is_dir()} == set(CPP_MAY_INCLUDE)
