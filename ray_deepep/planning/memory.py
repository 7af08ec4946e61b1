"""Memory of one rank: the heap's segment, outputs, index lists. Bytes throughout.

The segment comes from the cores' own arithmetic where they are built (``BufferSizes.area_bytes``,
``LowLatencySizes.segment_bytes``, the CUDA core's ``segment_bytes``), and from the same formula, which docs/design.md
states ("Heap tensors", "Low-latency calls"), where the CUDA core is not built or would refuse so many ranks.
"""

from __future__ import annotations

import dataclasses
import math

from .. import cuda, cuda_arguments, cuda_heap, shm
from .traffic import Traffic
from .workload import ELEMENT_BYTES, SCALE_BLOCK, Workload

PAGE = 4096
SEGMENT_ALIGNMENT = 256
CHUNK_TOKENS, READY_ROWS, READY_FLAG_BYTES, SIGNAL_BYTES = 64, 16, 32, 1024
"""As in csrc/cuda/segment_layout.h, where the formula is needed without the core."""
MAX_CORE_RANKS = 64
"""Ranks of one domain that the CUDA core takes."""
HEADROOM = 1.25
"""Over the expected number of rows, for the advice about ``max_rows``."""
PINNED_BYTES = PAGE
"""Of a GPU buffer on the host: fault record and counts, one page up to a thousand local experts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Of one rank. On CPUs all of it is host memory; on GPUs only ``host_bytes`` is."""

    heap_bytes: int
    """Segment of the heap, reserved. CPUs: address space; pages are used where rows are written."""
    heap_used_bytes: int
    """Of it, used: on CPUs what the operations write at most in both areas; on GPUs all."""
    landing_bytes: int
    """Room for rows from other nodes: one row per token of each GPU with this local rank, for two operations."""
    suggested_max_rows: int
    """``Buffer(max_rows=)``: a quarter more than the expected rows of the layout; GPUs."""
    suggested_heap_bytes: int
    """Segment with that; the reserved segment on CPUs."""
    low_latency_heap_bytes: int
    """Segment of the low-latency calls, reserved; 0: none are planned. GPUs: by the CPU core's formula."""
    low_latency_used_bytes: int
    """Of it, used at most."""
    output_bytes: int
    """A dispatch's rows, top-k indices and weights, and the combine's rows."""
    plan_bytes: int
    """Index lists in the handle of one dispatch."""
    host_bytes: int
    """Host memory of ray_deepep per rank. torch, Python and the CUDA context come on top."""
    host_bytes_per_node: int
    """The same for all ranks of a node."""


def expected_memory(workload: Workload, normal: Traffic) -> Memory:
    """Memory for the traffic of a normal call."""
    rows = normal.pairs if workload.layout == "token_major" else normal.routes
    suggested = max(1, math.ceil(HEADROOM * rows))
    output = _output_bytes(workload, normal, rows)
    plan = _plan_bytes(workload, normal)
    low_latency = _low_latency_bytes(workload)
    low_latency_used = _low_latency_used_bytes(workload)
    if workload.transport == "shm":
        heap = _host_segment_bytes(workload)
        used = min(heap, _host_used_bytes(workload, normal))
        landing, suggested_heap, host = 0, heap, used + low_latency_used + output + plan
    else:
        heap = used = device_segment_bytes(workload, workload.max_rows)
        landing = 2 * (workload.num_nodes - 1) * workload.num_tokens * workload.row_bytes
        suggested_heap, host = device_segment_bytes(workload, suggested), PINNED_BYTES
    return Memory(
        heap_bytes=heap,
        heap_used_bytes=used,
        landing_bytes=landing,
        suggested_max_rows=suggested,
        suggested_heap_bytes=suggested_heap,
        low_latency_heap_bytes=low_latency,
        low_latency_used_bytes=low_latency_used,
        output_bytes=output,
        plan_bytes=plan,
        host_bytes=host,
        host_bytes_per_node=host * workload.gpus_per_node,
    )


