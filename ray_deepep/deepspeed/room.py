"""How large a layer's buffer is made: a pure function of what all ranks know, so that all make the same one.

Token counts may differ between ranks and grow later, and the address space of a heap is free until it is written. So a
buffer is asked for as many rows as ``heap_gib`` gives room for, up to a million tokens per rank:

- a quarter of the space is for the rows that a rank sends: ``max_tokens`` rows of ``hidden`` float32 elements and what
  travels beside them;
- half is for the rows that its experts return: ``num_experts * max_capacity`` padded rows, or, compact,
  ``num_ranks * max_tokens * min(num_topk, num_local_experts)`` rows where every token of every rank comes;
- the rest is the transport's.
"""

from __future__ import annotations

from ..errors import InvalidArgumentError
from ..transport import BufferGeometry

MAX_ROWS = 1 << 20
_BYTES_PER_ELEMENT = 4
_BYTES_BESIDE = 64
_BYTES_PER_ROUTE = 32


def geometry_for(
    *, num_ranks: int, num_experts: int, hidden: int, num_topk: int, padded: bool, heap_gib: float
) -> BufferGeometry:
    """The largest buffer that fits.

    Raises:
        InvalidArgumentError: not even ``num_ranks`` tokens fit ``heap_gib``.
    """
    space = int(heap_gib * (1 << 30))
    # With the ids, weights and scales that travel beside it.
    row = hidden * _BYTES_PER_ELEMENT + hidden // 32 + _BYTES_BESIDE + num_topk * _BYTES_PER_ROUTE
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
