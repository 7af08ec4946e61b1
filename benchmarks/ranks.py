"""Runs a function on N processes with a gloo process group between them."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# oneDNN's AMX path dies with an illegal instruction on some processors; DeepSpeed must not look for a GPU.
_RANK_ENV = {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_FP16", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def run_ranks(function: Callable[..., Any], num_ranks: int, *args: Any, backend: str = "gloo") -> Any:
    """Call ``function(*args)`` on ``num_ranks`` new processes and return what rank 0 returned (as JSON carries it).

    ``function`` lives at the top level of a module. ``backend`` is torch.distributed's. Each rank computes with one
    thread, so that ranks stand for machines that do not share cores. An exception on one rank ends all, and is raised
    here with its traceback.
    """
    with tempfile.TemporaryDirectory(prefix="ray_deepep_benchmark_") as folder:
        for name, value in _RANK_ENV.items():
            os.environ.setdefault(name, value)
        mp.spawn(_rank_main, args=(function, num_ranks, folder, backend, args), nprocs=num_ranks)
        return json.loads(_answer_path(folder).read_text())


def _answer_path(folder: str) -> Path:
    return Path(folder) / "answer.json"


def _rank_main(
    rank: int, function: Callable[..., Any], num_ranks: int, folder: str, backend: str, args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=num_ranks)
    answer = function(*args)
    if rank == 0:
        _answer_path(folder).write_text(json.dumps(answer))
    dist.barrier()
    dist.destroy_process_group()
