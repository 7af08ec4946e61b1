"""What NCCL needs for the same rows: all-gather and reduce-scatter of all tokens, and all-to-all-v of routes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from .cuda_traffic import Case, Inputs, Moved, Traffic


def nccl_problem(num_ranks: int) -> str:
    """Why NCCL cannot be compared with; empty if it can."""
    if num_ranks == 1:
        return "one rank has nobody to send to"
    gpus = torch.cuda.device_count()
    if gpus < num_ranks:
        return f"NCCL wants a GPU per rank, and {num_ranks} ranks share {gpus}"
    return ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Baseline:
    """One call to time."""

    name: str
    call: Callable[[], object]
    moved: Moved


class NcclBaselines:
    """Calls over a NCCL group of all ranks; making it is collective."""

    def __init__(self, case: Case, inputs: Inputs, traffic: Traffic) -> None:
        self.case, self.inputs, self.traffic = case, inputs, traffic
        self.group = dist.new_group(backend="nccl")
        shape = (case.num_ranks * case.num_tokens, case.hidden)
        self.everyone = torch.empty(shape, dtype=inputs.x.dtype, device="cuda")
        self.reduced = torch.empty_like(inputs.x)

    def all(self) -> list[Baseline]:
        """Each with the bytes that it moves."""
        row_bytes = self.case.hidden * self.inputs.x.element_size()
        own, others = self.case.num_tokens * row_bytes, (self.case.num_ranks - 1) * self.case.num_tokens * row_bytes
        gathered = Moved(remote=others, local=2 * own + others, received=own + others)
        routes = self.traffic.routes - torch.diag(self.traffic.routes.diagonal())
        remote = int(max(routes.sum(0).max(), routes.sum(1).max())) * row_bytes
        received = int(self.traffic.routes.sum(0).max()) * row_bytes
        by_route = Moved(remote=remote, local=2 * received, received=received)
        return [
            Baseline(name="NCCL all_gather of all tokens", call=self._all_gather, moved=gathered),
            Baseline(name="NCCL reduce_scatter of all tokens", call=self._reduce_scatter, moved=gathered),
            Baseline(name="sort + gather + NCCL all-to-all-v of routes", call=self._all_to_all, moved=by_route),
        ]

    def close(self) -> None:
        """Collective."""
        dist.destroy_process_group(self.group)

    def _all_gather(self) -> Tensor:
        dist.all_gather_into_tensor(self.everyone, self.inputs.x, group=self.group)
        return self.everyone

    def _reduce_scatter(self) -> Tensor:
        dist.reduce_scatter_tensor(self.reduced, self.everyone, group=self.group)
        return self.reduced

    def _all_to_all(self) -> Tensor:
        """What a plain token dispatcher does, its host waits included."""
        case, routes = self.case, self.inputs.topk_idx.flatten()
        order = routes.argsort(stable=True)
        rows = self.inputs.x[order // case.num_topk]
        sent = torch.bincount(routes // case.num_local_experts, minlength=case.num_ranks)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.group)
        num_sent, num_received = torch.stack([sent, received]).tolist()
        arrived = rows.new_empty(sum(num_received), case.hidden)
        dist.all_to_all_single(arrived, rows, num_received, num_sent, group=self.group)
        return arrived
