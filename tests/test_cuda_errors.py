"""What errors of the CUDA core say, as far as it shows without a GPU."""

from __future__ import annotations

import pytest
import torch
from harness import error_of

from ray_deepep import CudaError, RayDeepEPError, cuda, shm

pytestmark = pytest.mark.skipif(not cuda.core_version()[0], reason=f"no CUDA core: {cuda.core_version()[1]}")

HANDLE = "handle (dispatch number)"
# operation, dtype, num_topk, layout, alignment, capacity or max_recv_tokens, cached, scale_by_weights
DISPATCH = [1, 1, 2, 1, 8, 0, 0, 0]
PADDED = [1, 1, 2, 2, 1, 6, 0, 0]
# operation, dtype, num_topk, layout, reduce, weighted, topk_weights
COMBINE = [2, 1, 2, 1, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("usual", "place", "value", "difference"),
    (
        (DISPATCH, 0, 2, ("operation", "dispatch", "combine")),
        (COMBINE, 0, 3, ("operation", "combine", "combine_weights")),
        (DISPATCH, 1, 3, ("dtype", "bfloat16", "float8_e4m3fn")),
        (DISPATCH, 2, 4, ("num_topk", "2", "4")),
        (DISPATCH, 3, 0, ("layout", "ExpertMajor", "TokenMajor")),
        (DISPATCH, 4, 4, ("layout.alignment", "8", "4")),
        (DISPATCH, 5, 64, ("max_recv_tokens", "None", "64")),
        (PADDED, 5, 5, ("layout.capacity", "6", "5")),
        (DISPATCH, 6, 1, (HANDLE, "0", "that of an earlier one")),
        (DISPATCH, 7, 1, ("scale_by_weights", "False", "True")),
        (COMBINE, 3, 2, ("layout", "ExpertMajor", "Padded")),
        (COMBINE, 4, 2, ("reduce", "exact", "expert_order")),
        (COMBINE, 5, 1, ("weighted", "False", "True")),
        (COMBINE, 6, 1, ("topk_weights", "False", "True")),
    ),
)
def test_differences_are_named_as_on_cpus(usual: list[int], place: int, value: int, difference: tuple) -> None:
    """The names and values of ``test_mismatch.py``."""
    odd = [*usual[:place], value, *usual[place + 1 :]]
    assert cuda.load_core().find_difference(usual, odd) == difference
    assert cuda.load_core().find_difference(usual, usual) is None


def test_the_places_of_signatures_are_those_of_the_core() -> None:
    types = shm._load()
    assert (int(types.DType.BFLOAT16), int(types.LayoutKind.EXPERT_MAJOR), int(types.Reduce.expert_order)) == (1, 1, 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so nothing fails")
def test_cuda_errors_are_ours() -> None:
    error = error_of(CudaError, lambda: cuda.load_core().vmm_supported(0))
    assert isinstance(error, RayDeepEPError) and isinstance(error, RuntimeError)
    assert str(error).startswith("CUDA start-up: cudaError")
