"""A DeepSpeed MoE model trained twice, stock and swapped: one line differs, the losses do not.

    python examples/02_deepspeed_layer.py

Two processes, each with half of the experts, train a small network with a `deepspeed.moe.layer.MoE` in it for a few
steps: first as DeepSpeed does it, then with its all-to-all replaced by ray_deepep. The gate, the experts and their
weights are DeepSpeed's in both runs, and so is every bit of the losses.
"""

import contextlib
import os
import tempfile

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from torch import nn

from ray_deepep.deepspeed import enable

NUM_RANKS, NUM_STEPS, HIDDEN, NUM_TOKENS = 2, 8, 64, 256
DEEPSPEED_CONFIG = {"train_micro_batch_size_per_gpu": NUM_TOKENS, "steps_per_print": 1_000_000}


class Model(nn.Module):
    """Two linear layers with a mixture of 8 experts between them."""

    def __init__(self) -> None:
        super().__init__()
        expert = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, HIDDEN))
        self.first, self.last = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.moe = MoE(hidden_size=HIDDEN, expert=expert, num_experts=8, ep_size=NUM_RANKS, k=2, capacity_factor=1.25)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.first(x)
        out, l_aux, _ = self.moe(h)
        return self.last(h + out), l_aux


def train() -> list[float]:
    """Loss of each step on this rank. Nothing in here knows of ray_deepep."""
    torch.manual_seed(7)
    model = Model()
    groups = split_params_into_different_moe_groups_for_optimizer({"params": list(model.parameters()), "name": "all"})
    optimizer = torch.optim.AdamW(groups, lr=3e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=DEEPSPEED_CONFIG)
    torch.manual_seed(100 + dist.get_rank())
    x = torch.randn(NUM_TOKENS, HIDDEN)
    target = x.roll(1, dims=1).sin()
    losses = []
    for _ in range(NUM_STEPS):
        y, l_aux = engine(x)
        loss = nn.functional.mse_loss(y, target) + 0.01 * l_aux
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    engine.destroy()
    return losses


def main(rank: int, folder: str) -> None:
    # Ranks share the cores of one machine here.
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=NUM_RANKS)
    os.environ["LOCAL_RANK"] = str(rank)
    # Compiling DeepSpeed's shared-memory op takes a minute, and training does not use it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    with quiet():
        stock = train()
        with enable():  # the one line
            swapped = train()
    if rank == 0:
        print("step   stock loss           swapped loss         equal")
        for step, (a, b) in enumerate(zip(stock, swapped, strict=True), start=1):
            print(f"{step:4}   {a:<18.15f}   {b:<18.15f}   {'bit for bit' if a == b else 'NO'}")
    # torch's gloo threads put their last work away meanwhile; one that finds Python ending aborts the process.
    dist.barrier()
    dist.destroy_process_group()


def quiet() -> contextlib.AbstractContextManager:
    """Leave out what DeepSpeed prints while it starts."""
    deepspeed.utils.logger.setLevel("WARNING")
    return contextlib.redirect_stdout(None)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(main, args=(folder,), nprocs=NUM_RANKS)
