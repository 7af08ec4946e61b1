"""Expected traffic of ``ray-deepep plan``, against routing that is drawn and counted."""

from __future__ import annotations

import pytest
import torch

from ray_deepep.planning import Workload, expected_traffic, hit_probability, uniform_routing

TOKENS = 20_000


def layer(**changes: object) -> Workload:
    sizes = {
        "num_nodes": 2,
        "gpus_per_node": 4,
        "hidden": 256,
        "num_experts": 64,
        "num_topk": 6,
        "num_tokens": TOKENS,
        "low_latency_tokens": 0,
    }
    return Workload(**sizes | changes)


def reached(owners: torch.Tensor, num_owners: int) -> torch.Tensor:
    """``[T, num_owners]``: whether a token has an expert at each owner."""
    hit = torch.zeros(len(owners), num_owners, dtype=torch.bool)
    return hit.scatter_(1, owners.long(), True)


@pytest.mark.parametrize("num_topk", (1, 2, 6, 32), ids=lambda k: f"top-{k}")
@pytest.mark.parametrize(
    ("nodes", "per_node", "experts"), ((1, 2, 64), (1, 8, 256), (4, 2, 64), (8, 8, 64)), ids=lambda n: str(n)
)
def test_rows_are_those_of_a_simulation(nodes: int, per_node: int, experts: int, num_topk: int) -> None:
    workload = layer(num_nodes=nodes, gpus_per_node=per_node, num_experts=experts, num_topk=num_topk)
    expected = expected_traffic(workload, TOKENS)
    topk_idx = uniform_routing(TOKENS, num_topk, experts, seed=nodes + per_node)
    rank = topk_idx // workload.num_local_experts
    to_rank, to_node = reached(rank, nodes * per_node), reached(rank // per_node, nodes)
    # The tokens are those of rank 0 of node 0: what it sends is, by symmetry, what each rank receives.
    counted = {
        "pairs": to_rank.sum(),
        "node_pairs": to_node.sum(),
        "remote_pairs": to_rank[:, 1:].sum(),
        "staged_tokens": to_rank[:, 1:].any(1).sum(),
        "rdma_rows": to_node[:, 1:].sum(),
        "remote_routes": (rank != 0).sum(),
    }
    # Rows for other nodes land at that node's rank with local rank 0, which reads its own without a link.
    other_nodes = to_rank.view(TOKENS, nodes, per_node)[:, 1:]
    counted["link_pairs"] = to_rank[:, 1:per_node].sum() + other_nodes[:, :, 1:].sum()
    for name, count in counted.items():
        # A count of T independent tokens: five standard deviations, of at most N rows a token.
        allowed = 5 * TOKENS**0.5 * min(num_topk, nodes * per_node) / 2 + 1
        assert abs(getattr(expected, name) - int(count)) <= allowed, name
    assert expected.routes == TOKENS * num_topk


def test_probabilities_at_the_edges() -> None:
    assert hit_probability(64, 4, 0) == 0.0
    assert hit_probability(64, 4, 64) == hit_probability(64, 4, 61) == 1.0
    assert hit_probability(64, 1, 16) == pytest.approx(0.25)
    assert hit_probability(4096, 32, 2) == pytest.approx(1 - (4064 * 4063) / (4096 * 4095))


def test_one_rank_sends_nothing() -> None:
    rows = expected_traffic(layer(num_nodes=1, gpus_per_node=1), 100)
    assert (rows.pairs, rows.remote_pairs, rows.staged_tokens, rows.link_pairs, rows.rdma_rows) == (100, 0, 0, 0, 0)


def test_drawn_routing_has_different_experts_and_all_of_them() -> None:
    for num_topk, experts in ((2, 8), (8, 64), (8, 2048)):
        topk_idx = uniform_routing(4096, num_topk, experts, seed=1)
        ordered = topk_idx.sort(1).values
        assert topk_idx.dtype is torch.int32 and (ordered[:, 1:] > ordered[:, :-1]).all()
        counts = torch.bincount(topk_idx.flatten(), minlength=experts).double()
        mean = 4096 * num_topk / experts
        assert len(counts) == experts and float((counts - mean).abs().max()) < 6 * mean**0.5 + 6
