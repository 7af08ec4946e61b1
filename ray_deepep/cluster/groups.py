"""Bringing one worker into its EP group, the same for Ray Train workers and raw actors."""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING

import torch.distributed as dist

from ..config import CommConfig
from ..errors import InvalidArgumentError
from .layout import group_of

if TYPE_CHECKING:
    from ..communicator import Communicator
    from ..deepspeed import Swap, SwapConfig


def own_ep_group(
    groups: tuple[tuple[int, ...], ...], world_rank: int, timeout_s: float
) -> tuple[tuple[int, ...], dist.ProcessGroup]:
    """World ranks and torch process group of this rank's EP group. Collective over the world.

    Every rank makes every group, as torch requires.
    """
    ranks = group_of(world_rank, groups)
    if len(groups) == 1:
        return ranks, dist.group.WORLD
    timeout = datetime.timedelta(seconds=timeout_s)
    made = {members: dist.new_group(list(members), timeout=timeout) for members in groups}
    return ranks, made[ranks]


def swap_deepspeed(
    swap: bool | SwapConfig, communicator: Communicator, ranks: tuple[int, ...], comm: CommConfig
) -> Swap | None:
    """Swap DeepSpeed's MoE layers in this process and hand them the communicator of their EP group.

    Args:
        swap: False: leave DeepSpeed alone; True: with the swap's defaults; or its settings.
    """
    if swap is False:
        return None
    try:
        from .. import deepspeed as backend
    except ImportError as error:
        rule = f"needs DeepSpeed, which this worker cannot import ({error}); pass swap=False to train without it"
        raise InvalidArgumentError("swap", swap, rule) from error
    config = backend.SwapConfig(comm=comm) if swap is True else swap
    active = backend.enable(config)
    try:
        active.adopt(communicator, ranks)
    except BaseException:
        active.close()
        raise
    return active
