"""Placement as a pure decision: small clusters by hand, random ones by their rules, and one of 500 nodes."""

from __future__ import annotations

import collections
import itertools
import pickle
import random

import pytest

pytest.importorskip("ray", reason="ray_deepep.cluster needs Ray")

from ray_deepep import InvalidArgumentError, InvalidTypeError
from ray_deepep.cluster import (
    ExpertParallelConfig,
    NodeOffer,
    Placement,
    PlacementConfig,
    PlacementError,
    PlacementRequest,
    PlacementShortage,
    decide_placement,
    find_placement,
)
from ray_deepep.cluster.placement import decide_at
from ray_deepep.cluster.placer import WorkerPlacementError


def node(name: str, gpus: float, domain: str = "", *, total: float | None = None, cpus: float = 64) -> NodeOffer:
    return NodeOffer(
        node_id=f"id-{name}",
        host=name,
        labels={"ray.io/gpu-domain": domain} if domain else {},
        free={"GPU": gpus, "CPU": cpus},
        total={"GPU": gpus if total is None else total, "CPU": 64},
    )


def request(num_workers: int, ep_size: int | None = None, **changes) -> PlacementRequest:
    return PlacementRequest(
        **{"num_workers": num_workers, "ep_size": ep_size, "resources_per_worker": {"GPU": 1, "CPU": 1}} | changes
    )


def hosts(placement: Placement | PlacementShortage) -> list[tuple[str, int]]:
    """Hosts in the order of the ranks, each with how many of them."""
    assert isinstance(placement, Placement), placement
    return [(host, len(list(ranks))) for host, ranks in itertools.groupby(place.host for place in placement.ranks)]


def domains(placement: Placement | PlacementShortage) -> list[tuple[str, ...]]:
    assert isinstance(placement, Placement), placement
    return [group.domains for group in placement.groups]


# By hand


def test_each_group_on_a_node_of_its_own():
    placement = decide_placement([node("b", 8), node("a", 8)], request(16, 8))
    assert hosts(placement) == [("a", 8), ("b", 8)]
    assert [place.world_rank for place in placement.ranks] == list(range(16))
    assert placement.label_selectors[7:9] == [{"ray.io/node-id": "id-a"}, {"ray.io/node-id": "id-b"}]
    assert not placement.spread_groups
    assert str(placement) == "2 EP groups of 8 in 2 domains (a, b), 2 nodes"


def test_a_labelled_domain_of_many_nodes_is_one_place():
    nodes = [node(f"n{i}", 4, "rack-1" if i < 3 else "rack-2") for i in range(9)]
    placement = decide_placement(nodes, request(24, 12))
    assert domains(placement) == [("rack-2",), ("rack-2",)]
    assert hosts(placement) == [(f"n{i}", 4) for i in range(3, 9)]
    assert domains(decide_placement(nodes, request(36, 12))) == [("rack-1",), ("rack-2",), ("rack-2",)]


def test_another_label_may_name_the_domains():
    nodes = [NodeOffer(node_id=n, host=n, labels={"rack": "r"}, free={"GPU": 2}, total={"GPU": 2}) for n in "ab"]
    wanted = request(4, resources_per_worker={"GPU": 1})
    assert domains(decide_placement(nodes, wanted)) == [("a", "b")]
    wanted = request(4, resources_per_worker={"GPU": 1}, domain_label="rack")
    assert domains(decide_placement(nodes, wanted)) == [("r",)]


def test_groups_lie_on_one_node_of_their_domain_where_they_fit():
    nodes = [node(name, 6, "rack") for name in "abcd"]
    assert hosts(decide_placement(nodes, request(16, 4))) == [(name, 4) for name in "abcd"]


def test_few_domains_and_the_tightest_for_the_rest():
    nodes = [node("a", 8), node("b", 4), node("c", 8)]
    assert hosts(decide_placement(nodes, request(4))) == [("b", 4)]
    assert hosts(decide_placement(nodes, request(12, 4))) == [("a", 8), ("b", 4)]


