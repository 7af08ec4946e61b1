"""Bringing one worker into its EP group, the same for Ray Train workers and raw actors."""

from __future__ import annotations

import datetime
import sys
from typing import TYPE_CHECKING

import torch.distributed as dist

from ..bounded import NoReturnError, call_within
from ..config import CommConfig
from ..errors import BootstrapError, InvalidArgumentError, InvalidTypeError
from .layout import group_of

if TYPE_CHECKING:
    from ..communicator import Communicator
    from ..deepspeed import Swap, SwapConfig


STORE_OF_RANK_0 = "torch.distributed did not return; its store is in the process of world rank 0, at {}:{}"


def own_ep_group(
    groups: tuple[tuple[int, ...], ...], world_rank: int, timeout_s: float, *, deadline_s: float
) -> tuple[tuple[int, ...], dist.ProcessGroup]:
    """World ranks and torch process group of this rank's EP group. Collective over the world.

    Every rank makes every group, as torch requires.

    Raises:
        BootstrapError: they were not made within ``deadline_s``.
    """
    ranks = group_of(world_rank, groups)
    if len(groups) == 1:
        return ranks, dist.group.WORLD
    timeout = datetime.timedelta(seconds=timeout_s)
    try:
        # torch asks its store without a deadline.
        made = call_within(
            deadline_s,
            lambda: {members: dist.new_group(list(members), timeout=timeout) for members in groups},
            # Nobody has them; they go with the process group.
            if_late=lambda: None,
        )
    except NoReturnError:
        raise BootstrapError("ep_groups", [], deadline_s, "torch.distributed did not return") from None
    return ranks, made[ranks]


def check_swap(swap: object) -> None:
    """Raise ``InvalidTypeError`` unless ``swap`` is a bool or a ``SwapConfig``."""
    # Whoever has a SwapConfig has imported its module; nobody else needs DeepSpeed for this.
    module = sys.modules.get("ray_deepep.deepspeed.config")
    if not isinstance(swap, bool) and (module is None or not isinstance(swap, module.SwapConfig)):
        raise InvalidTypeError("swap", type(swap).__name__, "must be a bool or a SwapConfig")


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
