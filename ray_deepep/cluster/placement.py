"""Which node takes which rank: a pure decision over what a cluster offers.

The rules, in this order:

1. An EP group lies in one *domain*, where one has room: nodes with the same ``ray.io/gpu-domain`` label, or one node.
2. As few domains as possible, and of those that do, the one with the least room: big ones stay free for big groups.
3. Within a domain, an EP group lies on one node where one has room.
4. An EP group that no domain has room for is spread over as few as possible, in equal parts if that takes no more.
5. Ranks of a node are consecutive, because Ray Train numbers its workers node by node.

The same offer gives the same answer, in whatever order its nodes come.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Mapping, Sequence

from .. import env
from ..errors import InvalidArgumentError
from ..fields import check_bool, check_duration, check_number, check_str, known_fields
from .layout import ep_groups
from .packing import share_out, split_whole
from .shortage import DomainRoom, PlacementShortage, several, shortened

DOMAIN_LABEL = "ray.io/gpu-domain"
_ROUNDING = 1e-6
"""Ray counts resources in ten-thousandths."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NodeOffer:
    """A node of the cluster and what it has."""

    node_id: str
    host: str
    labels: Mapping[str, str]
    free: Mapping[str, float]
    """What nobody uses now, by resource."""
    total: Mapping[str, float]
    """What the node has, by resource."""

    def num_fitting(self, resources: Mapping[str, float], *, idle: bool = False) -> int:
        """Workers that need ``resources`` each and fit here now, or if the node were idle."""
        have = self.total if idle else self.free
        return min(int(have.get(name, 0.0) / need + _ROUNDING) for name, need in resources.items())


@known_fields
@dataclasses.dataclass(frozen=True, kw_only=True)
class PlacementRequest:
    """What is to be placed.

    Raises:
        InvalidArgumentError, InvalidTypeError: a field breaks its rule.
    """

    num_workers: int
    ep_size: int | None = None
    """Ranks of one EP group, a divisor of ``num_workers``; None: all of them."""
    resources_per_worker: Mapping[str, float]
    """By resource, at least one above 0; entries of 0 count for nothing."""
    domain_label: str = DOMAIN_LABEL
    allow_spread: bool = True
    """Whether an EP group that no domain has room for may be spread over several."""

    def __post_init__(self) -> None:
        ep_groups(self.num_workers, self.ep_size)
        check_str("domain_label", self.domain_label)
        check_bool("allow_spread", self.allow_spread)
        for name, amount in self.resources_per_worker.items():
            check_number(f"resources_per_worker[{name!r}]", amount)
        if any(amount < 0 for amount in self.resources_per_worker.values()) or not self.needs:
            rule = "must have an amount above 0, and none below"
            raise InvalidArgumentError("resources_per_worker", dict(self.resources_per_worker), rule)

    @property
    def needs(self) -> dict[str, float]:
        """``resources_per_worker`` without entries of 0."""
        return {name: amount for name, amount in self.resources_per_worker.items() if amount > 0}

    @property
    def group_size(self) -> int:
        """Ranks of one EP group."""
        return self.num_workers if self.ep_size is None else self.ep_size

    @property
    def main_resource(self) -> str:
        """The resource that a shortage is told in: the GPU, else what is special, else the CPU."""
        ordinary = ("CPU", "memory", "object_store_memory")
        special = [name for name in self.needs if name not in ordinary and not name.startswith("accelerator_type:")]
        return next((name for name in ("GPU", *special, *ordinary) if name in self.needs), next(iter(self.needs)))


