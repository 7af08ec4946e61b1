"""Elastic runs, decided: shares of a step, numbers of workers, EP degrees, what the policy in the controller does."""

from __future__ import annotations

import argparse
import collections
import math
from types import SimpleNamespace

import pytest
import torch

from train.config import TrainConfig
from train.errors import ConfigError
from train.presets import get_preset
from train.ray_options import RayOptions, add_ray_arguments, ep_sizes_of, options_from_args, with_shares
from train.shares import micro_steps_of
from train.sizes import ep_size_by_workers, parse_workers


@pytest.mark.parametrize(("num_shares", "per_share"), [(1, 1), (2, 1), (4, 1), (4, 2), (5, 3), (8, 8)])
def test_every_micro_batch_counts_once_and_equally(num_shares, per_share):
    for world_size in range(1, num_shares + 1):
        ranks = [
            micro_steps_of(rank, world_size=world_size, num_shares=num_shares, per_share=per_share)
            for rank in range(world_size)
        ]
        assert len({len(steps) for steps in ranks}) == 1
        rounds = len(ranks[0])
        done = [step for steps in ranks for step in steps if step.weight]
        assert sorted((step.share, step.micro_step) for step in done) == [
            (share, micro_step) for share in range(num_shares) for micro_step in range(per_share)
        ]
        # DeepSpeed divides each by the passes of a rank, then by the ranks.
        parts = {step.weight / rounds / world_size for step in done}
        assert len(parts) == 1
        assert math.isclose(parts.pop(), 1 / (num_shares * per_share), rel_tol=1e-15)
        assert (rounds - 1) * world_size < len(done)  # no rank does a pass too many


def test_at_full_size_a_rank_does_its_own_share():
    for rank in range(4):
        steps = micro_steps_of(rank, world_size=4, num_shares=4, per_share=3)
        assert [(step.share, step.micro_step, step.weight) for step in steps] == [(rank, m, 1.0) for m in range(3)]


def elastic(num_shares=4, **fields) -> TrainConfig:
    return get_preset("tiny").replace(**({"run.num_shares": num_shares} | fields))


def test_the_ep_degree_is_the_largest_that_fits():
    eight = elastic(8, **{"model.num_experts": 8})
    assert [eight.resolve_ep_size(n) for n in range(1, 9)] == [1, 2, 1, 4, 1, 2, 1, 8]
    at_most_four = eight.replace(**{"model.ep_size": 4})
    assert [at_most_four.resolve_ep_size(n) for n in range(1, 9)] == [1, 2, 1, 4, 1, 2, 1, 4]
    twelve = elastic(6, **{"model.num_experts": 12, "model.ep_size": 4})
    assert [twelve.resolve_ep_size(n) for n in range(1, 7)] == [1, 2, 3, 4, 1, 3]
    with pytest.raises(ConfigError, match=r"run\.num_shares = 4: must be at least the world size 5"):
        elastic(4).resolve_ep_size(5)


def test_numbers_of_workers_with_too_small_an_ep_degree_are_left_out():
    config = elastic(8, **{"model.num_experts": 8})
    assert ep_size_by_workers(config, min_workers=2) == {2: 2, 3: 1, 4: 4, 5: 1, 6: 2, 7: 1, 8: 8}
    assert ep_size_by_workers(config, min_workers=2, min_ep_size=4) == {4: 4, 8: 8}
    with pytest.raises(ConfigError, match=r"--min-ep-size = 3: no number of workers from 1 to 2 .*\(8 experts\)"):
        ep_size_by_workers(elastic(2, **{"model.num_experts": 8}), min_workers=1, min_ep_size=3)
    with pytest.raises(ConfigError, match=r"model.ep_size = 4: fits none of 1 to 3 workers"):
        ep_size_by_workers(elastic(3, **{"model.ep_size": 4}), min_workers=1)


def test_workers_are_a_number_or_a_range():
    assert (parse_workers("3"), parse_workers("2:4"), parse_workers("4:4")) == ((None, 3), (2, 4), (4, 4))
    for text, rule in {
        "two": "must be a number, or MIN:MAX",
        "1:": "must be a number, or MIN:MAX",
        "1:2:3": "must be a number, or MIN:MAX",
        "3:2": "MIN must be at most MAX",
    }.items():
        with pytest.raises(ConfigError, match=rf"--workers = '{text}': {rule}"):
            parse_workers(text)
    for text in ("0", "0:2"):
        with pytest.raises(ConfigError, match="--workers = 0: must be at least 1"):
            parse_workers(text)


