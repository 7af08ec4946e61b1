"""What the CUDA core is given: torch tensors as addresses, the sizes of a buffer, and room for plans.

Only files that call that core use it.
"""

from __future__ import annotations

import dataclasses
from types import ModuleType

import torch

from . import env
from .errors import InvalidArgumentError
from .float8 import FLOAT8
from .handle import ExpertMajor, Padded
from .shm import ShmDomain, address
from .transport import BufferGeometry, DispatchRequest

ALIGNMENT_ROOM = 256
"""Largest alignment of expert-major groups that buffers have room for."""
ROW_ALIGNMENT = 16
"""Bytes of which rows and their addresses are multiples."""


@dataclasses.dataclass(kw_only=True)
class CudaPlan:
    """A plan in GPU memory, with the tensor that holds its arrays; ``memory`` begins with the counts. Not frozen, as
    requests are not; nobody writes to it."""

    core: object
    memory: torch.Tensor
    stream: int
    """Where the memory was allocated."""
    num_rows: int
    """Rows that there is room for."""


def core_dtypes(core: ModuleType) -> dict[torch.dtype, object]:
    """The words for row dtypes, which the CPU core has for all cores."""
    types = core.DType
    return {
        torch.float32: types.FLOAT32,
        torch.bfloat16: types.BFLOAT16,
        torch.float16: types.FLOAT16,
        FLOAT8: types.FLOAT8_E4M3,
    }


class CudaArguments:
    """Arguments of one buffer's operations.

    Attributes: ``sizes`` of the buffer, and the core's words for ``dtypes`` and ``reduces``.
    """

    def __init__(self, domain: ShmDomain, geometry: BufferGeometry, core: ModuleType, device: torch.device) -> None:
        self._core, self._geometry, self._device = core, geometry, device
        self.dtypes = core_dtypes(domain.core)
        self.reduces = domain.core.Reduce
        self._kinds = domain.core.LayoutKind
        self.sizes = self._make_sizes(domain.rank, len(domain.peers))

    def _make_sizes(self, rank: int, num_ranks: int):
        """Room for the worst case: every rank sends all its tokens here.

        With ``max_capacity`` the buffer serves padded dispatches, and a rank receives no more than its slots hold.
        """
        geometry = self._geometry
        received = num_ranks * geometry.max_tokens
        # A token may name one expert twice: no smaller bound than K routes.
        rows = received * geometry.num_topk
        if received:
            rows += ALIGNMENT_ROOM * (geometry.num_experts // num_ranks)
        if geometry.max_capacity:
            rows = geometry.num_parts * geometry.num_experts * geometry.max_capacity
            received = min(received, rows)
        if geometry.max_rows is not None:
            rows = min(rows, geometry.max_rows)
            received = min(received, rows)
        sizes = self._core.DeviceSizes()
        sizes.rank, sizes.num_ranks, sizes.num_experts = rank, num_ranks, geometry.num_experts
        sizes.hidden, sizes.num_topk, sizes.max_tokens = geometry.hidden, geometry.num_topk, geometry.max_tokens
        sizes.max_recv_tokens, sizes.max_rows, sizes.symm_bytes = received, rows, geometry.symm_bytes
        sizes.num_parts = geometry.num_parts
        sizes.max_element_size, sizes.bulk_copy = geometry.max_element_size, env.bulk_copy()
        return sizes

    def new_plan(self, buffer, request: DispatchRequest, num_tokens: int, num_topk: int, stream: int) -> CudaPlan:
        """Room for a plan of ``buffer``. One allocation for all arrays: each would cost the host some microseconds per
        dispatch."""
        layout, room = request.layout, request.max_recv_tokens
        kind, alignment, capacity = self._kinds.TOKEN_MAJOR, 1, 0
        received = num_rows = self.sizes.max_recv_tokens
        if isinstance(layout, ExpertMajor):
            kind, alignment, num_rows = self._kinds.EXPERT_MAJOR, layout.alignment, self.sizes.max_rows
        elif isinstance(layout, Padded):
            kind, capacity = self._kinds.PADDED, layout.capacity
            num_rows = self._geometry.num_parts * self._geometry.num_experts * capacity
        if room is not None:
            received, num_rows = min(received, room), room
        num_ints = buffer.plan_ints(num_tokens, num_topk, received, num_rows)
        memory = torch.empty(num_ints, dtype=torch.int32, device=self._device)
        core = buffer.make_plan(
            memory.data_ptr(),
            num_tokens,
            num_topk,
            received,
            num_rows,
            kind,
            alignment,
            capacity,
            room is not None,
        )
        return CudaPlan(core=core, memory=memory, stream=stream, num_rows=num_rows)

    def dispatch(
        self,
        request: DispatchRequest,
        topk_idx: torch.Tensor | None,
        recv_topk_idx: torch.Tensor | None,
        recv_weights: torch.Tensor | None,
    ):
        """What both halves of a dispatch need; pulling adds the outputs for rows."""
        x, cast = request.x, request.cast
        return self._core.DispatchArgs(
            x=x.data_ptr(),
            x_scales=address(request.x_scales),
            topk_idx=address(topk_idx),
            topk_weights=address(request.topk_weights),
            locations=address(request.locations),
            dtype=self.dtypes[x.dtype if cast is None else FLOAT8],
            x_dtype=self.dtypes[x.dtype],
            power_of_two=cast is not None and cast.scale_format == "power_of_two",
            scale_by_weights=request.scale_by_weights,
            out_topk_idx=address(recv_topk_idx),
            out_topk_weights=address(recv_weights),
        )


def check_rows(name: str, rows: torch.Tensor) -> None:
    """Kernels move rows in pieces of 16 bytes; an address in between would end the process's CUDA context.

    Raises:
        InvalidArgumentError: rows have another size, or the first one begins elsewhere.
    """
    row_bytes = rows.shape[-1] * rows.element_size()
    if row_bytes % ROW_ALIGNMENT:
        rule = f"rows must be a multiple of {ROW_ALIGNMENT} bytes, not {row_bytes}"
        raise InvalidArgumentError(name, tuple(rows.shape), rule)
    check_address(name, rows)


def check_address(name: str, tensor: torch.Tensor) -> None:
    """A view into another tensor may begin anywhere.

    Raises:
        InvalidArgumentError: ``tensor`` begins between multiples of 16 bytes.
    """
    begin = tensor.data_ptr()
    if begin % ROW_ALIGNMENT:
        rule = f"must begin at a multiple of {ROW_ALIGNMENT} bytes in memory (call .clone())"
        raise InvalidArgumentError(name, f"address {begin:#x}", rule)
