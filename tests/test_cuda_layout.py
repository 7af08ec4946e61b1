"""What the CUDA core refuses before it needs a GPU."""

from __future__ import annotations

import pytest
from harness import error_of

from ray_deepep import cuda, shm

pytestmark = pytest.mark.skipif(not cuda.core_version()[0], reason=f"no CUDA core: {cuda.core_version()[1]}")


def segment_bytes(num_ranks: int) -> int:
    core = cuda.load_core()
    sizes = core.DeviceSizes()
    sizes.num_ranks = sizes.num_experts = num_ranks
    return core.segment_bytes(sizes)


def test_more_ranks_than_signals_have_room_for() -> None:
    assert segment_bytes(64) > 0
    error = error_of(shm._load().CoreArgumentError, lambda: segment_bytes(65))
    assert error.args == ("num_ranks", "65", "must be at most 64 on GPUs of one domain")
