"""Settings of the swap and of runs on Ray: a typed error that names the field, the value and the rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("ray", reason="ray_deepep.cluster needs Ray")
pytest.importorskip("deepspeed", reason="ray_deepep.deepspeed needs DeepSpeed")

from harness import error_of

from ray_deepep import InvalidTypeError
from ray_deepep.cluster import ExpertParallelConfig, PlacementConfig
from ray_deepep.cluster.placement import PlacementRequest
from ray_deepep.deepspeed import SwapConfig


@pytest.mark.parametrize(
    ("make", "message"),
    (
        (lambda: SwapConfig(layout=1), "layout: must be a str; got 1"),
        (lambda: SwapConfig(comm={}), "comm: must be a CommConfig; got 'dict'"),
        (lambda: PlacementConfig(wait_s="9"), "wait_s: must be a number; got '9'"),
        (lambda: PlacementConfig(settle_s=None), "settle_s: must be a number; got None"),
        (lambda: PlacementConfig(domain_label=7), "domain_label: must be a str; got 7"),
        (lambda: PlacementConfig(allow_spread="no"), "allow_spread: must be a bool; got 'no'"),
        (
            lambda: PlacementRequest(num_workers=2.0, resources_per_worker={"CPU": 1}),
            "world_size: must be an int; got 2.0",
        ),
        (
            lambda: PlacementRequest(num_workers=2, resources_per_worker={"CPU": "1"}),
            "resources_per_worker['CPU']: must be a number; got '1'",
        ),
        (lambda: ExpertParallelConfig(ep_size=1.5), "ep_size: must be an int; got 1.5"),
        (lambda: ExpertParallelConfig(ep_size=True), "ep_size: must be an int; got True"),
        (lambda: ExpertParallelConfig(hang_deadline_s="9"), "hang_deadline_s: must be a number; got '9'"),
        (lambda: ExpertParallelConfig(timeout_s="9"), "timeout_s: must be a number; got '9'"),
        (lambda: ExpertParallelConfig(backend=7), "backend: must be a str; got 7"),
        (lambda: ExpertParallelConfig(init_method=None), "init_method: must be a str; got None"),
        (lambda: ExpertParallelConfig(swap="yes"), "swap: must be a bool or a SwapConfig; got 'str'"),
    ),
)
def test_settings_of_another_type(make: Callable[[], Any], message: str) -> None:
    assert str(error_of(InvalidTypeError, make)) == message


@pytest.mark.parametrize("make", (SwapConfig, PlacementConfig, ExpertParallelConfig))
def test_fields_that_are_not_known(make: Callable[..., Any]) -> None:
    error = error_of(InvalidTypeError, lambda: make(unknown=3))
    assert error.argument == "unknown" and error.value == 3 and "has no such field, only" in error.rule
