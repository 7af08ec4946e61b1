"""Sharing groups of ranks out over units with room: domains of a cluster, or nodes of a domain. Plain arithmetic."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class Share:
    """What one unit takes. Shares stand in the order of their ranks."""

    unit: int
    """Index of the unit."""
    amount: int
    """Ranks that it takes, a multiple of ``part``."""
    part: int
    """Ranks that stay together in one unit: a whole group, or an equal part of one."""


def split_whole(num_groups: int, size: int, rooms: Sequence[int]) -> list[Share] | None:
    """Groups of ``size`` ranks, each in one unit, in the order of the units; None if there is no room.

    Few units are used: the largest first, and for the rest the unit with the least room that takes all of it.
    """
    return _split(num_groups, size, 1, rooms)


def share_out(num_groups: int, size: int, rooms: Sequence[int], *, first: bool = False) -> list[Share] | None:
    """As :func:`split_whole` where that works; else groups are cut into equal parts, each in one unit.

    Of all ways to cut, the one whose worst group touches the fewest units counts, then the one with the fewest touches
    in all, then the one with the fewest parts.

    Args:
        num_groups: groups to place.
        size: ranks of a group.
        rooms: ranks that each unit has room for.
        first: take the first cut that fits instead of the best.

    Returns:
        None if there is no room at all.
    """
    best, best_score = None, None
    for num_parts in range(1, size + 1):
        if size % num_parts:
            continue
        shares = _split(num_groups, size, num_parts, rooms)
        if shares is None:
            continue
        if num_parts == 1 or first:
            return shares
        score = _score(shares, size)
        if best_score is None or score < best_score:
            best, best_score = shares, score
    return best


def _split(num_groups: int, size: int, num_parts: int, rooms: Sequence[int]) -> list[Share] | None:
    part = size // num_parts
    counts = _pack(num_groups * num_parts, [room // part for room in rooms], rooms)
    if counts is None:
        return None
    # Whole groups first, in the order of the units. What remains is joined to groups: large remainders first.
    units = sorted(counts, key=lambda unit: (counts[unit] % num_parts != 0, -(counts[unit] % num_parts), unit))
    return [Share(unit=unit, amount=counts[unit] * part, part=part) for unit in units]


def _pack(num_pieces: int, fitting: Sequence[int], rooms: Sequence[int]) -> dict[int, int] | None:
    """Pieces per unit, of the units that get some; ``fitting`` says how many each could take."""
    if sum(fitting) < num_pieces:
        return None
    counts: dict[int, int] = {}
    by_size = sorted(range(len(rooms)), key=lambda unit: (-fitting[unit], rooms[unit], unit))
    for position, unit in enumerate(by_size):
        if fitting[unit] >= num_pieces:
            enough = [other for other in by_size[position:] if fitting[other] >= num_pieces]
            counts[min(enough, key=lambda other: (rooms[other], other))] = num_pieces
            break
        counts[unit] = fitting[unit]
        num_pieces -= fitting[unit]
    return counts


def _score(shares: Sequence[Share], size: int) -> tuple[int, int]:
    """Units that the worst group touches, and touches of all groups."""
    touches: dict[int, int] = {}
    begin = 0
    for share in shares:
        for group in range(begin // size, (begin + share.amount - 1) // size + 1):
            touches[group] = touches.get(group, 0) + 1
        begin += share.amount
    return max(touches.values()), sum(touches.values())
