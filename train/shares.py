"""Who does which part of a step's batch, when the number of workers may change: pure functions, and the batches.

An elastic run keeps the batch of its full size. It is cut into *shares*, one for each worker of the full size, with the
tokens and the random numbers of that worker; fewer workers do several shares each. What a gate decides depends on the
micro-batch and its random numbers alone, so a step has the same tokens, routes and drops at every size: only the order
of sums differs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from train.config import TrainConfig
from train.data import Batch, BatchSampler, TokenStore
from train.distributed import World


@dataclass(frozen=True, kw_only=True)
class MicroStep:
    """One forward and backward pass of one rank."""

    share: int
    """Part of the batch, from 0."""
    micro_step: int
    """Micro-batch inside the share, from 0."""
    weight: float
    """Factor of its loss. 1 where all ranks have equally many micro-batches; 0: done only because the others do one
    more, and every rank must enter every collective."""


def micro_steps_of(rank: int, *, world_size: int, num_shares: int, per_share: int) -> tuple[MicroStep, ...]:
    """What `rank` does in one step: equally many micro-steps on every rank.

    DeepSpeed averages over a rank's micro-steps, then over ranks. The weights turn that into the average over all
    micro-batches of the step. per_share: micro-batches of a share; world_size: at most num_shares.
    """
    total = num_shares * per_share
    rounds = math.ceil(total / world_size)
    weight = rounds * world_size / total
    mine = range(rank * total // world_size, (rank + 1) * total // world_size)
    steps = [MicroStep(share=i // per_share, micro_step=i % per_share, weight=weight) for i in mine]
    idle = [dataclasses.replace(steps[-1], weight=0.0)] * (rounds - len(steps))
    return (*steps, *idle)


def seed_for(seed: int, *where: object) -> int:
    """A 63-bit seed for one place in a run, e.g. `seed_for(1234, "train", step, rank)`."""
    digest = hashlib.sha256("/".join(map(str, (seed, *where))).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def seed_torch(seed: int) -> None:
    """As `torch.manual_seed`, for CPUs and GPUs: that one also tells devices which are not there, and formats a
    traceback for each of them at every call."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


class ShareBatches:
    """The batches of one rank. Giving one out also seeds torch for the passes over it.

    Where the number of workers is fixed, a share is a rank, and torch is seeded once for all its micro-batches. In an
    elastic run a share may begin on one rank and end on another, so each micro-batch is seeded.
    """

    def __init__(self, config: TrainConfig, store: TokenStore, world: World):
        self._seed = config.run.seed
        self._is_elastic = config.run.is_elastic
        self.num_shares = config.run.num_shares or world.world_size
        place = {"rank": world.rank, "world_size": world.world_size, "num_shares": self.num_shares}
        self.train_steps = micro_steps_of(per_share=config.optim.grad_accum, **place)
        self.val_steps = micro_steps_of(per_share=config.run.eval_batches, **place)
        self._sampler = BatchSampler(
            store=store,
            seq_len=config.data.seq_len,
            micro_batch=config.optim.micro_batch,
            seed=config.run.seed,
            rank=world.rank,
            world_size=self.num_shares,
        )

    def train(self, step: int) -> Iterator[tuple[MicroStep, Batch]]:
        """The micro-batches of a step, which counts from 1."""
        for micro in self.train_steps:
            self._seed_torch(micro, "train", step)
            yield micro, self._of(micro).train_batch(step, micro.micro_step)

    def validation(self) -> Iterator[tuple[MicroStep, Batch]]:
        """The micro-batches of a validation, the same at every validation of a run."""
        for micro in self.val_steps:
            self._seed_torch(micro, "validation")
            yield micro, self._of(micro).val_batch(micro.micro_step)

    def _of(self, micro: MicroStep) -> BatchSampler:
        return dataclasses.replace(self._sampler, rank=micro.share)

    def _seed_torch(self, micro: MicroStep, *where: object) -> None:
        if micro.micro_step == 0:
            seed_torch(seed_for(self._seed, *where, micro.share))
        elif self._is_elastic:
            seed_torch(seed_for(self._seed, *where, micro.share, micro.micro_step))
