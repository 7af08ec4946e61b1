"""Tokens per expert of a step, summed on the device and brought to the host with the steps that show them."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from train.config import RunConfig
from train.distributed import World

_SHOWN_STEPS = 100


class ExpertLoad:
    """Counts of one rank. `add` costs a small addition on the device; `take` waits for it, in steps that are due."""

    def __init__(self, run: RunConfig, world: World) -> None:
        self._every = run.load_every or max(1, run.steps // _SHOWN_STEPS)
        self._last_step = run.steps
        self._world = world
        self._sum: Tensor | None = None

    def add(self, expert_tokens: Tensor) -> None:
        """The counts of one forward pass, int64 [MoE layers, E]."""
        self._sum = expert_tokens if self._sum is None else self._sum + expert_tokens

    def take(self, step: int) -> list[list[int]] | None:
        """Start over; sums of all ranks since the last start if `step` is due, else None. Collective when due."""
        total, self._sum = self._sum, None
        if total is None or (step % self._every and step != self._last_step):
            return None
        if self._world.world_size > 1:
            total = total.clone()
            dist.all_reduce(total)
        return total.tolist()
