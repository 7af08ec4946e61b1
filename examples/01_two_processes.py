"""Two processes exchange rows: each token goes to the processes of its experts, and the results come back.

    python examples/01_two_processes.py

Every process holds 4 tokens and 2 of the 4 experts; a router has chosen two experts for each token. `dispatch` brings
each process the rows of its experts, in a block per expert; the experts do their work; `combine` brings the results
back and adds them up, weighted. Expert number e multiplies its rows by 10 ** e, so the output can be checked by eye.
"""

import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ray_deepep import Buffer, Communicator, ExpertMajor

NUM_RANKS, NUM_EXPERTS, NUM_TOKENS, HIDDEN, NUM_TOPK = 2, 4, 4, 8, 2


def main(rank: int, folder: str) -> None:
    # Any torch process group will do; torchrun, Ray Train and DeepSpeed bring one along.
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=NUM_RANKS)

    # Token t of rank r is a row of the number 4r + t + 1. The router's choice: -1 would mean "no expert".
    numbers = torch.arange(1.0, NUM_TOKENS + 1) + NUM_TOKENS * rank
    x = numbers.unsqueeze(1).expand(-1, HIDDEN).contiguous()
    topk_idx = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0]])
    topk_weights = torch.tensor([[0.75, 0.25]]).repeat(NUM_TOKENS, 1)

    with Communicator.from_process_group() as comm:
        say(rank, f"transport {comm.transport}: {comm.transport_reason}", only=0)
        buffer = Buffer(comm, num_experts=NUM_EXPERTS, hidden=HIDDEN, num_topk=NUM_TOPK, max_tokens=NUM_TOKENS)

        # One call, and all rows are here, grouped by expert. The handle remembers the way back.
        arrived = buffer.dispatch(x, topk_idx, topk_weights, layout=ExpertMajor())

        # The experts of this process, each on its own block of rows. In a model: a matrix product per block.
        rows, begin = arrived.x.clone(), arrived.handle.expert_offsets
        for local in range(buffer.num_local_experts):
            expert = rank * buffer.num_local_experts + local
            block = rows[begin[local] : begin[local + 1]]
            say(rank, f"expert {expert} gets tokens {block[:, 0].int().tolist()} and multiplies them by {10**expert:,}")
            block *= 10**expert

        out = buffer.combine(rows, arrived.handle, weighted=True).x

    for token, chosen, result in zip(numbers.int().tolist(), topk_idx.tolist(), out[:, 0].tolist(), strict=True):
        terms = " + ".join(f"{w} x {10**e:,} x {token}" for w, e in zip((0.75, 0.25), chosen, strict=True))
        say(rank, f"token {token} went to experts {chosen}: {terms} = {result:,.2f}")
    dist.destroy_process_group()


def say(rank: int, text: str, only: int | None = None) -> None:
    """Print in rank order, so that lines do not mix."""
    for turn in range(NUM_RANKS):
        dist.barrier()
        if turn == rank and only in (None, rank):
            print(f"[rank {rank}] {text}", flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(main, args=(folder,), nprocs=NUM_RANKS)