@known_fields
@dataclasses.dataclass(frozen=True, kw_only=True)
class PlacementConfig:
    """How ranks are placed on a Ray cluster.

    Raises:
        InvalidArgumentError, InvalidTypeError: a field breaks its rule.
    """

    domain_label: str = DOMAIN_LABEL
    """Label that nodes of one NVLink domain share."""
    allow_spread: bool = True
    """Whether an EP group that no domain has room for may be spread over several."""
    settle_s: float = 10.0
    """Seconds to wait, before a group is spread, for a domain that would have room if others left it."""
    wait_s: float = dataclasses.field(default_factory=env.placement_wait_s)
    """Seconds to wait for room."""

    def __post_init__(self) -> None:
        check_str("domain_label", self.domain_label)
        if not self.domain_label:
            raise InvalidArgumentError("domain_label", self.domain_label, "must not be empty")
        check_bool("allow_spread", self.allow_spread)
        check_duration("settle_s", self.settle_s)
        check_duration("wait_s", self.wait_s)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankPlace:
    """Where one world rank goes."""

    world_rank: int
    node_id: str
    host: str
    domain: str
    """The label's value, or the name of the node."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupPlace:
    """Where one EP group goes."""

    ranks: tuple[int, ...]
    """World ranks, consecutive."""
    domains: tuple[str, ...]
    """In the order of the ranks; more than one: the group is spread."""
    num_nodes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placement:
    """A node for every rank."""

    ranks: tuple[RankPlace, ...]
    """By world rank."""
    groups: tuple[GroupPlace, ...]
    """EP groups, in the order of their ranks."""

    @property
    def spread_groups(self) -> tuple[GroupPlace, ...]:
        """EP groups that no single domain took."""
        return tuple(group for group in self.groups if len(group.domains) > 1)

    @property
    def label_selectors(self) -> list[dict[str, str]]:
        """One per rank, for ``placement_group(bundle_label_selector=…)``: its node."""
        return [{"ray.io/node-id": place.node_id} for place in self.ranks]

    def __str__(self) -> str:
        size, spread = len(self.groups[0].ranks), self.spread_groups
        where: dict[str, None] = dict.fromkeys(place.domain for place in self.ranks)
        text = f"{several(len(self.groups), 'EP group')} of {size} in {several(len(where), 'domain')}"
        text += f" ({shortened(list(where), 4)}), {several(len({p.node_id for p in self.ranks}), 'node')}"
        if not spread:
            return text
        parts = [f"ranks {g.ranks[0]} to {g.ranks[-1]} over {', '.join(g.domains)}" for g in spread]
        fits_none = "1 fits in no domain" if len(spread) == 1 else f"{len(spread)} fit in no domain"
        return f"{text}; {fits_none}: {shortened(parts, 4, '; ')}"


Decision = Placement | PlacementShortage


def decide_placement(nodes: Sequence[NodeOffer], request: PlacementRequest) -> Decision:
    """A place for every rank, or what is missing. See the module for the rules."""
    domains = _domains(nodes, request)
    num_groups, size = request.num_workers // request.group_size, request.group_size
    needs = request.needs
    rooms = [sum(node.num_fitting(needs) for node in domain.nodes) for domain in domains]
    shares = share_out(num_groups, size, rooms) if request.allow_spread else split_whole(num_groups, size, rooms)
    if shares is None:
        return _shortage(domains, rooms, request)
    order: list[tuple[NodeOffer, _Domain]] = []
    for share in shares:
        domain = domains[share.unit]
        inner = share_out(
            share.amount // share.part, share.part, [node.num_fitting(needs) for node in domain.nodes], first=True
        )
        order += [(domain.nodes[node.unit], domain) for node in inner for _ in range(node.amount)]
    ranks = tuple(
        RankPlace(world_rank=rank, node_id=node.node_id, host=node.host, domain=domain.name)
        for rank, (node, domain) in enumerate(order)
    )
    groups = tuple(_group(members, ranks) for members in ep_groups(request.num_workers, request.ep_size))
    return Placement(ranks=ranks, groups=groups)


def decide_at(nodes: Sequence[NodeOffer], request: PlacementRequest, waited_s: float, settle_s: float) -> Decision:
    """As :func:`decide_placement`, but a group is not spread within ``settle_s`` if waiting may spare it that.

    Resources come back a moment after their user is gone: those of the workers that are being started again, too.
    """
    whole = decide_placement(nodes, dataclasses.replace(request, allow_spread=False))
    if isinstance(whole, Placement) or not request.allow_spread:
        return whole
    if whole.fits_when_idle and waited_s < settle_s:
        return whole
    return decide_placement(nodes, request)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Domain:
    name: str
    is_node: bool
    nodes: tuple[NodeOffer, ...]


def _domains(nodes: Sequence[NodeOffer], request: PlacementRequest) -> list[_Domain]:
    """Domains by name, their nodes by host; numbers in names count as numbers."""
    of_host = collections.Counter(node.host for node in nodes)
    members: dict[tuple[str, bool, str], list[NodeOffer]] = collections.defaultdict(list)
    for node in nodes:
        label = node.labels.get(request.domain_label, "")
        own_name = node.host if of_host[node.host] == 1 else f"{node.host}/{node.node_id[:12]}"
        members[(label, False, "") if label else (own_name, True, node.node_id)].append(node)
    return [
        _Domain(name=key[0], is_node=key[1], nodes=tuple(sorted(members[key], key=_node_order)))
        for key in sorted(members, key=lambda key: (_natural(key[0]), *key))
    ]


def _node_order(node: NodeOffer) -> tuple:
    return _natural(node.host), node.host, node.node_id


def _natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sorts ``node10`` behind ``node9``."""
    return tuple((1, int(part), "") if part.isdigit() else (0, 0, part) for part in re.split(r"([0-9]+)", name) if part)


def _group(members: tuple[int, ...], ranks: Sequence[RankPlace]) -> GroupPlace:
    places = [ranks[rank] for rank in members]
    domains = tuple(dict.fromkeys(place.domain for place in places))
    return GroupPlace(ranks=members, domains=domains, num_nodes=len({place.node_id for place in places}))


def _shortage(domains: Sequence[_Domain], rooms: Sequence[int], request: PlacementRequest) -> PlacementShortage:
    resource, needs = request.main_resource, request.needs
    num_groups, size = request.num_workers // request.group_size, request.group_size
    idle = [sum(node.num_fitting(needs, idle=True) for node in domain.nodes) for domain in domains]
    shares = share_out(num_groups, size, idle) if request.allow_spread else split_whole(num_groups, size, idle)
    seen = [_room(domain, fitting, request) for domain, fitting in zip(domains, rooms, strict=True)]
    return PlacementShortage(
        resource=resource,
        group_amount=needs[resource] * size,
        num_groups=num_groups,
        in_one_domain=not request.allow_spread,
        rooms=tuple(sorted(seen, key=lambda room: (-room.num_fitting, -room.free))),
        fits_when_idle=shares is not None,
    )


def _room(domain: _Domain, num_fitting: int, request: PlacementRequest) -> DomainRoom:
    resource, needs = request.main_resource, request.needs
    only_main = {resource: needs[resource]}
    limited_by = ""
    if num_fitting < sum(node.num_fitting(only_main) for node in domain.nodes):
        others = [name for name in needs if name != resource]
        fitting = {name: sum(node.num_fitting({name: needs[name]}) for node in domain.nodes) for name in others}
        limited_by = min(others, key=lambda name: (fitting[name], name))
    return DomainRoom(
        domain=domain.name,
        num_nodes=len(domain.nodes),
        is_node=domain.is_node,
        free=sum(node.free.get(resource, 0.0) for node in domain.nodes),
        num_fitting=num_fitting,
        limited_by=limited_by,
    )
