"""Placement on Ray's multi-node test cluster: made-up resources and labels, and a Train run whose workers obey."""

import glob
import json
import os
import socket
import tempfile
import time
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="ray_deepep.cluster needs Ray")

import placement_cases
import ray
from cluster_cases import FakeWorkerGroup
from ray.cluster_utils import Cluster
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

from ray_deepep import CommConfig, SharedGpuError
from ray_deepep.cluster import (
    ExpertParallelConfig,
    ExpertParallelTrainer,
    PlacementConfig,
    PlacementError,
    cluster_offer,
    find_placement,
)
from ray_deepep.cluster.expert_parallel import ExpertParallelBackend
from ray_deepep.cluster.nodes import reachable
from ray_deepep.cluster.worker import WorkerStart, start_worker

pytestmark = pytest.mark.xdist_group("ray")
SLOT = {"slot": 1}


@pytest.fixture(scope="module")
def nodes():
    """Ids of three nodes: ``a`` and ``c`` of one domain with two slots each, ``b`` with three slots of its own."""
    ray.cloudpickle.register_pickle_by_value(placement_cases)
    # A folder of its own, so that no other Ray of this machine takes the cluster's address for its own.
    with tempfile.TemporaryDirectory(prefix="rd") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
        patch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        cluster = Cluster()
        try:
            head = {"include_dashboard": False, "_system_config": {"prestart_worker_first_driver": False}}
            domain = {"ray.io/gpu-domain": "x"}
            made = [
                cluster.add_node(num_cpus=2, resources={"slot": 2, "bay": 1}, labels=domain, **head),
                cluster.add_node(num_cpus=0, resources={"slot": 3, "bay": 1}),
                cluster.add_node(num_cpus=0, resources={"slot": 2}, labels=domain),
            ]
            ray.init(address=cluster.address, log_to_driver=False)
            yield {name: node.node_id for name, node in zip("abc", made, strict=True)} | {"cluster": cluster}
        finally:
            ray.shutdown()
            cluster.shutdown()
            ray.cloudpickle.unregister_pickle_by_value(placement_cases)


def place(**changes):
    config = PlacementConfig(wait_s=2.0, **changes.pop("config", {}))
    return find_placement(resources_per_worker=SLOT, config=config, **changes)


def test_the_offer_has_labels_and_resources(nodes):
    offer = {node.node_id: node for node in cluster_offer()}
    assert set(offer) == {nodes[name] for name in "abc"}
    domains = {name: offer[nodes[name]].labels.get("ray.io/gpu-domain") for name in "abc"}
    assert domains == {"a": "x", "b": None, "c": "x"}
    assert [offer[nodes[name]].free["slot"] for name in "abc"] == [2, 3, 2]


def test_a_placement_group_takes_the_placement(nodes):
    placement = place(num_workers=6, ep_size=2)
    group = placement_group([SLOT] * 6, bundle_label_selector=placement.label_selectors)
    assert group.wait(20)
    taken = placement_group_table(group)["bundles_to_node_id"]
    assert [taken[rank] for rank in range(6)] == [node.node_id for node in placement.ranks]
    try:
        # One slot is left, on b.
        with pytest.raises(PlacementError, match=r"2 slots wanted; node \S+ has 1 free, 1 other none; it would fit"):
            place(num_workers=2)
    finally:
        remove_placement_group(group)
    place(num_workers=7)  # the slots come back within the wait


def test_a_shortage_names_the_domains(nodes):
    with pytest.raises(
        PlacementError, match=r"5 slots in one domain wanted; domain x has 4 free, node \S+ 3 \(waited 2 s\)"
    ):
        place(num_workers=5, config={"allow_spread": False})


class GroupOnOneGpu(FakeWorkerGroup):
    """Two workers that come up and tell the same GPU."""

    def execute_single_async(self, rank, function, *args):
        start = WorkerStart(transport="cuda", transport_reason="asked for", gpu="GPU-a")
        return ray.put(start if function is start_worker else ("127.0.0.1", 1))


def test_workers_on_the_same_gpu_are_refused(nodes):
    group = GroupOnOneGpu(["first", "second"])
    with pytest.raises(SharedGpuError, match="ranks 0 and 1 use the same GPU GPU-a"):
        ExpertParallelBackend().on_start(group, ExpertParallelConfig(swap=False))
    assert group.was_shut_down
    group = GroupOnOneGpu(["first", "second"])
    ExpertParallelBackend().on_start(group, ExpertParallelConfig(comm=CommConfig(allow_shared_gpus=True), swap=False))
    assert not group.was_shut_down


