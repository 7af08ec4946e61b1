"""A short soak: see soak.py for long ones."""

from __future__ import annotations

import pytest
from harness import Ranks
from soak import Options, soak

from ray_deepep.cuda import cuda_problem

pytestmark = pytest.mark.skipif(bool(cuda_problem()), reason=f"transport cuda: {cuda_problem()}")


@pytest.mark.parametrize("num_ranks", (1, 2, 4))
def test_200_random_iterations(ranks: Ranks, num_ranks: int) -> None:
    for counts in ranks.run(num_ranks, soak, Options(iterations=200, seed=num_ranks), deadline_s=250.0):
        assert counts["eager"] + counts["graph"] + counts["old_plan"] == 200
