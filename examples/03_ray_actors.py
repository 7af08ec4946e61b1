"""Ray actors that dispatch and combine: one call gives them a communicator, and a dead actor is named.

    python examples/03_ray_actors.py

Four actors of any class meet through `bootstrap(actors)`, in two EP groups of two. Each sends tokens to the experts of
its group and gets them back. Then one actor is killed in the middle: its peer gets an error that names it, in
milliseconds, and a second `bootstrap` with a replacement goes on.
"""

import os
import signal

import ray
import torch

from ray_deepep import Buffer, CommFaultError
from ray_deepep.cluster import bootstrap, current

NUM_EXPERTS, NUM_TOKENS, HIDDEN, NUM_TOPK = 4, 16, 256, 2


@ray.remote(num_cpus=0.5)
class Worker:
    """Any actor class will do."""

    def pid(self) -> int:
        return os.getpid()

    def open(self) -> None:
        """Make a buffer; collective, as bootstrap was."""
        sizes = {"num_experts": NUM_EXPERTS, "hidden": HIDDEN, "num_topk": NUM_TOPK, "max_tokens": NUM_TOKENS}
        self.buffer = Buffer(current().communicator, **sizes)

    def exchange(self) -> str:
        """Tokens to their experts and back; the experts here return what they get."""
        state = current()
        comm = state.communicator
        x = torch.full((NUM_TOKENS, HIDDEN), 1.0 + state.world_rank)
        topk_idx = torch.tensor([[0, 2], [1, 3]]).repeat(NUM_TOKENS // 2, 1)
        arrived = self.buffer.dispatch(x, topk_idx)
        out = self.buffer.combine(arrived.x, arrived.handle).x
        return (
            f"world rank {state.world_rank} is rank {comm.rank} of ranks {state.ranks}, transport {comm.transport}: "
            f"{arrived.x.shape[0]} rows arrived, its tokens came home as {out[0, 0].item():g}"
        )

    def exchange_until_fault(self) -> str:
        """Until a peer is gone."""
        try:
            while True:
                self.exchange()
        except CommFaultError as fault:
            return str(fault)


def start(actors: list) -> None:
    """Bring the actors together, with a buffer each."""
    bootstrap(actors, ep_size=2)
    ray.get([actor.open.remote() for actor in actors])


def main() -> None:
    if "RAY_ADDRESS" in os.environ:
        ray.init(log_to_driver=False)  # a cluster that runs; the rest of this example wants it on this machine
    else:
        ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    actors = [Worker.remote() for _ in range(4)]
    start(actors)
    for line in ray.get([actor.exchange.remote() for actor in actors]):
        print(line)

    pid = ray.get(actors[3].pid.remote())
    suffering = actors[2].exchange_until_fault.remote()
    actors[3].exchange_until_fault.remote()
    ray.wait([suffering], timeout=1)
    os.kill(pid, signal.SIGKILL)
    print(f"\nkilled world rank 3 (pid {pid}); world rank 2 says:\n  {ray.get(suffering)}\n")

    actors[3] = Worker.remote()
    start(actors)
    print(f"with a replacement: {ray.get([actor.exchange.remote() for actor in actors])[3]}")
    ray.shutdown()


if __name__ == "__main__":
    main()
