"""How many rows move, expected under uniform routing. Pure.

Uniform routing: each token names K different experts out of E, every such set equally likely. A rank holds L = E / N
experts and a node M = G * L. A token misses a given set of S experts with probability C(E - S, K) / C(E, K), because
its K experts are then among the other E - S. So, for each token,

    P(S)                = 1 - C(E - S, K) / C(E, K)          it has an expert in a given set of S
    pairs (token, rank) = N * P(L)                           rows that dispatch delivers, token-major
    pairs (token, node) = num_nodes * P(M)                   rows that reach a node
    staged              = P(E - L)                           it has an expert on another rank than its own

and by linearity of expectation the expected number for T tokens is T times that. The routes are K, of which K * L / E
stay on the rank. By symmetry a rank receives as many rows as it sends.
"""

from __future__ import annotations

import dataclasses
import math

from .workload import Workload


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
    """Expected rows of one rank in one dispatch, and in the combine that follows."""

    pairs: float
    """Rows that a rank receives, one per (token, rank), its own included."""
    node_pairs: float
    """Rows that a rank's tokens send to nodes, one per (token, node), its own included."""
    routes: float
    """Routes (token, expert) that a rank receives."""
    remote_pairs: float
    """Of ``pairs``, those of another rank's tokens."""
    staged_tokens: float
    """Tokens with an expert on another rank: staged in the heap unless they lie there."""
    link_pairs: float
    """Of ``pairs``, rows read over NVLink: from GPUs of the node, and from the landing zones of its other GPUs."""
    rdma_rows: float
    """Rows that a rank sends to other nodes, one per (token, node); as many arrive in its landing zone."""
    remote_routes: float
    """Of ``routes``, those of another rank's tokens."""


def hit_probability(num_experts: int, num_topk: int, set_size: int) -> float:
    """P(S): that a token which names ``num_topk`` of ``num_experts`` experts names one of a set of ``set_size``."""
    if set_size > num_experts - num_topk:
        return 1.0
    # A product of ratios: the binomials themselves are larger than a float for thousands of experts.
    miss = math.prod((num_experts - set_size - i) / (num_experts - i) for i in range(num_topk))
    return 1.0 - miss


def expected_traffic(workload: Workload, num_tokens: int) -> Traffic:
    """Expected rows of one rank when each rank has ``num_tokens`` tokens."""
    ranks, nodes, per_node = workload.num_ranks, workload.num_nodes, workload.gpus_per_node
    experts, topk, local = workload.num_experts, workload.num_topk, workload.num_local_experts
    to_rank = hit_probability(experts, topk, local)
    to_node = hit_probability(experts, topk, per_node * local)
    staged = hit_probability(experts, topk, experts - local) if ranks > 1 else 0.0
    # Rows of other nodes land on the GPU of the sender's local rank, which is the reader itself once in G times.
    from_own_node = (per_node - 1) * to_rank
    from_landing = (nodes - 1) * per_node * to_rank * (per_node - 1) / per_node
    return Traffic(
        pairs=num_tokens * ranks * to_rank,
        node_pairs=num_tokens * nodes * to_node,
        routes=float(num_tokens * topk),
        remote_pairs=num_tokens * (ranks - 1) * to_rank,
        staged_tokens=num_tokens * staged,
        link_pairs=num_tokens * (from_own_node + from_landing),
        rdma_rows=num_tokens * (nodes - 1) * to_node,
        remote_routes=num_tokens * topk * (ranks - 1) / ranks,
    )