def test_numbers_in_names_count_as_numbers():
    assert hosts(decide_placement([node("n10", 2), node("n9", 2)], request(4, 2))) == [("n9", 2), ("n10", 2)]


def test_a_group_that_fits_no_domain_is_spread_over_the_fewest():
    nodes = [node("a", 5), node("b", 3), *(node(name, 2) for name in "cdef")]
    placement = decide_placement(nodes, request(8))
    assert domains(placement) == [("a", "b")]
    assert placement.spread_groups == placement.groups
    assert str(placement) == (
        "1 EP group of 8 in 2 domains (a, b), 2 nodes; 1 fits in no domain: ranks 0 to 7 over a, b"
    )


def test_a_spread_group_has_equal_parts_where_that_takes_no_more_domains():
    nodes = [node("a", 10), node("b", 8), node("c", 14)]
    assert hosts(decide_placement(nodes, request(16))) == [("a", 8), ("b", 8)]


def test_only_the_groups_that_must_are_spread():
    nodes = [node("a", 8), node("b", 4), node("c", 8), node("d", 4)]
    placement = decide_placement(nodes, request(24, 8))
    assert domains(placement) == [("a",), ("c",), ("b", "d")]
    assert [group.ranks[0] for group in placement.spread_groups] == [16]


def test_workers_that_need_several_gpus_or_a_part_of_one():
    nodes = [node("a", 8), node("b", 5)]
    assert hosts(decide_placement(nodes, request(6, 2, resources_per_worker={"GPU": 2}))) == [("a", 4), ("b", 2)]
    halves = {"GPU": 0.1}
    assert hosts(decide_placement([node("a", 0.3)], request(3, resources_per_worker=halves))) == [("a", 3)]
    assert hosts(decide_placement([node("a", 2)], request(2, resources_per_worker={"GPU": 1, "TPU": 0}))) == [("a", 2)]


def test_two_nodes_of_one_host_have_different_names():
    nodes = [NodeOffer(node_id=f"{i}" * 56, host="h", labels={}, free={"slot": 1}, total={"slot": 1}) for i in (1, 2)]
    placement = decide_placement(nodes, request(2, resources_per_worker={"slot": 1}))
    assert domains(placement) == [("h/111111111111", "h/222222222222")]


# What is missing


@pytest.mark.parametrize(
    ("nodes", "wanted", "text"),
    (
        (
            [node("A", 6), node("B", 4)],
            request(8, allow_spread=False),
            "8 GPUs in one domain wanted; node A has 6 free, node B 4",
        ),
        (
            [node("A", 6, total=8), node("B", 4)],
            request(8, allow_spread=False),
            "8 GPUs in one domain wanted; node A has 6 free, node B 4; it would fit if they were idle",
        ),
        (
            [node("A", 3, "rack-1"), node("B", 4, "rack-1"), node("C", 1)],
            request(16, 8, allow_spread=False),
            "2 groups of 8 GPUs wanted, each in one domain; domain rack-1 has 7 free, node C 1",
        ),
        ([node("A", 6), node("B", 0)], request(8), "8 GPUs wanted; node A has 6 free, 1 other none"),
        ([node("A", 0), node("B", 0)], request(1), "1 GPU wanted; 2 domains with none"),
        ([node("A", 8, cpus=2)], request(4), "4 GPUs wanted; node A has 8 free but CPU for 2 workers; it would fit"),
        ([], request(4, resources_per_worker={"CPU": 2}), "8 CPUs wanted; the cluster has no node"),
        (
            [node(f"n{i}", i % 4) for i in range(40)],
            request(100),
            "100 GPUs wanted; node n3 has 3 free, node n7 3, node n11 3, node n15 3, node n19 3, node n23 3,"
            " 24 others 3 or less, 10 others none",
        ),
    ),
)
def test_a_shortage_in_words(nodes, wanted, text):
    shortage = decide_placement(nodes, wanted)
    assert isinstance(shortage, PlacementShortage)
    assert text in str(shortage)
    assert shortage.fits_when_idle == ("idle" in str(shortage))


