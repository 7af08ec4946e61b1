"""``RAY_DEEPEP=1``: unmodified scripts under the launcher, alone and under torchrun."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest
from deepspeed.moe.sharded_moe import MOELayer
from harness import error_of

from ray_deepep import InvalidArgumentError
from ray_deepep.deepspeed.launch import run_script
from ray_deepep.deepspeed.switch import ForwardSwitch

REPOSITORY = pathlib.Path(__file__).parent.parent

# What a user has: it knows nothing of ray_deepep, but for the last lines, which report.
TRAINING_SCRIPT = """
import json, os, sys
os.environ["DS_ACCELERATOR"] = "cpu"
import torch, torch.distributed as dist
import settings_beside_the_script as settings
assert "deepspeed" not in sys.modules
import deepspeed
from deepspeed.moe.layer import MoE

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.init_distributed("gloo", verbose=False)
torch.manual_seed(0)
layers = [MoE(8, torch.nn.Linear(8, 8), num_experts=4, ep_size=2, k=2) for _ in range(settings.LAYERS)]
model = torch.nn.ModuleList(layers)
for layer in model:
    layer.set_deepspeed_parallelism()
x = torch.randn(32, 8)
for layer in model:
    x = layer(x)[0]
x.sum().backward()

from deepspeed.moe.sharded_moe import MOELayer
swap = MOELayer.forward.ray_deepep_switch.whole
report = {
    "argv": sys.argv[1:],
    "name": __name__,
    "buffers": len(swap.buffers),
    "calls": swap.comm_stats()["num_calls"],
    "layout": swap.config.layout,
    "loader": type(deepspeed.__spec__.loader).__name__,
}
with open(f"{sys.argv[2]}/rank_{dist.get_rank()}.json", "w") as file:
    json.dump(report, file)
"""


def environment(**variables: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_DEEPEP")}
    return clean | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **variables}


def run(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], env=environment(**variables), capture_output=True, text=True, timeout=100
    )


def test_torchrun_of_an_unmodified_script(tmp_path: pathlib.Path) -> None:
    script = tmp_path / "user_script.py"
    script.write_text(TRAINING_SCRIPT)
    (tmp_path / "settings_beside_the_script.py").write_text("LAYERS = 3\n")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = run(
        *torchrun,
        *["-m", "ray_deepep.deepspeed.launch", str(script), "--out", str(tmp_path)],
        RAY_DEEPEP="1",
        RAY_DEEPEP_LAYOUT="compact",
        RAY_DEEPEP_HEAP_GIB="1",
    )
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        assert json.loads((tmp_path / f"rank_{rank}.json").read_text()) == {
            "argv": ["--out", str(tmp_path)],
            "name": "__main__",
            "buffers": 1,
            # Nothing behind the first dispatch wants a gradient.
            "calls": 11,
            "layout": "compact",
            "loader": "SourceFileLoader",
        }


def test_without_the_variable_nothing_is_swapped(tmp_path: pathlib.Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from deepspeed.moe.sharded_moe import MOELayer\n"
        "print('swapped', hasattr(MOELayer.forward, 'ray_deepep_switch'), sys.argv[1:])\n"
        "sys.exit(3)\n"
    )
    done = run("-m", "ray_deepep.deepspeed.launch", "--local_rank=0", str(script), "--flag")
    assert done.returncode == 3, done.stderr
    assert "swapped False ['--local_rank=0', '--flag']" in done.stdout


def test_an_error_of_the_launcher_is_one_line() -> None:
    done = run("-m", "ray_deepep.deepspeed.launch", "no_such_script.py")
    assert done.returncode == 1
    assert (
        done.stderr.strip() == "ray_deepep.deepspeed.launch: script: must be an existing file; got 'no_such_script.py'"
    )


def test_run_script_closes_the_swap_however_the_script_ends(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a process that has DeepSpeed already, the swap is there from the start."""
    monkeypatch.setenv("RAY_DEEPEP", "1")
    stock, path, argv = MOELayer.forward, list(sys.path), list(sys.argv)
    script = tmp_path / "script.py"
    script.write_text(
        "from deepspeed.moe.sharded_moe import MOELayer\n"
        "assert MOELayer.forward.ray_deepep_switch.whole is not None\n"
        "raise KeyError('the script failed')\n"
    )
    assert "the script failed" in str(error_of(KeyError, lambda: run_script([str(script)])))
    assert MOELayer.forward is stock and ForwardSwitch.current() is None
    assert sys.path == path and sys.argv == argv


def test_run_script_arguments() -> None:
    assert error_of(InvalidArgumentError, lambda: run_script([])).argument == "argv"
    assert error_of(InvalidArgumentError, lambda: run_script(["--local_rank=1"])).argument == "argv"
    assert error_of(InvalidArgumentError, lambda: run_script(["nowhere.py"])).argument == "script"