def options(*argv: str) -> RayOptions:
    parser = argparse.ArgumentParser()
    add_ray_arguments(parser)
    return options_from_args(parser.parse_args(argv))


def test_options_of_an_elastic_run():
    fixed, ranged = options("--workers", "3"), options("--workers", "2:4", "--resize-check", "5")
    assert (str(fixed), fixed.is_elastic, fixed.least_workers) == ("3", False, 3)
    assert (str(ranged), ranged.is_elastic, ranged.least_workers, ranged.num_workers) == ("2:4", True, 2, 4)
    assert ranged.resize_check_s == 5
    config = with_shares(get_preset("tiny"), ranged)
    assert config.run.num_shares == 4
    assert ep_sizes_of(config, ranged) == {2: 2, 3: 1, 4: 4}
    assert ep_sizes_of(get_preset("tiny"), fixed) is None
    # A run with a fixed number of workers may go on with the shares of an elastic one.
    assert with_shares(config, options("--workers", "2")) == config
    with pytest.raises(ConfigError, match=r"run\.num_shares = 4: contradicts --workers 1:2"):
        with_shares(config, options("--workers", "1:2"))
    with pytest.raises(ConfigError, match="--min-ep-size = 0: must be at least 1"):
        options("--min-ep-size", "0")
    with pytest.raises(ConfigError, match=r"--resize-check = -1\.0: must be at least 0"):
        options("--resize-check", "-1")


def test_a_cluster_needs_room_for_the_least_number_of_workers():
    from train.ray_main import check_resources, metadata_of

    ranged = options("--workers", "2:4")
    config = get_preset("tiny").replace(**{"run.device": "auto"})
    assert check_resources(config, ranged, {"CPU": 2}) is False
    assert check_resources(config, ranged, {"CPU": 2, "GPU": 2}) is True
    with pytest.raises(ConfigError, match="--workers = 2: needs 2 CPUs and the cluster has 1"):
        check_resources(config, ranged, {"CPU": 1})
    assert metadata_of(config, ranged)["num_workers"] == "2:4"
    assert metadata_of(config, ranged)["ep_size"] == "4"


def test_the_log_says_how_many_workers_there_are():
    from ray_deepep import job_log
    from ray_deepep.run_state import state_of_job

    lines = [job_log.attempt_line(1, 2), job_log.attempt_line(2, 1)]
    assert lines == ["attempt 1 begins with 2 workers", "attempt 2 begins with 1 worker"]
    state = state_of_job("job", "RUNNING", job_log.read(lines))
    assert (state.num_workers, state.restarts) == (1, 1)
    assert "workers" in str(state)
    assert state_of_job("job", "RUNNING", job_log.read([job_log.attempt_line(1)])).num_workers is None


def test_a_sweep_compares_runs_of_fixed_size(tmp_path, capsys):
    from train.sweep import main

    assert main(["--out", str(tmp_path / "sweep"), "--workers", "1:2", "--param", "lr=1e-3,2e-3"]) == 2
    assert "--workers = '1:2': must be a fixed number" in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


def test_a_deepspeed_config_of_an_elastic_run(tmp_path):
    from train.engine import deepspeed_config

    path = tmp_path / "ds.json"
    config = elastic(4, **{"run.deepspeed_config": str(path), "optim.grad_accum": 2})
    path.write_text('{"gradient_accumulation_steps": 2}')
    assert deepspeed_config(config, num_micro_steps=3)["gradient_accumulation_steps"] == 3
    path.write_text('{"train_batch_size": 32}')
    with pytest.raises(ConfigError, match=r"train_batch_size = 32: must be left out of an elastic run"):
        deepspeed_config(config, num_micro_steps=3)


def test_optimizer_files_that_cannot_be_used_are_named(tmp_path):
    from train.errors import CheckpointError
    from train.optimizer_files import _Named, _Reader

    param = torch.nn.Parameter(torch.zeros(2, 3))
    named = _Named(name="w", param=param, file="optimizer_dense_0000.pt", is_mine=True)
    with pytest.raises(CheckpointError, match="has no optimizer state by name"):
        _Reader(tmp_path)
    path = tmp_path / named.file
    for params, problem in (
        ({}, "has no optimizer state of w"),
        ({"w": {"exp_avg": torch.zeros(2, 3)}}, "exp_avg_sq of w does not fit the model"),
        ({"w": {"exp_avg": torch.zeros(6), "exp_avg_sq": torch.zeros(6)}}, "exp_avg of w does not fit the model"),
    ):
        torch.save({"step": 3.0, "params": params}, path)
        with pytest.raises(CheckpointError, match=rf"{named.file}: {problem}"):
            _Reader(tmp_path).state_of(named)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(CheckpointError, match=rf"{named.file}: cannot be read"):
        _Reader(tmp_path)