def test_the_special_resource_is_told():
    wanted = request(2, resources_per_worker={"CPU": 1, "slot": 2, "accelerator_type:X": 0.001})
    assert str(decide_placement([], wanted)).startswith("4 slots wanted")


@pytest.mark.parametrize("kind", (PlacementError, WorkerPlacementError))
def test_the_error_keeps_its_data_through_pickle(kind):
    error = kind(decide_placement([node("A", 6), node("B", 4)], request(8, allow_spread=False)), 60.2)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind and copy.shortage == error.shortage
    text = "placement: 8 GPUs in one domain wanted; node A has 6 free, node B 4 (waited 60 s)"
    assert str(copy) == str(error) == text


# Waiting


def test_a_group_is_not_spread_while_a_domain_may_come_free():
    nodes = [node("a", 3, total=4), node("b", 2)]
    first = decide_at(nodes, request(4), waited_s=1.0, settle_s=5.0)
    assert isinstance(first, PlacementShortage) and first.in_one_domain
    assert domains(decide_at(nodes, request(4), waited_s=5.0, settle_s=5.0)) == [("a", "b")]
    assert domains(decide_at([node("a", 3), node("b", 2)], request(4), waited_s=0.0, settle_s=5.0)) == [("a", "b")]


def test_find_placement_waits_for_room():
    offers = [[node("a", 1, total=2)], [node("a", 1, total=2)], [node("a", 2)]]
    placement = find_placement(
        num_workers=2, resources_per_worker={"GPU": 1}, config=PlacementConfig(wait_s=30.0), offer=lambda: offers.pop(0)
    )
    assert hosts(placement) == [("a", 2)]
    assert offers == []


def test_find_placement_gives_up_in_words():
    config = PlacementConfig(wait_s=0.1, allow_spread=False)
    with pytest.raises(PlacementError, match="2 GPUs in one domain wanted; node a has 1 free, node b 1"):
        find_placement(
            num_workers=2,
            resources_per_worker={"GPU": 1},
            config=config,
            offer=lambda: [node("a", 1), node("b", 1)],
        )


def test_at_the_end_of_the_wait_a_group_is_rather_spread():
    nodes = [node("a", 1, total=2), node("b", 1)]
    config = PlacementConfig(wait_s=0.1, settle_s=60.0)
    placement = find_placement(num_workers=2, resources_per_worker={"GPU": 1}, config=config, offer=lambda: nodes)
    assert domains(placement) == [("a", "b")]


# Bad input


@pytest.mark.parametrize(
    ("changes", "text"),
    (
        ({"num_workers": 0}, "world_size: must be >= 1"),
        ({"ep_size": 3}, "ep_size: must divide the world size 4; got 3"),
        ({"resources_per_worker": {}}, "resources_per_worker: must have an amount above 0"),
        ({"resources_per_worker": {"GPU": 0}}, "resources_per_worker: must have an amount above 0"),
        ({"resources_per_worker": {"GPU": 1, "CPU": -1}}, "and none below"),
    ),
)
def test_bad_requests_are_refused(changes, text):
    with pytest.raises(InvalidArgumentError, match=text):
        request(**{"num_workers": 4} | changes)


@pytest.mark.parametrize("changes", ({"wait_s": -1.0}, {"settle_s": float("nan")}, {"domain_label": ""}))
def test_bad_settings_are_refused(changes):
    with pytest.raises(InvalidArgumentError, match=next(iter(changes))):
        PlacementConfig(**changes)


def test_the_wait_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("RAY_DEEPEP_PLACEMENT_WAIT_S", "7")
    assert ExpertParallelConfig().placement.wait_s == 7.0
    with pytest.raises(InvalidTypeError, match="placement"):
        ExpertParallelConfig(placement=True)
    with pytest.raises(InvalidTypeError, match="config"):
        find_placement(num_workers=1, resources_per_worker={"CPU": 1}, config=7, offer=list)


