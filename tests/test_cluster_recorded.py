"""Verdicts over recorded evidence: ``tests/readings/faults`` has one file per case."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import pytest

pytest.importorskip("ray", reason="ray_deepep.cluster needs Ray")

from ray_deepep import Beacon
from ray_deepep.cluster import Evidence, RankState, RankStatus, decide_culprit, decide_hung

CASES = sorted(pathlib.Path(__file__).parent.glob("readings/faults/*.json"), key=lambda path: path.stem)
assert CASES, "tests/readings/faults is missing"


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_verdict(path: pathlib.Path) -> None:
    text = path.read_text()
    evidence, expect = Evidence.from_json(text), json.loads(text)["expect"]
    culprit = decide_culprit(evidence.faults, evidence.statuses)
    assert (culprit.world_rank, culprit.cause) == (expect["world_rank"], expect["cause"])
    for words in expect["says"]:
        assert words in str(culprit)


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_the_order_of_the_evidence_does_not_matter(path: pathlib.Path) -> None:
    evidence = Evidence.from_json(path.read_text())
    backwards = dict(reversed(evidence.statuses.items()))
    assert decide_culprit(evidence.faults[::-1], backwards) == decide_culprit(evidence.faults, evidence.statuses)


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_evidence_survives_json(path: pathlib.Path) -> None:
    evidence = Evidence.from_json(path.read_text())
    assert Evidence.from_json(evidence.to_json()) == evidence


def test_a_report_shows_the_culprit_and_some_victims() -> None:
    path = next(path for path in CASES if path.stem == "hang_in_user_code")
    evidence = Evidence.from_json(path.read_text())
    fields = json.loads(decide_culprit(evidence.faults, evidence.statuses).to_json())
    assert (fields["rank"], fields["operation"], fields["phase"]) == (3, "dispatch", "wait_published")
    assert (fields["expected"], fields["seen"], fields["reporters"]) == (17, 16, [0, 1, 2])
    phases = {rank: beacon["phase"] for rank, beacon in fields["beacons"].items()}
    assert phases == {"0": "dispatch", "1": "dispatch", "2": "dispatch", "3": "callbacks"}
    many = {rank: evidence.statuses[0] for rank in range(4, 4000)}
    crowd = decide_culprit(evidence.faults, {**evidence.statuses, **many})
    assert len(crowd.to_json()) < 5000


def running(*beacons: Beacon | None) -> dict[int, RankStatus]:
    return {rank: RankStatus(state=RankState.RUNNING, beacon=beacon) for rank, beacon in enumerate(beacons)}


def at(step: int, age_s: float, silent_s: float = 0.1) -> Beacon:
    return Beacon(step=step, phase="data", age_s=age_s, silent_s=silent_s)


def test_a_job_that_stands_still_names_the_slowest() -> None:
    culprit = decide_hung(running(at(7, 61.0), at(6, 60.5), at(7, 70.0)), 60.0)
    assert (culprit.world_rank, culprit.cause) == (1, "hung")
    assert sorted(culprit.beacons) == [0, 1, 2]
    same_step = decide_hung(running(at(7, 61.0), at(7, 62.0), at(7, 0.0, silent_s=65.0)), 60.0)
    assert same_step.world_rank == 2, "silence counts: a process that holds the interpreter tells nothing"


def test_a_job_in_which_somebody_moves_does_not_hang() -> None:
    assert decide_hung(running(at(7, 300.0), at(7, 1.0)), 60.0) is None
    assert decide_hung(running(at(7, 300.0), None), 60.0) is None, "a rank that never told may be moving"
    assert decide_hung({}, 60.0) is None


def test_ranks_that_have_finished_hold_up_nobody() -> None:
    statuses = running(at(8, 300.0), at(8, 90.0))
    statuses[0] = dataclasses.replace(statuses[0], state=RankState.FINISHED)
    assert decide_hung(statuses, 60.0).world_rank == 1
