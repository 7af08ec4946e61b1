"""What is missing where a run does not fit into a cluster, as data and in words."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ..errors import RayDeepEPError


@dataclasses.dataclass(frozen=True, kw_only=True)
class DomainRoom:
    """What a domain has free."""

    domain: str
    num_nodes: int
    is_node: bool
    """Whether the domain is one node without a label."""
    free: float
    """Free amount of the shortage's resource."""
    num_fitting: int
    """Workers that fit, whatever resource limits them."""
    limited_by: str
    """The resource that limits them, where it is another one than the shortage's; else empty."""

    def __str__(self) -> str:
        return self.text(" has", " free")

    def text(self, has: str, free: str) -> str:
        """In words; ``has`` and ``free`` may be empty further down a list."""
        name = f"{'node' if self.is_node else 'domain'} {self.domain}"
        limit = f" but {self.limited_by} for {several(self.num_fitting, 'worker')}" if self.limited_by else ""
        return f"{name}{has} {self.free:g}{free}{limit}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlacementShortage:
    """The request does not fit what is free; ``str()`` says what is missing."""

    resource: str
    group_amount: float
    """Amount of ``resource`` that one EP group needs."""
    num_groups: int
    in_one_domain: bool
    """Whether each group was to lie in one domain."""
    rooms: tuple[DomainRoom, ...]
    """All domains, those with most room first."""
    fits_when_idle: bool
    """Whether it would fit if nobody else used these nodes: then waiting may help without a new node."""

    def __str__(self) -> str:
        amount = f"{self.group_amount:g} {plural(self.resource, self.group_amount)}"
        wanted = f"{amount} in one domain wanted" if self.in_one_domain else f"{amount} wanted"
        if self.num_groups > 1:
            wanted = f"{self.num_groups} groups of {amount} wanted{', each in one domain' * self.in_one_domain}"
        rooms = [room for room in self.rooms if room.free or room.num_fitting]
        empty = len(self.rooms) - len(rooms)
        texts = [room.text("", "") if number else str(room) for number, room in enumerate(rooms[:6])]
        if len(rooms) > 6:
            texts.append(f"{several(len(rooms) - 6, 'other')} {max(room.free for room in rooms[6:]):g} or less")
        if empty:
            texts.append(f"{several(empty, 'other')} none" if texts else f"{several(empty, 'domain')} with none")
        have = ", ".join(texts) or "the cluster has no node"
        busy = "; it would fit if they were idle" if self.fits_when_idle else ""
        return f"{wanted}; {have}{busy}"


class PlacementError(RayDeepEPError, RuntimeError):
    """There was no room for all ranks within the time to wait.

    Attributes: ``shortage``, ``waited_s``.
    """

    def __init__(self, shortage: PlacementShortage, waited_s: float) -> None:
        self.shortage, self.waited_s = shortage, waited_s
        super().__init__(f"placement: {shortage} (waited {waited_s:.0f} s)")

    def __reduce__(self):
        return type(self), (self.shortage, self.waited_s)


def several(count: int, noun: str) -> str:
    return f"{count} {plural(noun, count)}"


def plural(noun: str, count: float) -> str:
    return noun if count == 1 else f"{noun}s"


def shortened(texts: Sequence[str], limit: int, separator: str = ", ") -> str:
    more = [f"{len(texts) - limit} more"] if len(texts) > limit else []
    return separator.join([*texts[:limit], *more])