# Random clusters


def random_cluster(rng: random.Random, num_nodes: int) -> list[NodeOffer]:
    num_domains = rng.randint(1, max(1, num_nodes // 2))
    return [
        node(f"n{i}", rng.randint(0, 8), rng.choice(["", f"d{rng.randrange(num_domains)}"]), cpus=rng.choice([64, 3]))
        for i in range(num_nodes)
    ]


def room_by_domain(nodes: list[NodeOffer], wanted: PlacementRequest) -> collections.Counter:
    rooms: collections.Counter = collections.Counter()
    for offer in nodes:
        rooms[offer.labels.get("ray.io/gpu-domain", offer.host)] += offer.num_fitting(wanted.needs)
    return rooms


@pytest.mark.parametrize("seed", range(300))
def test_rules_hold_on_random_clusters(seed):
    rng = random.Random(seed)
    nodes = random_cluster(rng, rng.randint(1, 12))
    ep_size, num_groups = rng.choice([1, 2, 3, 4, 6, 8, 12, 16]), rng.randint(1, 4)
    wanted = request(ep_size * num_groups, ep_size, allow_spread=rng.random() < 0.7)
    rooms = room_by_domain(nodes, wanted)
    fits_whole = sum(room // ep_size for room in rooms.values()) >= num_groups
    fits = sum(rooms.values()) >= wanted.num_workers
    decision = decide_placement(nodes, wanted)
    assert isinstance(decision, Placement) == (fits if wanted.allow_spread else fits_whole)
    shuffled = rng.sample(nodes, len(nodes))
    assert decide_placement(shuffled, wanted) == decision, "the order of the offer must not matter"
    if isinstance(decision, PlacementShortage):
        assert sum(room.num_fitting for room in decision.rooms) == sum(rooms.values())
        return
    assert [place.world_rank for place in decision.ranks] == list(range(wanted.num_workers))
    assert [group.ranks for group in decision.groups] == [
        tuple(range(first, first + ep_size)) for first in range(0, wanted.num_workers, ep_size)
    ]
    taken = collections.Counter(place.node_id for place in decision.ranks)
    for offer in nodes:
        assert taken[offer.node_id] <= offer.num_fitting(wanted.needs), "a node takes no more than it has"
    order = [place.node_id for place in decision.ranks]
    assert len(list(itertools.groupby(order))) == len(taken), "ranks of a node are consecutive"
    assert bool(decision.spread_groups) == (not fits_whole), "no group is spread without need"


@pytest.mark.parametrize("seed", range(50))
def test_one_group_is_spread_over_the_fewest_domains(seed):
    rng = random.Random(seed)
    nodes = random_cluster(rng, 8)
    wanted = request(rng.choice([8, 12, 16, 24]))
    rooms = sorted(room_by_domain(nodes, wanted).values(), reverse=True)
    decision = decide_placement(nodes, wanted)
    if isinstance(decision, PlacementShortage):
        assert sum(rooms) < wanted.num_workers
        return
    fewest = next(n for n in range(1, len(rooms) + 1) if sum(rooms[:n]) >= wanted.num_workers)
    assert len(decision.groups[0].domains) == fewest


@pytest.mark.timeout(20)
@pytest.mark.parametrize("ep_size", (8, 64, 72, 128))
def test_five_hundred_nodes(ep_size):
    rng = random.Random(ep_size)
    nodes = [node(f"n{i}", rng.choice([0, 2, 4, 4, 8]), f"rack-{i // 18}" if i % 5 else "") for i in range(500)]
    wanted = request(9 * 128, ep_size)
    decision = decide_placement(nodes, wanted)
    assert isinstance(decision, Placement)
    whole = sum(room // ep_size for room in room_by_domain(nodes, wanted).values())
    assert len(decision.spread_groups) == 0 if whole >= 9 * 128 // ep_size else decision.spread_groups
