"""What is planned for: the sizes of one MoE layer on a cluster. Checked when it is made."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from ..errors import InvalidArgumentError, InvalidTypeError
from ..low_latency import MAX_LOW_LATENCY_TOKENS

ELEMENT_BYTES: Mapping[str, int] = MappingProxyType({"float32": 4, "bfloat16": 2, "float16": 2, "float8": 1})
LAYOUTS = ("token_major", "expert_major")
REDUCES = ("fast", "exact")
TRANSPORTS = ("cuda", "shm")
MAX_TOPK = 32
SCALE_BLOCK = 128
_LEAST: Mapping[str, int] = MappingProxyType(
    {
        "num_nodes": 1,
        "gpus_per_node": 1,
        "hidden": 1,
        "num_experts": 1,
        "num_topk": 1,
        "num_tokens": 0,
        "low_latency_tokens": 0,
    }
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """One MoE layer: N = ``num_nodes * gpus_per_node`` ranks in one EP group, all with equally many tokens.

    Raises:
        InvalidArgumentError, InvalidTypeError: naming the argument, its value and the rule.
    """

    num_nodes: int
    """Nodes; NVLink (or shared memory) within a node, RDMA between nodes."""
    gpus_per_node: int
    """Ranks of a node, one per GPU; on CPUs one per process."""
    hidden: int
    """H, elements of a row."""
    num_experts: int
    """E, a multiple of N."""
    num_topk: int
    """K, different experts of a token."""
    num_tokens: int
    """T, tokens of each rank in a normal call."""
    low_latency_tokens: int = 128
    """Tokens of each rank in a low-latency call; 0: none are planned."""
    dtype: str = "bfloat16"
    """Of dispatched rows; float8 rows have a float32 scale per 128 elements, and come back as bfloat16."""
    layout: str = "token_major"
    """How dispatched rows land: one per (token, rank), or one per route, grouped by expert."""
    reduce: str = "fast"
    """``exact``: every route's row crosses to be added at the source; expert_major rows within a node only."""
    transport: str = "cuda"
    """``cuda``, or ``shm``: the CPU core on one host."""
    rows_in_heap: bool = False
    """Whether tokens and expert outputs are made in the heap (``symm_empty``), so that nothing is staged."""
    cached_plan: bool = False
    """Whether the dispatch follows a plan that is known, as a backward pass does."""
    max_rows: int | None = None
    """``Buffer(max_rows=)``: room for received rows; None: the worst case."""

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if type(value) is not int:
                raise InvalidTypeError(name, value, "must be an int")
            if not least <= value < 2**31:
                raise InvalidArgumentError(name, value, f"must be in [{least}, 2**31)")
        for name, allowed in (
            ("dtype", ELEMENT_BYTES),
            ("layout", LAYOUTS),
            ("reduce", REDUCES),
            ("transport", TRANSPORTS),
        ):
            if getattr(self, name) not in allowed:
                raise InvalidArgumentError(name, getattr(self, name), f"must be one of {', '.join(allowed)}")
        self._check_together()

    def _check_together(self) -> None:
        if self.num_experts % self.num_ranks:
            raise InvalidArgumentError("num_experts", self.num_experts, f"must be a multiple of {self.num_ranks} ranks")
        if self.num_topk > min(MAX_TOPK, self.num_experts):
            rule = f"must be at most {min(MAX_TOPK, self.num_experts)}, the experts that a token can name"
            raise InvalidArgumentError("num_topk", self.num_topk, rule)
        if self.low_latency_tokens > MAX_LOW_LATENCY_TOKENS:
            rule = f"must be at most {MAX_LOW_LATENCY_TOKENS}"
            raise InvalidArgumentError("low_latency_tokens", self.low_latency_tokens, rule)
        if self.dtype == "float8" and self.hidden % SCALE_BLOCK:
            raise InvalidArgumentError("hidden", self.hidden, f"must be a multiple of {SCALE_BLOCK} with float8 rows")
        if self.transport == "shm" and self.num_nodes > 1:
            raise InvalidArgumentError("num_nodes", self.num_nodes, "must be 1: transport shm serves one host")
        if self.reduce == "exact" and self.num_nodes > 1:
            raise InvalidArgumentError("reduce", self.reduce, "must be fast where rows cross between nodes")
        if self.max_rows is not None and (type(self.max_rows) is not int or self.max_rows < 1):
            raise InvalidArgumentError("max_rows", self.max_rows, "must be an int >= 1")

    @property
    def num_ranks(self) -> int:
        """N."""
        return self.num_nodes * self.gpus_per_node

    @property
    def num_local_experts(self) -> int:
        """L."""
        return self.num_experts // self.num_ranks

    @property
    def row_bytes(self) -> int:
        """Bytes of a dispatched row, its scales included."""
        scales = 4 * self.hidden // SCALE_BLOCK if self.dtype == "float8" else 0
        return self.hidden * ELEMENT_BYTES[self.dtype] + scales

    @property
    def combine_row_bytes(self) -> int:
        """Bytes of an expert's output row."""
        return self.hidden * (2 if self.dtype == "float8" else ELEMENT_BYTES[self.dtype])

    @property
    def sends_routes(self) -> bool:
        """Whether combine moves a row per route rather than one per (token, rank)."""
        return self.layout == "expert_major" and self.reduce == "exact"