# The policy


@pytest.fixture
def cluster(monkeypatch):
    """A made-up cluster that the policy looks at: free CPUs of each node, and the key-value store."""
    pytest.importorskip("ray", reason="ray_deepep.cluster needs Ray")
    from ray_deepep.cluster import NodeOffer, resize
    from ray_deepep.cluster import elastic as policy_module

    cluster = SimpleNamespace(free={}, total={}, store={}, slept=0.0)

    def offer():
        return [
            NodeOffer(
                node_id=name, host=name, labels={}, free={"CPU": cluster.free[name]}, total={"CPU": cluster.total[name]}
            )
            for name in cluster.total
        ]

    kv = SimpleNamespace(
        _internal_kv_put=lambda key, value, namespace: cluster.store.update({key: value}),
        _internal_kv_get=lambda key, namespace: cluster.store.get(key),
        _internal_kv_del=lambda key, namespace: cluster.store.pop(key, None),
    )

    def sleep(seconds):
        cluster.slept += seconds

    monkeypatch.setattr(policy_module, "cluster_offer", offer)
    monkeypatch.setattr(policy_module, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: 100.0 + cluster.slept))
    monkeypatch.setattr(resize, "internal_kv", kv)
    monkeypatch.setattr(policy_module.ElasticPolicy, "_maybe_send_resource_request", lambda self: None)
    return cluster


def make_policy(ep_sizes, wait_s=3.0):
    from ray.train import ScalingConfig

    from ray_deepep.cluster import PlacementConfig
    from ray_deepep.cluster.elastic import ElasticPolicy

    scaling = ScalingConfig(
        num_workers=(min(ep_sizes), max(ep_sizes)),
        resources_per_worker={"CPU": 1},
        elastic_resize_monitor_interval_s=10.0,
    )
    return ElasticPolicy(scaling, ep_sizes=ep_sizes, run_key="run", placement=PlacementConfig(wait_s=wait_s))


def group(*node_ids, start_time=0.0):
    workers = [SimpleNamespace(metadata=SimpleNamespace(node_id=node_id)) for node_id in node_ids]
    return SimpleNamespace(workers=workers, num_workers=len(workers), start_time=start_time)


def running(policy, state):
    return policy.make_decision_for_running_worker_group(state, None)


def size_of(decision):
    """Workers that a decision asks for; None: it leaves things as they are."""
    return getattr(decision, "num_workers", None)


def test_the_policy_takes_the_largest_number_that_has_room(cluster):
    policy = make_policy({2: 2, 4: 4})
    cluster.free = cluster.total = {"a": 3, "b": 0}
    assert size_of(policy.make_decision_for_non_running_worker_group()) == 2  # 3 has no EP degree
    cluster.free = cluster.total = {"a": 3, "b": 9}
    assert size_of(policy.make_decision_for_non_running_worker_group()) == 4


def test_a_lost_node_leaves_the_places_of_the_others(cluster):
    """The workers of the attempt before still hold their CPUs when the policy is asked."""
    policy = make_policy({1: 1, 2: 2, 3: 1, 4: 4})
    cluster.free, cluster.total = {"a": 0, "b": 0}, {"a": 2, "b": 2}
    assert size_of(running(policy, group("a", "a", "b", "b"))) is None
    del cluster.total["b"]
    assert size_of(policy.make_decision_for_non_running_worker_group()) == 2
    # Others may have taken the place since: a start that failed has left no workers behind.
    from ray.train.v2._internal.execution.controller.state import ReschedulingState

    policy.after_controller_state_update(None, ReschedulingState(training_failed_error=None))
    assert size_of(policy.make_decision_for_non_running_worker_group()) is None


def test_workers_that_failed_at_once_do_not_stand_in_their_own_way(cluster):
    """They hold their CPUs until others are started, and the policy was never told where."""
    from ray.train.v2._internal.execution.controller.state import ReschedulingState

    policy = make_policy({2: 2, 4: 4})
    cluster.free, cluster.total = {"a": 4}, {"a": 4}
    assert size_of(policy.make_decision_for_non_running_worker_group()) == 4
    cluster.free = {"a": 0}
    assert size_of(policy.make_decision_for_non_running_worker_group()) == 4
    # It was somebody else's: there was no room for the start, so now only what is free counts.
    policy.after_controller_state_update(None, ReschedulingState(training_failed_error=None))
    cluster.free = {"a": 3}
    assert size_of(policy.make_decision_for_non_running_worker_group()) == 2


