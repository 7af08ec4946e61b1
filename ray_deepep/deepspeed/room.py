"""How large a layer's buffer is made: pure functions of what all ranks know, so that all make the same one.

On CPUs the address space of a heap is free until it is written, and token counts may differ between ranks and grow
later. So a buffer is asked for as many rows as ``heap_gib`` gives room for, up to a million tokens per rank:

- a quarter of the space is for the rows that a rank sends: ``max_tokens`` rows of ``hidden`` float32 elements and what
  travels beside them;
- half is for the rows that its experts return: ``num_experts * max_capacity`` padded rows, or, compact,
  ``num_ranks * max_tokens * min(num_topk, num_local_experts)`` rows where every token of every rank comes;
- the rest is the transport's.

GPU memory is used at once. There a buffer has what the first forward needs, and makes room for a larger one when that
comes; see :class:`Need`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from ..errors import InvalidArgumentError
from ..transport import BufferGeometry

MAX_ROWS = 1 << 20
GROWTH = 1.25
"""Least growth of what has become too small, so that sizes that creep up do not make a buffer each."""
_BYTES_PER_ELEMENT = 4
_BYTES_BESIDE = 64
_BYTES_PER_ROUTE = 32
_ROOM = ("max_tokens", "max_capacity", "max_rows")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Need:
    """What a forward needs of its buffer."""

    num_tokens: int
    """T of this rank."""
    capacity: int = 0
    """C: routes of this rank to an expert, at most. 0: no more is known than T, K and the experts."""

    @classmethod
    def of_all(cls, needs: Sequence[Need]) -> Need:
        """What fits all ranks."""
        capacities = [need.capacity for need in needs]
        return cls(
            num_tokens=max(need.num_tokens for need in needs), capacity=max(capacities) if all(capacities) else 0
        )


def geometry_for(
    *, num_ranks: int, num_experts: int, hidden: int, num_topk: int, padded: bool, heap_gib: float
) -> BufferGeometry:
    """The largest buffer that fits.

    Raises:
        InvalidArgumentError: not even ``num_ranks`` tokens fit ``heap_gib``.
    """
    space = int(heap_gib * (1 << 30))
    row = _row_bytes(hidden, num_topk)
    max_tokens = min(MAX_ROWS, space // 4 // row)
    max_capacity = 0
    if padded:
        max_capacity = min(MAX_ROWS, space // 2 // (num_experts * row))
    else:
        fan_in = num_ranks * min(num_topk, num_experts // num_ranks)
        max_tokens = min(max_tokens, space // 2 // (fan_in * row))
    if max_tokens < num_ranks or (padded and max_capacity < 1):
        rule = f"is too small for {num_experts} experts of hidden size {hidden} on {num_ranks} ranks"
        raise InvalidArgumentError("heap_gib", heap_gib, rule)
    return BufferGeometry(
        num_experts=num_experts, hidden=hidden, num_topk=num_topk, max_tokens=max_tokens, max_capacity=max_capacity
    )


def geometry_of_need(
    need: Need, *, num_ranks: int, num_experts: int, hidden: int, num_topk: int, padded: bool, heap_gib: float
) -> BufferGeometry:
    """The smallest buffer for ``need``: of all ranks, or of one whose need shall be compared.

    Where the need has no capacity, rows have room for the worst case, but in no more than ``heap_gib``.
    """
    max_tokens, max_rows = max(need.num_tokens, num_ranks), None
    if not padded:
        worst = num_ranks * max_tokens * min(num_topk, num_experts // num_ranks)
        fitting = int(heap_gib * (1 << 30)) // 2 // _row_bytes(hidden, num_topk)
        max_rows = max(num_experts * need.capacity if need.capacity else min(worst, fitting), num_ranks)
        # The core has no more rows than tokens can name; a gate's capacity may be more than that.
        max_tokens = max(max_tokens, math.ceil(max_rows / (num_ranks * num_topk)))
    return BufferGeometry(
        num_experts=num_experts,
        hidden=hidden,
        num_topk=num_topk,
        max_tokens=max_tokens,
        max_capacity=max(need.capacity, 1) if padded else 0,
        max_rows=max_rows,
    )


def fits(wanted: BufferGeometry, given: BufferGeometry) -> bool:
    """Whether a buffer of ``given`` serves what needs ``wanted``, both of the same layer."""
    return all((getattr(wanted, name) or 0) <= (getattr(given, name) or 0) for name in _ROOM)


def grown(given: BufferGeometry, wanted: BufferGeometry) -> BufferGeometry:
    """For both; what is too small becomes ``GROWTH`` times larger at least."""
    sizes = {}
    for name in _ROOM:
        old, new = getattr(given, name), getattr(wanted, name)
        if new is not None:
            sizes[name] = max(new, math.ceil(old * GROWTH)) if new > old else old
    return dataclasses.replace(given, **sizes)


def _row_bytes(hidden: int, num_topk: int) -> int:
    """With the ids, weights and scales that travel beside it."""
    return hidden * _BYTES_PER_ELEMENT + hidden // 32 + _BYTES_BESIDE + num_topk * _BYTES_PER_ROUTE
