"""Symmetric memory of a hop between nodes of GPUs, as torch tensors; ``csrc/nvshmem/hop_layout.h`` says what is where.

Everything is there twice, for operations by turns. M nodes, room for P tokens of each.
"""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from .domains import Domains
from .symm_pool import BLOCK_BYTES
from .transport import BufferGeometry, DomainGeometry

if TYPE_CHECKING:
    from .cuda import CudaTransport
    from .nvshmem import NvshmemRuntime

CHUNK_TOKENS = 64
"""Tokens that the CUDA core plans at once."""


def part_tokens(geometry: BufferGeometry) -> int:
    """P: room for the tokens of one rank, in whole chunks."""
    return max((geometry.max_tokens + CHUNK_TOKENS - 1) // CHUNK_TOKENS, 1) * CHUNK_TOKENS


def hop_sizes(core: ModuleType, geometry: BufferGeometry, domains: Domains) -> Any:
    """The core's sizes of a buffer's hop."""
    return core.HopSizes(
        node_rank=domains.node_rank,
        num_nodes=domains.num_nodes,
        num_node_experts=geometry.num_experts // domains.num_nodes,
        part_tokens=part_tokens(geometry),
        num_topk=geometry.num_topk,
        hidden=geometry.hidden,
        max_element_size=geometry.max_element_size,
    )


def cuda_domain_geometry(geometry: BufferGeometry, num_nodes: int, zone_bytes: int) -> DomainGeometry:
    """Sizes of the buffer inside a node: tokens of all nodes, experts of one, and the hop's zone in its heap."""
    inside = {
        "num_experts": geometry.num_experts // num_nodes,
        "max_tokens": num_nodes * part_tokens(geometry),
        # The heap gives out whole blocks.
        "symm_bytes": geometry.symm_bytes + zone_bytes + BLOCK_BYTES,
        "low_latency_max_tokens": 0,
    }
    return DomainGeometry(**{**dataclasses.asdict(geometry), **inside}, num_parts=num_nodes)


class HopZone:
    """Where rows of one buffer land and are staged, in the heap of the buffer inside the node. Making one is
    collective: no rank may send before all have cleared their zones.

    Attributes:
        hop: the core's object, which launches kernels.
    """

    def __init__(
        self,
        core: ModuleType,
        geometry: BufferGeometry,
        domains: Domains,
        *,
        inside: CudaTransport,
        nvshmem: NvshmemRuntime,
        deadline_s: float,
    ) -> None:
        sizes = hop_sizes(core, geometry, domains)
        self._num_nodes, self._part_tokens, self._hidden = domains.num_nodes, part_tokens(geometry), geometry.hidden
        self._area = core.hop_area_layout(sizes)
        # The first piece that the heap gives out lies at the same place on all ranks, as NVSHMEM needs it.
        self._memory = inside.symm_bytes(core.hop_zone_bytes(sizes))
        self.hop = core.Hop(
            sizes=sizes,
            pes=[nvshmem.rank_to_pe[rank] for rank in domains.hop_ranks],
            zone=self._memory.data_ptr(),
            control=inside.control_address,
            status=inside.status_address,
            deadline_s=deadline_s,
        )
        nvshmem.agree("hop_zone", {"offset": inside.offset_in_segment(self._memory)})

    def landed_idx(self, sequence: int, num_topk: int) -> torch.Tensor:
        """``[M, P, K]`` int64."""
        return self._view(sequence, self._area.landed_idx_at, torch.int64, num_topk)

    def landed_weights(self, sequence: int, num_topk: int) -> torch.Tensor:
        """``[M, P, K]`` float32."""
        return self._view(sequence, self._area.landed_weights_at, torch.float32, num_topk)

    def landed_places(self, sequence: int, num_topk: int) -> torch.Tensor:
        """``[M, P, K]`` int32."""
        return self._view(sequence, self._area.landed_places_at, torch.int32, num_topk)

    def landed_scales(self, sequence: int) -> torch.Tensor:
        """``[M * P, H / 128]`` float32."""
        return self._view(sequence, self._area.landed_scales_at, torch.float32, self._hidden // 128).flatten(0, 1)

    def landed_rows(self, sequence: int, dtype: torch.dtype) -> torch.Tensor:
        """``[M * P, H]``."""
        return self._view(sequence, self._area.landed_rows_at, dtype, self._hidden).flatten(0, 1)

    def staged_weights(self, sequence: int, num_topk: int) -> torch.Tensor:
        """``[M, P, K]`` float32: numbers of landed routes on their way home."""
        return self._view(sequence, self._area.staged_weights_at, torch.float32, num_topk)

    def staged_rows(self, sequence: int, dtype: torch.dtype) -> torch.Tensor:
        """``[M * P, H]``: sums of landed tokens on their way home."""
        return self._view(sequence, self._area.staged_rows_at, dtype, self._hidden).flatten(0, 1)

    def _view(self, sequence: int, at: int, dtype: torch.dtype, columns: int) -> torch.Tensor:
        begin = self.hop.area(sequence) + at - self._memory.data_ptr()
        num_bytes = self._num_nodes * self._part_tokens * columns * dtype.itemsize
        return self._memory[begin : begin + num_bytes].view(dtype).view(self._num_nodes, self._part_tokens, columns)


class HopRoutes:
    """Where rows of single routes wait to be sent home, and where they arrive. A buffer has it once it is needed: it
    takes ``2 * K * (M + 1) * P`` rows. Making one is collective, and so is the next buffer's after ``close()``."""

    def __init__(
        self, geometry: BufferGeometry, domains: Domains, *, nvshmem: NvshmemRuntime, device: torch.device
    ) -> None:
        self._nvshmem, self._hidden = nvshmem, geometry.hidden
        self._num_nodes, self._part_tokens = domains.num_nodes, part_tokens(geometry)
        rows = geometry.num_topk * (domains.num_nodes + 1) * self._part_tokens
        self._area_bytes = rows * geometry.hidden * geometry.max_element_size
        self._block = nvshmem.allocate(2 * self._area_bytes, ranks=[domains.rank])
        self._memory = torch.as_tensor(_Memory(self._block.segments[0], 2 * self._area_bytes), device=device)

    def routes(self, sequence: int, num_topk: int, dtype: torch.dtype) -> torch.Tensor:
        """``[K, M * P, H]``: rows of landed routes."""
        rows = self._rows(sequence, dtype)
        num_landed = self._num_nodes * self._part_tokens
        return rows[: num_topk * num_landed].view(num_topk, num_landed, self._hidden)

    def home(self, sequence: int, num_topk: int, dtype: torch.dtype) -> torch.Tensor:
        """``[P, K, H]``: rows of own routes, anything where there is none."""
        rows = self._rows(sequence, dtype)
        first = num_topk * self._num_nodes * self._part_tokens
        return rows[first : first + num_topk * self._part_tokens].view(self._part_tokens, num_topk, self._hidden)

    def close(self) -> None:
        """Local; the memory is free for others after all ranks closed."""
        self._nvshmem.release(self._block)

    def _rows(self, sequence: int, dtype: torch.dtype) -> torch.Tensor:
        begin = (sequence & 1) * self._area_bytes
        whole = self._area_bytes // (self._hidden * dtype.itemsize) * self._hidden * dtype.itemsize
        return self._memory[begin : begin + whole].view(dtype).view(-1, self._hidden)


class _Memory:
    """Bytes at an address, by which torch makes a tensor of them without a copy."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }
