"""Clipping by the norm of the whole gradient, whatever the number of ranks and the EP degree.

Without ZeRO, DeepSpeed clips by the mean over ranks of each rank's norm, in which a rank counts its own experts alone.
That mean changes with the EP degree, so an elastic run would take other steps at another size. (ZeRO 1 and 2 add up
all partitions, so they have the whole norm.)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.moe.utils import is_moe_param
from deepspeed.runtime.utils import clip_grad_norm_
from deepspeed.utils import groups

_EPSILON = 1e-6  # DeepSpeed's


def clip_as_deepspeed(engine: Any) -> float:
    """What an engine without ZeRO does by itself; but the norm is returned."""
    params, limit = engine.module.parameters(), engine.gradient_clipping()
    return float(clip_grad_norm_(parameters=params, max_norm=limit, mpu=engine.mpu))


def clip_whole_gradient(engine: Any) -> float:
    """Scale the gradients of a DeepSpeed engine without ZeRO, averaged already, to its clipping norm. Collective.

    Returns the norm.
    """
    params = [param for param in engine.module.parameters() if param.grad is not None]
    dense = torch.zeros((), dtype=torch.float64, device=params[0].device)
    experts = torch.zeros_like(dense)
    for param in params:
        square = param.grad.float().norm().double().square()
        if is_moe_param(param):
            # Every rank of the expert-data-parallel group has this gradient.
            experts += square / dist.get_world_size(groups._get_expert_data_parallel_group(param.group_name))
        else:
            dense += square
    dist.all_reduce(experts)
    norm = (dense + experts).sqrt()
    factor = float(torch.clamp(engine.gradient_clipping() / (norm + _EPSILON), max=1.0))
    for param in params:
        param.grad.mul_(factor)
    return float(norm)
