"""Sizes, routing and inputs of a CUDA benchmark, and how many bytes each operation has to move."""

from __future__ import annotations

import dataclasses

import torch
import torch.distributed as dist
from torch import Tensor

WIRE_GB_S = 374.0
"""NVLink 4 of an H100, one direction, as measured with bulk copies on the reference host (see docs/performance.md)."""
ROUTINGS = ("uniform", "one_hot_expert", "one_rank")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes; T per rank."""

    num_ranks: int
    num_tokens: int
    hidden: int
    num_topk: int
    num_experts: int
    dtype: str
    routing: str

    @property
    def title(self) -> str:
        """In words."""
        sizes = f"{self.num_tokens} tokens × {self.hidden} {self.dtype}, top-{self.num_topk} of {self.num_experts}"
        return f"{sizes}, {self.routing} routing, {self.num_ranks} rank{'s' if self.num_ranks > 1 else ''}"

    @property
    def num_local_experts(self) -> int:
        """L."""
        return self.num_experts // self.num_ranks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """Of one rank."""

    x: Tensor
    topk_idx: Tensor
    topk_weights: Tensor

    @classmethod
    def make(cls, case: Case, rank: int) -> Inputs:
        """Random rows and routing on the current GPU."""
        generator = torch.Generator("cuda").manual_seed(rank)
        shape = (case.num_tokens, case.hidden)
        x = torch.randn(shape, device="cuda", generator=generator).to(getattr(torch, case.dtype))
        scores = torch.rand(case.num_tokens, case.num_experts, device="cuda", generator=generator)
        if case.routing == "one_hot_expert":
            # Every token wants expert 0; its other experts are random.
            scores[:, 0] += 1.0
        elif case.routing == "one_rank":
            if case.num_local_experts < case.num_topk:
                raise SystemExit(f"--routing one_rank needs at least top-{case.num_topk} experts on a rank")
            scores[:, case.num_local_experts :] -= 2.0
        weights, topk_idx = scores.topk(case.num_topk)
        return cls(x=x, topk_idx=topk_idx, topk_weights=weights.contiguous())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moved:
    """Bytes of one operation, of the rank with most."""

    remote: int
    """Over the wire in one direction, each row once."""
    local: int
    """Read and written in the rank's own memory."""
    received: int
    """Token rows of all ranks, this one included: what DeepEP's own GB/s counts."""

    def record(self, median_us: float) -> dict[str, object]:
        """Fields of a result line, with what they mean at a median time."""
        floor_us = self.remote / WIRE_GB_S / 1e3
        return {
            "remote_bytes": self.remote,
            "local_bytes": self.local,
            "floor_us": round(floor_us, 2),
            "share_of_floor": round(floor_us / median_us, 4),
            "deepep_gb_s": round(self.received / median_us / 1e3, 1),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
    """Who sends how many rows to whom."""

    case: Case
    pairs: Tensor
    """``[N, N]`` tokens of a source with an expert on a destination."""
    routes: Tensor
    """``[N, N]`` (token, expert) pairs."""
    expert_routes: Tensor
    """``[E]`` routes of all ranks."""

    @classmethod
    def of(cls, case: Case, topk_idx: Tensor) -> Traffic:
        """Collective."""
        destination = torch.div(topk_idx, case.num_local_experts, rounding_mode="floor").cpu()
        ranks = range(case.num_ranks)
        own = torch.tensor([[int((destination == d).any(1).sum()), int((destination == d).sum())] for d in ranks])
        everyone = [torch.empty_like(own) for _ in ranks]
        dist.all_gather(everyone, own)
        pairs, routes = torch.stack(everyone).unbind(2)
        experts = torch.bincount(topk_idx.flatten().cpu(), minlength=case.num_experts)
        dist.all_reduce(experts)
        return cls(case=case, pairs=pairs, routes=routes, expert_routes=experts)

    def num_rows(self, alignment: int | None) -> list[int]:
        """Rows of each rank's dispatched output: expert-major with an alignment, token-major with None."""
        if alignment is None:
            return self.pairs.sum(0).tolist()
        aligned = (self.expert_routes + alignment - 1) // alignment * alignment
        return aligned.view(self.case.num_ranks, -1).sum(1).tolist()

    def dispatch(self, row_bytes: int, alignment: int | None) -> Moved:
        """One row per (token, rank) over the wire, written to all its slots."""
        written = torch.tensor(self.num_rows(alignment)) * row_bytes
        return Moved(
            remote=_largest_remote(self.pairs) * row_bytes,
            local=int((self.pairs.diagonal() * row_bytes + written).max()),
            received=int(self.pairs.sum(0).max()) * row_bytes,
        )

    def combine(self, row_bytes: int, reduce: str | None) -> Moved:
        """``reduce`` is None for token-major rows. Unless it is ``exact``, one row per (token, rank) crosses."""
        crossing = self.routes if reduce == "exact" else self.pairs
        local = crossing.diagonal() + self.case.num_tokens
        if reduce == "fast":
            local = local + self.routes.sum(0) + self.pairs.sum(0)
        return Moved(
            remote=_largest_remote(crossing) * row_bytes,
            local=int(local.max()) * row_bytes,
            received=int(self.pairs.sum(0).max()) * row_bytes,
        )


def _largest_remote(rows: Tensor) -> int:
    """Rows that one rank sends to or gets from others, the larger."""
    elsewhere = rows - torch.diag(rows.diagonal())
    return int(max(elsewhere.sum(0).max(), elsewhere.sum(1).max()))
