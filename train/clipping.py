"""Norms of gradients: by which they are clipped, and in how many operations.

Clipping is by the norm of the whole gradient, whatever the number of ranks and the EP degree.

Without ZeRO, DeepSpeed clips by the mean over ranks of each rank's norm, in which a rank counts its own experts alone.
That mean changes with the EP degree, so an elastic run would take other steps at another size. (ZeRO 1 and 2 add up
all partitions, so they have the whole norm.) They take it of one parameter after the other, a handful of operations
each; with experts there are hundreds of parameters.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.moe.utils import is_moe_param
from deepspeed.runtime.utils import clip_grad_norm_, mask_nan_or_inf_with_val_inplace
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
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


def take_norms_at_once(optimizer: Any) -> None:
    """Let a DeepSpeed optimizer of ZeRO 1 or 2 take the norms of all its gradients in one operation; others are left
    as they are, and so is one of a model whose ranks hold different parts of the same parameters."""
    if isinstance(optimizer, DeepSpeedZeroOptimizer) and optimizer.model_parallel_group is None:
        optimizer.get_grad_norm_direct = functools.partial(_partition_norm, optimizer)


def _partition_norm(
    optimizer: DeepSpeedZeroOptimizer,
    gradients: Sequence[torch.Tensor],
    params: Sequence[torch.Tensor],
    norm_type: int = 2,
) -> torch.Tensor:
    """What ``get_grad_norm_direct`` is to return: the 2-norm over all ranks, float32; -1 if it is no number."""
    if norm_type != 2:
        return DeepSpeedZeroOptimizer.get_grad_norm_direct(optimizer, gradients, params, norm_type)
    whole = [gradient.detach() for gradient in gradients if not getattr(gradient, "_zero_padding", False)]
    norms = torch._foreach_norm(whole, 2, dtype=torch.float32) if whole else [torch.zeros((), device=optimizer.device)]
    norm = torch.stack(norms).double().square().sum().float()
    dist.all_reduce(norm, group=optimizer.dp_process_group)
    norm = norm.sqrt()
    mask_nan_or_inf_with_val_inplace(norm, device=norm.device)
    return norm
