"""The baseline: a token dispatcher as people write it over ``all_to_all_single``, no faster and no slower."""

from __future__ import annotations

import dataclasses

import torch
import torch.distributed as dist
from torch import Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sent:
    """What a dispatch must remember to bring rows home."""

    token: Tensor
    """``[rows sent]`` int64, the token of each sent row."""
    num_sent: list[int]
    """Rows sent to each rank."""
    num_received: list[int]
    """Rows received from each rank."""
    from_wire: Tensor | None
    """``[rows received]`` int64: position on the wire of each expert-major row; None if rows stay in wire order."""


class GlooDispatcher:
    """Sort, gather, exchange counts, all-to-all-v; and the same way back with ``index_add_``.

    With ``per_route`` one row travels per (token, k) and rows arrive grouped by local expert; without, one per
    (token, rank), in order of (source rank, token). T tokens, H hidden, K top-k, E experts, N ranks.
    """

    def __init__(self, *, num_experts: int, per_route: bool) -> None:
        self._num_experts, self._per_route = num_experts, per_route
        self._num_ranks = dist.get_world_size()

    def dispatch(self, x: Tensor, topk_idx: Tensor) -> tuple[Tensor, Sent]:
        """Send rows of ``x`` ``[T, H]`` to the experts ``topk_idx`` ``[T, K]``; returns the rows received."""
        token, counts = self._sorted_routes(topk_idx) if self._per_route else self._sorted_pairs(topk_idx)
        received_counts = torch.empty_like(counts)
        dist.all_to_all_single(received_counts, counts)
        sent = Sent(
            token=token,
            num_sent=counts.sum(1).tolist(),
            num_received=received_counts.sum(1).tolist(),
            from_wire=_expert_major(received_counts) if self._per_route else None,
        )
        rows = exchange(x.index_select(0, token), sent.num_sent, sent.num_received)
        return rows if sent.from_wire is None else rows.index_select(0, sent.from_wire), sent

    def combine(self, rows: Tensor, sent: Sent, num_tokens: int) -> Tensor:
        """Bring ``rows`` back and add them up per token, ``[T, H]``."""
        if sent.from_wire is not None:
            rows = torch.empty_like(rows).index_copy_(0, sent.from_wire, rows)
        home = exchange(rows, sent.num_received, sent.num_sent)
        return home.new_zeros(num_tokens, home.shape[1]).index_add_(0, sent.token, home)

    def _sorted_routes(self, topk_idx: Tensor) -> tuple[Tensor, Tensor]:
        experts, order = topk_idx.reshape(-1).sort(stable=True)
        counts = torch.bincount(experts, minlength=self._num_experts)
        return order // topk_idx.shape[1], counts.view(self._num_ranks, -1)

    def _sorted_pairs(self, topk_idx: Tensor) -> tuple[Tensor, Tensor]:
        wanted = torch.zeros(self._num_ranks, topk_idx.shape[0], dtype=torch.bool)
        destination = topk_idx // (self._num_experts // self._num_ranks)
        wanted[destination, torch.arange(topk_idx.shape[0]).unsqueeze(1)] = True
        return wanted.nonzero()[:, 1], wanted.sum(1, keepdim=True)


def exchange(rows: Tensor, num_sent: list[int], num_received: list[int], out: Tensor | None = None) -> Tensor:
    """All-to-all-v of rows ``[sum(num_sent), H]``, into ``out`` if given."""
    if out is None:
        out = rows.new_empty(sum(num_received), rows.shape[1])
    dist.all_to_all_single(out, rows, num_received, num_sent)
    return out


def _expert_major(counts: Tensor) -> Tensor:
    """Wire positions in order of (local expert, source rank), from ``counts`` ``[N, L]`` of the rows that came."""
    num_ranks, num_local = counts.shape
    expert_of_block = torch.arange(num_local).repeat(num_ranks)
    return expert_of_block.repeat_interleave(counts.reshape(-1)).argsort(stable=True)