def device_segment_bytes(workload: Workload, max_rows: int | None, *, use_core: bool = True) -> int:
    """GPU memory of a rank's segment with room for ``max_rows`` received rows; None: the worst case.

    use_core: ask the CUDA core where it is built; else the documented formula, which differs by the rounding of parts.
    """
    received = workload.num_ranks * workload.num_tokens
    rows = received * workload.num_topk + cuda_arguments.ALIGNMENT_ROOM * workload.num_local_experts
    if max_rows is not None:
        rows = min(rows, max_rows)
        received = min(received, rows)
    element = max(ELEMENT_BYTES[workload.dtype], workload.combine_row_bytes // workload.hidden)
    symm = _symm_bytes(workload, rows) if workload.rows_in_heap else 0
    if use_core and workload.num_ranks <= MAX_CORE_RANKS and cuda.core_version()[0]:
        core = cuda_heap.load_core()
        sizes = core.DeviceSizes()
        sizes.num_ranks, sizes.num_experts, sizes.hidden = workload.num_ranks, workload.num_experts, workload.hidden
        sizes.num_topk, sizes.max_tokens = workload.num_topk, workload.num_tokens
        sizes.max_recv_tokens, sizes.max_rows, sizes.symm_bytes = received, rows, symm
        sizes.max_element_size = element
        return core.segment_bytes(sizes)
    return _segment_formula(workload, received=received, rows=rows, element=element, symm=symm)


def _segment_formula(workload: Workload, *, received: int, rows: int, element: int, symm: int) -> int:
    """As docs/design.md states it."""
    ranks, tokens, topk = workload.num_ranks, workload.num_tokens, workload.num_topk
    staged = max(tokens, received, rows)
    chunks = -(-tokens // CHUNK_TOKENS)
    area = sum(
        map(
            _aligned,
            (
                element * workload.hidden * staged,
                4 * max(rows, received * topk),
                *([4 * chunks * CHUNK_TOKENS * topk] * 3),
                4 * tokens * (workload.hidden // SCALE_BLOCK),
                4 * (chunks + 1) * (ranks + workload.num_experts),
            ),
        )
    )
    signals = SIGNAL_BYTES + _aligned(ranks * -(-staged // READY_ROWS) * READY_FLAG_BYTES)
    return 2 * area + _aligned(symm) + signals


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // SEGMENT_ALIGNMENT) * SEGMENT_ALIGNMENT


def _symm_bytes(workload: Workload, rows: int) -> int:
    """Tokens and expert outputs, where they are made in the heap."""
    return workload.num_tokens * workload.row_bytes + rows * workload.combine_row_bytes


def _host_segment_bytes(workload: Workload) -> int:
    sizes = shm._load().BufferSizes()
    sizes.num_experts, sizes.hidden, sizes.num_topk = workload.num_experts, workload.hidden, workload.num_topk
    sizes.max_tokens = workload.num_tokens
    rows = workload.num_ranks * workload.num_tokens * workload.num_topk
    symm = _symm_bytes(workload, rows) if workload.rows_in_heap else 0
    return PAGE + 2 * sizes.area_bytes(workload.num_ranks) + symm


def _host_used_bytes(workload: Workload, normal: Traffic) -> int:
    routing = workload.num_tokens * workload.num_topk * 8 + (workload.num_ranks + workload.num_experts) * 8
    sent_home = normal.remote_routes if workload.sends_routes else normal.remote_pairs
    staged = 0.0 if workload.rows_in_heap else normal.staged_tokens * workload.row_bytes
    staged_home = 0.0 if workload.rows_in_heap and workload.layout == "token_major" else sent_home
    area = PAGE + max(staged + routing, staged_home * workload.combine_row_bytes)
    rows = normal.pairs if workload.layout == "token_major" else normal.routes
    symm = _symm_bytes(workload, math.ceil(rows)) if workload.rows_in_heap else 0
    return math.ceil(PAGE + 2 * area + symm)


def _low_latency_bytes(workload: Workload) -> int:
    if workload.low_latency_tokens == 0:
        return 0
    sizes = shm._load().LowLatencySizes()
    sizes.num_experts, sizes.hidden, sizes.num_topk = workload.num_experts, workload.hidden, workload.num_topk
    sizes.max_tokens = workload.low_latency_tokens
    return sizes.segment_bytes(workload.num_ranks)


def _low_latency_used_bytes(workload: Workload) -> int:
    """Four areas, the most that a call writes in each."""
    tokens = workload.low_latency_tokens
    rows = workload.num_ranks * tokens * (workload.num_topk if workload.reduce == "exact" else 1)
    return 4 * (rows * workload.combine_row_bytes + tokens * (8 * workload.num_topk + workload.hidden // 32))


def _output_bytes(workload: Workload, normal: Traffic, rows: float) -> int:
    per_row = workload.row_bytes + (12 * workload.num_topk if workload.layout == "token_major" else 4)
    return math.ceil(rows * per_row + workload.num_tokens * workload.combine_row_bytes)


def _plan_bytes(workload: Workload, normal: Traffic) -> int:
    """The lists of ``Plan`` and ``HostPlan``: token and first route of each row; slot, k, expert and weight of each
    route; expert, row, slot and weight of each route that is sent; offsets and counts."""
    sent = workload.num_tokens * workload.num_topk
    fixed = 8 * (workload.num_ranks + 2 * workload.num_local_experts + 3)
    return math.ceil(normal.pairs * 12 + normal.routes * 13 + sent * 16 + fixed)