def trainer(
    folder, num_workers: int, *, function=placement_cases.note_place, max_failures=0, wants=SLOT, job=None, **config
):
    return ExpertParallelTrainer(
        function,
        train_loop_config={"folder": str(folder)} | (job or {}),
        torch_config=ExpertParallelConfig(
            comm=CommConfig(transport="shm", num_threads=1, heap_gib=1.0), swap=False, backend="gloo", **config
        ),
        scaling_config=ScalingConfig(num_workers=num_workers, resources_per_worker={"CPU": 0} | wants),
        run_config=RunConfig(
            storage_path=str(folder),
            failure_config=FailureConfig(max_failures=max_failures, controller_failure_limit=max_failures),
            worker_runtime_env={"env_vars": {"GLOO_SOCKET_IFNAME": "lo"}},
        ),
    )


@pytest.mark.slow
def test_train_workers_have_the_ranks_of_their_nodes(nodes, tmp_path):
    """Of 7 slots 4 are wanted, in groups of 2: both in the domain of a and c, which the label makes one place."""
    trainer(tmp_path, 4, ep_size=2).fit()
    places = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(4)]
    by_id = {nodes[name]: name for name in "abc"}
    found = [by_id[place["node_id"]] for place in places]
    assert sorted(found) == ["a", "a", "c", "c"]
    assert found[0] == found[1] and found[2] == found[3]
    assert [place["ranks"] for place in places] == [[0, 1], [0, 1], [2, 3], [2, 3]]


def test_a_train_run_without_room_says_what_is_missing(nodes, tmp_path):
    placement = PlacementConfig(wait_s=1.0, allow_spread=False)
    with pytest.raises(ray.train.TrainingFailedError, match="5 slots in one domain wanted; domain x has 4 free"):
        trainer(tmp_path, 5, placement=placement).fit()
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".json")]


@pytest.mark.slow
def test_a_node_that_dies_is_named_and_done_without(nodes, tmp_path, monkeypatch):
    """Two workers in one domain, on a and on a node that dies; then on a and b, from the last checkpoint."""
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    doomed = nodes["cluster"].add_node(num_cpus=0, resources={"bay": 1}, labels={"ray.io/gpu-domain": "x"})
    run = trainer(
        tmp_path,
        2,
        function=placement_cases.lose_node,
        max_failures=1,
        wants={"bay": 1},
        job={"doomed": doomed.node_id},
    )
    result = run.fit()
    assert result.metrics["step"] == 6

    def places(attempt: int) -> set[str]:
        return {(tmp_path / f"attempt{attempt}-rank{rank}").read_text() for rank in range(2)}

    assert places(1) == {nodes["a"], doomed.node_id}
    assert places(2) == {nodes["a"], nodes["b"]}
    (fault,) = (
        json.loads(line.partition("RAY_DEEPEP_FAULT ")[2])
        for log in glob.glob(f"{os.environ['RAY_TMPDIR']}/ray/session_latest/logs/worker-*.out")
        for line in Path(log).read_text(errors="replace").splitlines()
        if line.startswith("RAY_DEEPEP_FAULT") and run_name(result) in line
    )
    assert (fault["cause"], fault["node_id"], fault["attempt"]) == ("node_died", doomed.node_id, 1)
    phases = {int(rank): (beacon["step"], beacon["phase"]) for rank, beacon in fault["beacons"].items()}
    assert phases == {fault["rank"]: (3, "data"), 1 - fault["rank"]: (3, "dispatch")}


def run_name(result) -> str:
    return Path(result.path).name


def test_reachable_addresses_are_found_at_once():
    with socket.create_server(("127.0.0.1", 0)) as open_port, socket.create_server(("127.0.0.1", 0)) as closed:
        free = closed.getsockname()
        closed.close()
        # An address that answers nothing, as a machine that is gone.
        addresses = {"open": open_port.getsockname(), "refused": free, "gone": ("192.0.2.1", 9)}
        begin = time.monotonic()
        assert reachable(addresses, 0.5) == {"open"}
        assert time.monotonic() - begin < 5.0
    assert reachable({}, 0.5) == set()