def test_the_least_number_is_waited_for_until_the_deadline(cluster):
    from ray_deepep.cluster import PlacementError

    policy = make_policy({2: 2, 4: 4}, wait_s=3.0)
    cluster.free = cluster.total = {"a": 1}
    with pytest.raises(PlacementError, match=r"2 CPUs wanted; node a has 1 free \(waited 3 s\)"):
        while policy.make_decision_for_non_running_worker_group():
            pass
    assert cluster.slept == 3.0


def test_healthy_workers_are_asked_for_a_checkpoint_before_they_are_replaced(cluster):
    from ray_deepep.cluster.resize import answer_resize, resize_requested

    policy = make_policy({1: 1, 2: 2})
    cluster.free, cluster.total = {"a": 0}, {"a": 1}
    state = group("a", start_time=95.0)
    cluster.free["b"] = cluster.total["b"] = 1
    assert size_of(running(policy, state)) is None and not resize_requested("run")  # too soon after the start
    cluster.slept = 6.0
    assert size_of(running(policy, state)) is None and resize_requested("run")
    assert size_of(running(policy, state)) is None  # not saved yet
    answer_resize("run")
    assert size_of(running(policy, state)) == 2
    assert not cluster.store
    assert size_of(running(policy, group("a", "b", start_time=110.0))) is None
    assert not resize_requested("run")


def test_workers_that_have_saved_are_replaced_even_if_the_room_is_gone(cluster):
    from ray_deepep.cluster.resize import answer_resize, resize_requested

    policy = make_policy({1: 1, 2: 2})
    cluster.free, cluster.total = {"a": 0, "b": 1}, {"a": 1, "b": 1}
    assert size_of(running(policy, group("a"))) is None and resize_requested("run")
    answer_resize("run")
    cluster.free["b"] = 0
    assert size_of(running(policy, group("a"))) == 1


def test_an_answer_to_an_older_wish_counts_for_nothing(cluster):
    from ray_deepep.cluster import resize

    old = resize.request_resize("run")
    resize.answer_resize("run")
    assert resize.resize_answered("run", old)
    new = resize.request_resize("run")
    assert not resize.resize_answered("run", new)
    resize.forget_resize("run")
    resize.answer_resize("run")  # nobody asks any more
    assert not cluster.store


def test_a_handover_that_nobody_takes_is_an_error():
    pytest.importorskip("ray", reason="ray_deepep.cluster needs Ray")
    from ray_deepep.cluster import HandoverError, ResizeHandover

    with (
        ResizeHandover("run", 1, deadline_s=0.0) as handover,
        pytest.raises(HandoverError, match="after the checkpoint of step 7 to be replaced"),
    ):
        assert handover.asked() is False  # rank 0 alone looks
        handover.hand_over(7)


def test_ep_sizes_of_the_ray_config():
    pytest.importorskip("ray", reason="ray_deepep.cluster needs Ray")
    from ray_deepep import InvalidArgumentError
    from ray_deepep.cluster import ExpertParallelConfig

    config = ExpertParallelConfig(ep_sizes={2: 2, 4: 2})
    assert [config.ep_size_of(n) for n in (2, 4)] == [2, 2]
    assert config.to_dict()["ep_sizes"] == {"2": 2, "4": 2}
    with pytest.raises(InvalidArgumentError, match="has no EP degree for 3 workers"):
        config.ep_size_of(3)
    assert ExpertParallelConfig(ep_size=2).ep_size_of(6) == 2
    for wrong, rule in (({}, "at least one number"), ({3: 2}, "must divide the world size 3")):
        with pytest.raises(InvalidArgumentError, match=rule):
            ExpertParallelConfig(ep_sizes=wrong)


def test_room_counts_what_the_own_workers_hold_once():
    pytest.importorskip("ray", reason="ray_deepep.cluster needs Ray")
    from ray_deepep.cluster import NodeOffer
    from ray_deepep.cluster.sizes import without_workers

    node = NodeOffer(node_id="a", host="a", labels={}, free={"CPU": 1, "GPU": 0}, total={"CPU": 4, "GPU": 2})
    wants = {"CPU": 1, "GPU": 1}
    (held,) = without_workers([node], collections.Counter("aa"), wants)
    assert held.free == {"CPU": 3, "GPU": 2}
    (gone,) = without_workers([node], {"a": 9}, wants)
    assert gone.free == {"CPU": 4, "GPU": 2}
    (others,) = without_workers([node], {"b": 1}, wants)
    assert others.free == {"CPU": 1, "GPU": 0}
