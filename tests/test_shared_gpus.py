"""Ranks that were given the same GPU are found by its UUID, named in a warning, and refused in a run on Ray."""

from __future__ import annotations

import logging

import pytest

from ray_deepep import CommConfig, SharedGpuError
from ray_deepep.rank_info import RankInfo, shared_gpus, warn_of_shared_gpus

A, B, C = (f"GPU-{letter}-0000" for letter in "abc")


def peers(*gpus: str) -> list[RankInfo]:
    return [
        RankInfo(
            rank=rank,
            host="node1",
            pid=100 + rank,
            machine="m",
            core="1",
            core_problem="",
            config={},
            has_group=True,
            cuda_problem="",
            gpu=gpu,
        )
        for rank, gpu in enumerate(gpus)
    ]


@pytest.mark.parametrize(
    ("gpus", "shared"),
    (
        ((), {}),
        (("", "", ""), {}),
        ((A, B, C), {}),
        ((A, B, A), {A: (0, 2)}),
        ((A, A, B, A, B, C, ""), {A: (0, 1, 3), B: (2, 4)}),
    ),
)
def test_ranks_that_share_a_gpu(gpus, shared):
    assert shared_gpus(gpus) == shared


def test_one_warning_names_all(caplog):
    with caplog.at_level(logging.WARNING, logger="ray_deepep"):
        warn_of_shared_gpus(peers(A, B, C))
        assert caplog.messages == []
        warn_of_shared_gpus(peers(A, B, A, B, A))
    (message,) = caplog.messages
    assert f"ranks 0 and 2 and 4 use the same GPU {A}, ranks 1 and 3 use the same GPU {B} on node1" in message


def test_a_run_on_ray_refuses_them():
    pytest.importorskip("ray", reason="ray_deepep.cluster needs Ray")
    from ray_deepep.cluster.gather import refuse_shared_gpus

    refuse_shared_gpus([A, B, ""], CommConfig())
    refuse_shared_gpus([A, A], CommConfig(allow_shared_gpus=True))
    with pytest.raises(SharedGpuError, match="ranks 0 and 1 use the same GPU GPU-a-0000; give each rank") as info:
        refuse_shared_gpus([A, A], CommConfig())
    assert info.value.shared == {A: (0, 1)}


def test_the_setting_comes_from_the_environment(monkeypatch):
    assert CommConfig().allow_shared_gpus is False
    monkeypatch.setenv("RAY_DEEPEP_ALLOW_SHARED_GPUS", "1")
    assert CommConfig().allow_shared_gpus is True
