"""A wheel holds what a user needs and nothing else, and works away from the sources."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PARTS = ("ray_deepep", "csrc", "train", "setup.py", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Built from a copy of the sources, CPU core only. Objects that an earlier build left are used where newer."""
    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    for source in (*(ROOT / part for part in PARTS), *ROOT.glob("build/temp.*")):
        # With their times: setup.py compiles what is newer than its object.
        target = folder / source.relative_to(ROOT)
        if source.is_dir():
            shutil.copytree(source, target, ignore=ignored)
        else:
            shutil.copy2(source, target)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", "dist", "."]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "RAY_DEEPEP_CUDA": "0"}, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (built,) = (folder / "dist").glob("*.whl")
    return built


@pytest.mark.slow
def test_wheel_contents(wheel: pathlib.Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.startswith("ray_deepep/_core.") and name.endswith(".so") for name in names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {f"ray_deepep/{part}/__init__.py" for part in ("cluster", "deepspeed", "doctor")} | {"train/main.py"} <= set(
        names
    )
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"ray_deepep", "train"}


@pytest.mark.slow
def test_wheel_works_away_from_the_sources(wheel: pathlib.Path, tmp_path: pathlib.Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    program = (
        "import torch, ray_deepep as rd\n"
        f"assert rd.__file__.startswith({str(tmp_path)!r}), rd.__file__\n"
        "comm = rd.Communicator.from_exchange(lambda phase, payload: [payload], rank=0, num_ranks=1)\n"
        "buffer = rd.Buffer(comm, num_experts=2, hidden=8, num_topk=1, max_tokens=4)\n"
        "x = torch.randn(4, 8)\n"
        "got = buffer.dispatch(x, torch.tensor([[0], [1], [1], [0]]))\n"
        "assert torch.equal(buffer.combine(got.x, got.handle).x, x)\n"
        "print(comm.transport)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "shm"


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_cores_are_built_again_after_clean(tmp_path: pathlib.Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "setup.py"):
        shutil.copy2(ROOT / name, tmp_path)
    (tmp_path / ".venv").mkdir()
    (tmp_path / "ray_deepep").mkdir()
    shutil.copy2(ROOT / "ray_deepep/version.py", tmp_path / "ray_deepep")
    for stamp in (".tools", ".packages", ".core"):
        (tmp_path / ".venv" / stamp).touch()
    builds = "setup.py -q build_ext"

    def make(*arguments: str) -> str:
        command = ["make", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60).stdout

    assert builds not in make("-n", "install")
    make("clean")
    assert builds in make("-n", "install")
