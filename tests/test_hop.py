"""Several nodes: rows hop once per (token, node). Logical nodes on one machine, against the oracle of one domain."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES, FLOAT8, LAYOUTS, PADDED, Case, all_modes, check_case, dtype_id, layout_id
from harness import Ranks, shm_problem

from ray_deepep import ExpertMajor, TokenMajor

pytestmark = pytest.mark.skipif(bool(shm_problem()), reason=shm_problem())

SEED = 404
WORLDS = ((4, 2), (4, 1), (6, 2), (6, 3))
"""Ranks, and ranks of a node."""


def world_id(world: tuple[int, int]) -> str:
    num_ranks, size = world
    return f"{num_ranks // size}x{size}"


@pytest.mark.parametrize("world", WORLDS, ids=world_id)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_id)
def test_layouts_and_dtypes(ranks: Ranks, layout: object, dtype: torch.dtype, world: tuple[int, int]) -> None:
    num_ranks, size = world
    case = Case(
        seed=SEED,
        num_tokens=(9, 4, 0, 7, 1, 5)[:num_ranks],
        num_experts=num_ranks * 2,
        hidden=256 if dtype == FLOAT8 else 24,
        layout=layout,
        dtype=dtype,
        routing="sparse",
    )
    ranks.run(num_ranks, check_case, f"shm/{size}", case)
