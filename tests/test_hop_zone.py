"""Sizes of a hop between nodes of GPUs: plain arithmetic, without a GPU."""

from __future__ import annotations

import itertools

import pytest
from harness import error_of

from ray_deepep import nvshmem, shm
from ray_deepep.domains import Domains
from ray_deepep.hop_zone import cuda_domain_geometry, hop_sizes, part_tokens
from ray_deepep.symm_pool import SymmPool
from ray_deepep.transport import BufferGeometry


def geometry(**sizes: int) -> BufferGeometry:
    return BufferGeometry(**{"num_experts": 16, "hidden": 256, "num_topk": 4, "max_tokens": 100, **sizes})


@pytest.mark.parametrize(("max_tokens", "room"), ((0, 64), (1, 64), (64, 64), (65, 128), (4096, 4096)))
def test_parts_are_whole_chunks(max_tokens: int, room: int) -> None:
    assert part_tokens(geometry(max_tokens=max_tokens)) == room


def test_the_buffer_inside_a_node() -> None:
    inside = cuda_domain_geometry(geometry(symm_bytes=1024, max_capacity=7), 2, zone_bytes=10_240)
    assert (inside.num_experts, inside.max_tokens, inside.num_parts) == (8, 256, 2)
    assert (inside.symm_bytes, inside.max_capacity, inside.hidden) == (11_264 + 512, 7, 256)


@pytest.fixture
def core():
    try:
        return nvshmem.load()
    except (ImportError, OSError) as error:
        pytest.skip(f"no NVSHMEM core: {error}")


def test_the_zone_fits_the_heap(core) -> None:
    """Also where the user has none of it, and whatever the zone's bytes."""
    for max_tokens in (1, 64, 65, 200):
        wanted = geometry(max_tokens=max_tokens, num_topk=1)
        num_bytes = core.hop_zone_bytes(hop_sizes(core, wanted, Domains(rank=0, num_ranks=2, domain_size=1)))
        SymmPool(512, cuda_domain_geometry(wanted, 2, num_bytes).symm_bytes).take(num_bytes)


def test_arguments_are_taken(core) -> None:
    words = {"x": 1, "x_scales": 0, "topk_idx": 2, "topk_weights": 0, "locations": 0, "capacity": 0, "cached": True}
    core.HopDispatchArgs(**words, dtype=shm._load().DType.BFLOAT16)
    core.HopCall(operation="combine", sequence=3, signature=2**32 - 1, num_tokens=5, num_topk=2, num_sms=8)


@pytest.mark.parametrize("num_nodes", (2, 3, 64))
@pytest.mark.parametrize("element_size", (1, 2, 4))
def test_the_zone_has_room_for_all_that_lands(core, num_nodes: int, element_size: int) -> None:
    wanted = geometry(max_element_size=element_size, num_experts=64 * 3)
    sizes = hop_sizes(core, wanted, Domains(rank=0, num_ranks=num_nodes, domain_size=1))
    area, tokens = core.hop_area_layout(sizes), num_nodes * 128
    lengths = {
        "landed_idx_at": tokens * 4 * 8,
        "landed_weights_at": tokens * 4 * 4,
        "landed_places_at": tokens * 4 * 4,
        "landed_scales_at": tokens * 2 * 4,
        "landed_rows_at": tokens * 256 * element_size,
        "staged_weights_at": tokens * 4 * 4,
        "staged_rows_at": tokens * 256 * element_size,
    }
    pieces = sorted((getattr(area, name), length) for name, length in lengths.items())
    for (begin, length), (after, _) in itertools.pairwise(pieces):
        assert begin % 16 == 0 and begin + length <= after
    assert core.hop_zone_bytes(sizes) >= 2 * sum(pieces[-1])


@pytest.mark.parametrize(
    ("sizes", "message"),
    (
        ({"num_nodes": 65}, "num_nodes"),
        ({"num_nodes": 0}, "num_nodes"),
        ({"part_tokens": 100}, "part_tokens"),
    ),
)
def test_sizes_that_do_not_fit(core, sizes: dict[str, int], message: str) -> None:
    good = {"node_rank": 0, "num_nodes": 2, "num_node_experts": 8, "part_tokens": 64}
    bad = core.HopSizes(**{**good, **sizes}, num_topk=4, hidden=128, max_element_size=4)
    assert error_of(core.CoreArgumentError, lambda: core.hop_zone_bytes(bad)).args[0] == message
