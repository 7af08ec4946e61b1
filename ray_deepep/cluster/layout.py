"""Which world ranks form an EP group. Pure functions, shared by workers, driver and controller."""

from __future__ import annotations

from ..errors import InvalidArgumentError, InvalidTypeError
from ..fields import check_int


def ep_groups(world_size: int, ep_size: int | None) -> tuple[tuple[int, ...], ...]:
    """World ranks of every EP group: ``ep_size`` consecutive ranks each, as DeepSpeed lays them out.

    Rank i of one group and rank i of the others hold the same experts (expert-data parallelism).

    Args:
        world_size: ranks of the job.
        ep_size: ranks of one EP group; None: all of them.

    Raises:
        InvalidArgumentError: ``ep_size`` does not divide ``world_size``.
        InvalidTypeError: one of them is no ``int``.
    """
    check_int("world_size", world_size, least=1)
    size = world_size if ep_size is None else ep_size
    if type(size) is not int:
        raise InvalidTypeError("ep_size", ep_size, "must be an int, or None")
    if size < 1 or world_size % size:
        raise InvalidArgumentError("ep_size", ep_size, f"must divide the world size {world_size}")
    return tuple(tuple(range(start, start + size)) for start in range(0, world_size, size))


def group_of(world_rank: int, groups: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
    """The EP group that ``world_rank`` is in."""
    size = len(groups[0])
    return groups[world_rank // size]
