"""Dispatch, a small MLP and combine with fixed shapes, as one CUDA graph that is replayed with new inputs."""

from __future__ import annotations

import gc

import device_cases
import device_oracle
import torch
from cases import Case
from device_oracle import World

from ray_deepep import Buffer, CombineResult, DispatchResult, TokenMajor


def new_graph() -> torch.cuda.CUDAGraph:
    """A graph to capture into. Graphs that nobody holds go first: one that goes amid a capture spoils it."""
    gc.collect()
    return torch.cuda.CUDAGraph()


class Mlp:
    """Two matrix products per row, equal on all ranks."""

    def __init__(self, hidden: int, dtype: torch.dtype) -> None:
        generator = torch.Generator("cuda").manual_seed(9)
        shapes = (hidden, 2 * hidden), (2 * hidden, hidden)
        self.weights = [
            (torch.randn(shape, device="cuda", generator=generator) / shape[0] ** 0.5).to(dtype) for shape in shapes
        ]

    def __call__(self, dispatched: DispatchResult) -> torch.Tensor:
        """Expert outputs; of token-major rows times the weights of their local experts."""
        first, second = self.weights
        rows = torch.relu(dispatched.x @ first) @ second
        if isinstance(dispatched.handle.layout, TokenMajor):
            rows = rows * dispatched.topk_weights.sum(1, keepdim=True).to(rows.dtype)
        return rows


class CapturedLayer:
    """The three steps on static inputs; making one is collective, and so are ``load`` + ``replay``.

    Attributes: ``dispatched``, ``rows`` and ``combined``, overwritten by each replay.
    """

    dispatched: DispatchResult
    rows: torch.Tensor
    combined: CombineResult

    def __init__(
        self,
        buffer: Buffer,
        case: Case,
        rank: int,
        *,
        max_recv_tokens: int,
        async_op: bool = False,
    ) -> None:
        self.buffer, self.rank, self.case = buffer, rank, case
        self.max_recv_tokens, self.async_op = max_recv_tokens, async_op
        self.mlp = Mlp(case.hidden, case.dtype)
        shape = (case.num_tokens[rank], case.num_topk)
        self.x = torch.zeros(shape[0], case.hidden, dtype=case.dtype, device="cuda")
        self.topk_idx = torch.full(shape, -1, dtype=torch.int64, device="cuda")
        self.topk_weights = torch.zeros(shape, device="cuda")
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self.run()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self.graph = new_graph()
        with torch.cuda.graph(self.graph):
            self.run()

    def run(self) -> None:
        """The three steps as they are written, eager or into a graph."""
        more = {"async_op": True} if self.async_op else {}
        dispatched = self.buffer.dispatch(
            self.x,
            self.topk_idx,
            self.topk_weights,
            layout=self.case.layout,
            max_recv_tokens=self.max_recv_tokens,
            **more,
        )
        self.dispatched = dispatched.wait() if self.async_op else dispatched
        self.rows = self.mlp(self.dispatched)
        weighted = not isinstance(self.case.layout, TokenMajor)
        combined = self.buffer.combine(self.rows, self.dispatched.handle, weighted=weighted, **more)
        self.combined = combined.wait() if self.async_op else combined

    def load(self, world: World) -> None:
        """Put this rank's inputs in place."""
        self.x.copy_(world.x[self.rank])
        self.topk_idx.copy_(world.topk_idx[self.rank])
        self.topk_weights.copy_(world.topk_weights[self.rank])

    def replay(self, world: World) -> None:
        """Run the graph on this rank's inputs of ``world``."""
        self.load(world)
        self.graph.replay()

    def check(self, world: World) -> None:
        """Compare what the last run left with the oracle; collective."""
        self.dispatched.handle.check()
        device_cases.assert_dispatched(self.dispatched, world, self.rank, max_recv_tokens=self.max_recv_tokens)
        torch.testing.assert_close(self.rows, self.mlp(self.dispatched), rtol=2e-2, atol=2e-2)
        weighted = not isinstance(self.case.layout, TokenMajor)
        want = device_oracle.combine(world, self.rank, device_cases.gather_rows(self.rows), weighted=weighted)
        device_cases.assert_same("combine x", self.combined.x, want)
