"""Numbers that the ranks of a buffer tell each other.

Over the buffer itself rather than by an all-reduce of torch: the same deadline, and a fault that names who did not
come.
"""

from __future__ import annotations

import torch

from ..buffer import Buffer
from ..errors import RayDeepEPError
from ..handle import TokenMajor

MORE_ROOM = -1
"""Told in place of a number by a rank that needs a larger buffer before it can go on."""


class MoreRoomAskedError(RayDeepEPError, RuntimeError):
    """Another rank needs a larger buffer; caught by ``BufferRegistry.with_room``, never seen by users."""


def tell(buffer: Buffer, number: int, device: torch.device) -> list[int]:
    """Every rank's ``number``, at most 2^24, in order; collective. One row goes to each rank.

    Raises:
        MoreRoomAskedError: a rank tells ``MORE_ROOM`` and this one does not.
    """
    num_ranks = buffer.comm.num_ranks
    first_experts = torch.arange(num_ranks, device=device) * buffer.num_local_experts
    # float32 holds integers to 2^24.
    x = torch.full((num_ranks, buffer.geometry.hidden), float(number), device=device)
    told = buffer.dispatch(x, first_experts.unsqueeze(1), layout=TokenMajor()).x[:, 0].tolist()
    if number != MORE_ROOM and MORE_ROOM in told:
        raise MoreRoomAskedError(f"rank {told.index(MORE_ROOM)} asks for more room")
    return [int(each) for each in told]
