"""Low-latency dispatch and combine in readable torch: the oracle of the compiled core, and the fallback across hosts.

Rows go through the key-value store behind torch.distributed (``low_latency_mailbox.py``): collectives cannot leave a
rank out, and cannot be sent now and received later.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch

from .errors import ClosedError
from .float8 import quantize
from .handle import ExpertMajor
from .low_latency_mailbox import Arrivals, Mailbox, Message
from .low_latency_transport import (
    HostLowLatency,
    LowLatencyCombineOutputs,
    LowLatencyCombineRequest,
    LowLatencyDispatchOutputs,
    LowLatencyDispatchRequest,
    LowLatencyWait,
)
from .reference_group import Signature, as_bytes, from_bytes
from .transport import BufferGeometry

if TYPE_CHECKING:
    from .communicator import Communicator


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Received:
    """Tokens of one source rank that have an expert here, R of them, ascending."""

    topk_idx: torch.Tensor
    """``[R, K]`` int64: local expert ids, -1 where the expert lives elsewhere."""
    topk_weights: torch.Tensor
    slots: torch.Tensor
    """``[R, K]`` int64: row of each route in the output; -1 where there is no route here, or no room."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReferenceLowLatencyPlan:
    """What a dispatch of the reference leaves for its combine."""

    sequence: int
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor
    absent: list[bool]
    received: list[_Received | None]
    """By source rank; None where it was absent."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sent:
    """A send of the reference; the routing is this rank's own."""

    operation: str
    sequence: int
    masked: frozenset[int]
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor


class ReferenceLowLatency(HostLowLatency):
    """See :class:`~ray_deepep.low_latency_transport.LowLatencyTransport`. Making one is collective."""

    device = None

    def __init__(self, comm: Communicator, geometry: BufferGeometry) -> None:
        self._rank, self._num_ranks, self._geometry = comm.rank, comm.num_ranks, geometry
        self._num_local = geometry.num_experts // comm.num_ranks
        self._mailbox = Mailbox(comm)
        self._closed = False

    def in_heap(self, rows: torch.Tensor) -> bool:
        """See the protocol."""
        return True

    def empty(self, *shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """See the protocol."""
        return torch.empty(shape, dtype=dtype, device=device)

    def send_dispatch(self, request: LowLatencyDispatchRequest) -> _Sent:
        """To each rank the rows of tokens with an expert there, and these tokens' routing."""
        self._check_open("low_latency_dispatch")
        x, scales, topk_idx = request.x, request.x_scales, request.topk_idx.to(torch.int64)
        if request.cast is not None:
            rows = quantize(x, request.cast)
            x, scales = rows.data, rows.scales
        weights = request.topk_weights
        weights = torch.ones(topk_idx.shape, device=x.device) if weights is None else weights.clone()
        messages = []
        for peer in range(self._num_ranks):
            tokens = self._tokens_for(topk_idx, peer)
            parts = [topk_idx[tokens], weights[tokens], as_bytes(x)[tokens]]
            messages.append(parts if scales is None else [*parts, scales[tokens]])
        signature = {"dtype": str(x.dtype).removeprefix("torch."), "num_topk": topk_idx.shape[1]}
        return self._send("low_latency_dispatch", signature, messages, topk_idx.clone(), weights)

    def receive_dispatch(
        self, call: _Sent, request: LowLatencyDispatchRequest, out: LowLatencyDispatchOutputs, wait: LowLatencyWait
    ) -> ReferenceLowLatencyPlan:
        """Place what came: by expert, then source rank, then token."""
        arrivals = self._receive(call, wait, out.absent)
        messages = [None if m is None else [part.to(out.x.device) for part in m] for m in arrivals.messages]
        local_idx = [None if m is None else self._local(m[0]) for m in messages]
        first_row = _fill_counts(request, out, wait, local_idx)
        num_rows, hidden_bytes = out.x.shape[:-1].numel(), out.x.shape[-1] * out.x.element_size()
        x = out.x.view(torch.uint8).view(num_rows, hidden_bytes)
        received: list[_Received | None] = []
        for source, message in enumerate(messages):
            if message is None:
                received.append(None)
                continue
            slots = torch.full_like(local_idx[source], -1)
            for expert in range(self._num_local):
                token, k = (local_idx[source] == expert).nonzero(as_tuple=True)
                rows = first_row[expert][source] + torch.arange(len(token), device=x.device)
                fits = rows < num_rows
                token, k, rows = token[fits], k[fits], rows[fits]
                slots[token, k] = rows
                x[rows] = message[2][token]
                if out.x_scales is not None:
                    out.x_scales.view(num_rows, -1)[rows] = message[3][token]
            received.append(_Received(topk_idx=local_idx[source], topk_weights=message[1], slots=slots))
        return ReferenceLowLatencyPlan(
            sequence=call.sequence,
            topk_idx=call.topk_idx,
            topk_weights=call.topk_weights,
            absent=arrivals.absent,
            received=received,
        )

    def send_combine(self, request: LowLatencyCombineRequest) -> _Sent:
        """To each source rank a row per token (fast) or per route (exact)."""
        self._check_open("low_latency_combine")
        plan: ReferenceLowLatencyPlan = request.plan
        rows = request.rows.view(-1, self._geometry.hidden)
        make = _sums if request.reduce == "fast" else _routes
        empty = [rows[:0].view(torch.uint8)]
        messages = [empty if r is None else [as_bytes(make(rows, r))] for r in plan.received]
        signature = {
            "dtype": str(rows.dtype).removeprefix("torch."),
            "num_topk": plan.topk_idx.shape[1],
            "handle (dispatch number)": plan.sequence,
            "reduce": "exact, zero_copy" if request.zero_copy else request.reduce,
        }
        weights = plan.topk_weights if request.topk_weights is None else request.topk_weights.clone()
        return self._send("low_latency_combine", signature, messages, plan.topk_idx, weights)

    def receive_combine(
        self, call: _Sent, request: LowLatencyCombineRequest, out: LowLatencyCombineOutputs, wait: LowLatencyWait
    ) -> None:
        """Add up what came."""
        arrivals = self._receive(call, wait, out.absent)
        absent = [a or b for a, b in zip(arrivals.absent, request.plan.absent)]
        out.absent.copy_(torch.tensor(absent))
        dtype, device, topk_idx = out.x.dtype, out.x.device, call.topk_idx
        parts = {
            peer: from_bytes(message[0].to(device), dtype).float()
            for peer, message in enumerate(arrivals.messages)
            if not absent[peer]
        }
        total = torch.zeros(out.x.shape, device=device)
        if request.reduce == "fast":
            for peer, part in parts.items():
                total[self._tokens_for(topk_idx, peer)] += part
        else:
            routes = torch.zeros(*topk_idx.shape, out.x.shape[1], device=device)
            present = torch.zeros(topk_idx.shape, dtype=torch.bool, device=device)
            for peer, part in parts.items():
                here = (topk_idx >= 0) & (topk_idx // self._num_local == peer)
                routes[here], present = part, present | here
            for k in range(topk_idx.shape[1]):
                added = total + routes[:, k] * call.topk_weights[:, k, None]
                total = torch.where(present[:, k, None], added, total)
        out.x.copy_(total.to(dtype))

    def mask(self, rank: int, masked: bool) -> None:
        """See the protocol."""
        self._mailbox.mask(rank, masked)

    def masked(self) -> tuple[int, ...]:
        """See the protocol."""
        return tuple(sorted(self._mailbox.masked))

    def returning(self) -> tuple[int, ...]:
        """See the protocol."""
        return self._mailbox.returning()

    def rejoin(self, deadline_s: float) -> None:
        """See the protocol."""
        self._mailbox.rejoin(deadline_s)

    def close(self) -> None:
        """Tell peers that still wait for this rank; not collective."""
        if not self._closed:
            self._closed = True
            self._mailbox.close()

    def _check_open(self, operation: str) -> None:
        if self._closed:
            raise ClosedError(f"{operation}: the buffer is closed")

    def _send(
        self,
        operation: str,
        signature: Signature,
        messages: list[Message],
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
    ) -> _Sent:
        sequence, masked = self._mailbox.send(operation, signature, messages)
        return _Sent(
            operation=operation, sequence=sequence, masked=masked, topk_idx=topk_idx, topk_weights=topk_weights
        )

    def _receive(self, call: _Sent, wait: LowLatencyWait, absent: torch.Tensor) -> Arrivals:
        arrivals = self._mailbox.receive(
            call.operation, call.sequence, call.masked, wait.timeout_s, on_timeout=wait.on_timeout
        )
        absent.copy_(torch.tensor(arrivals.absent))
        wait.stats.wait_ns.add_(torch.tensor(arrivals.wait_ns, device=wait.stats.wait_ns.device))
        return arrivals

    def _tokens_for(self, topk_idx: torch.Tensor, peer: int) -> torch.Tensor:
        """Tokens with an expert of rank ``peer``, ascending."""
        return ((topk_idx >= 0) & (topk_idx // self._num_local == peer)).any(1).nonzero().squeeze(1)

    def _local(self, topk_idx: torch.Tensor) -> torch.Tensor:
        """Ids of this rank's experts from 0, -1 for all others."""
        local = topk_idx - self._rank * self._num_local
        return torch.where((topk_idx >= 0) & (local >= 0) & (local < self._num_local), local, -1)


def _fill_counts(
    request: LowLatencyDispatchRequest,
    out: LowLatencyDispatchOutputs,
    wait: LowLatencyWait,
    local_idx: list[torch.Tensor | None],
) -> list[list[int]]:
    """Counts, ranges and offsets of the output. Returns the first row of each (expert, source)."""
    num_local, num_ranks = out.range_count.shape
    num_rows = out.x.shape[:-1].numel()
    compact = isinstance(request.layout, ExpertMajor)
    x = out.x.view(num_rows, out.x.shape[-1])
    first_row, offsets, offset = [], [], 0
    for expert in range(num_local):
        arrived = [0 if idx is None else int((idx == expert).sum()) for idx in local_idx]
        room = max(num_rows - offset, 0) if compact else num_rows // num_local
        ends = [sum(arrived[: source + 1]) for source in range(num_ranks)]
        begins = [end - count for end, count in zip(ends, arrived)]
        out.range_begin[expert] = torch.tensor(begins).clamp(max=room)
        out.range_count[expert] = torch.tensor(ends).clamp(max=room) - torch.tensor(begins).clamp(max=room)
        out.counts[expert] = min(ends[-1], room)
        wait.stats.num_tokens_per_expert[expert] += ends[-1]
        first_row.append([offset + begin for begin in begins])
        offsets.append(min(offset, num_rows))
        if compact:
            aligned = -(-ends[-1] // request.layout.alignment) * request.layout.alignment
            padding = slice(offset + ends[-1], offset + aligned)
            x[padding].view(torch.uint8).zero_()
            if out.x_scales is not None:
                out.x_scales[padding] = 0.0
            offset += aligned
        else:
            offset += room
    out.expert_offsets.copy_(torch.tensor([*offsets, min(offset, num_rows)]))
    out.needed.fill_(offset)
    return first_row


def _sums(rows: torch.Tensor, received: _Received) -> torch.Tensor:
    """``[R, H]``: each token's rows weighted and added up in float32, k order, rounded once."""
    total = torch.zeros(len(received.slots), rows.shape[1], device=rows.device)
    for k in range(received.slots.shape[1]):
        here = received.slots[:, k] >= 0
        total[here] += rows[received.slots[here, k]].float() * received.topk_weights[here, k, None]
    return total.to(rows.dtype)


def _routes(rows: torch.Tensor, received: _Received) -> torch.Tensor:
    """One row per route, in order of (token, k); zeros where the route had no room."""
    slots = received.slots[received.topk_idx >= 0]
    return torch.where(slots[:, None] >= 0, rows[slots.clamp(min=0)], torch.zeros_like(rows[:1]))
