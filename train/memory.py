"""How much memory a rank takes."""

from __future__ import annotations

import resource
import sys

import torch

_EVERY = 10
_MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024


def memory_of_step(step: int, last_step: int, device: torch.device) -> int | None:
    """`memory_bytes` after every tenth step and the last; None else, as drivers take time to answer."""
    return memory_bytes(device) if step % _EVERY == 0 or step == last_step else None


def memory_bytes(device: torch.device) -> int:
    """Of this rank, bytes.

    On a GPU what its driver has given out by now: to torch, whose pools do not shrink, to heaps of ray_deepep, to NCCL,
    and to other processes if it is shared. On CPUs the most that this process has had, heaps included.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total - free
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_UNIT
