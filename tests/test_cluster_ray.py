"""``ray_deepep.cluster`` over actors of a real Ray: bootstrap, supervision, doctor. Whole runs: test_train_ray.py."""

import dataclasses
import json
import os
import re
import signal
import time
from types import SimpleNamespace

import pytest

pytest.importorskip("ray", reason="ray_deepep.cluster needs Ray")

import cluster_cases
import ray
from cluster_cases import FakeWorkerGroup, json_in, new_actor
from ray.train import RunConfig
from ray.train._internal.utils import get_address_and_port
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from ray.train.v2._internal.execution.worker_group.poll import WorkerGroupPollStatus, WorkerStatus

from ray_deepep import (
    Beacon,
    BootstrapError,
    CommConfig,
    FaultRecord,
    InvalidArgumentError,
    InvalidTypeError,
    TransportUnavailableError,
)
from ray_deepep.cluster import (
    ExpertParallelConfig,
    NotBootstrappedError,
    WorkerBootstrapError,
    bootstrap,
    current,
    teardown,
)
from ray_deepep.cluster.board import BoardSender, make_board, read_board
from ray_deepep.cluster.doctor import examine_cluster, run_cluster
from ray_deepep.cluster.expert_parallel import ExpertParallelBackend
from ray_deepep.cluster.processes import ProcessId, process_state
from ray_deepep.cluster.supervision import FaultSupervisor
from ray_deepep.cluster.worker import raised_within
from ray_deepep.doctor.report import exit_code
from ray_deepep.health import HealthReport

pytestmark = pytest.mark.xdist_group("ray")
CONFIG = CommConfig(bootstrap_deadline_s=30.0, deadline_s=10.0, num_threads=1, heap_gib=1.0)
RECORD = FaultRecord(
    operation="combine",
    sequence=9,
    phase="wait_published",
    cause="timeout",
    rank=0,
    peer=1,
    expected=9,
    seen=8,
    elapsed_s=4.0,
    deadline_s=4.0,
)
SHORT = CommConfig(bootstrap_deadline_s=3.0, num_threads=1, heap_gib=1.0)


@pytest.fixture(scope="module")
def cluster(connected_ray):
    return connected_ray


@pytest.fixture(scope="module")
def actors(cluster):
    """Four actors; tests that break one replace it in the list."""
    made = [new_actor() for _ in range(4)]
    ray.get([actor.pid.remote() for actor in made], timeout=120)
    return made


# Raw actors


def test_actors_dispatch_and_combine(actors):
    ranks = bootstrap(actors, config=CONFIG)
    assert [r.world_rank for r in ranks] == [0, 1, 2, 3]
    assert {r.process.pid for r in ranks} == set(ray.get([actor.pid.remote() for actor in actors]))
    assert ray.get([actor.add_up.remote() for actor in actors], timeout=60) == [1.0, 2.0, 3.0, 4.0]
    teardown(actors)
    with pytest.raises(NotBootstrappedError):
        ray.get(actors[0].place.remote())


def test_ep_groups_of_consecutive_actors(actors):
    ranks = bootstrap(actors, config=CONFIG, ep_size=2)
    assert [(r.rank, r.ranks) for r in ranks] == [(0, (0, 1)), (1, (0, 1)), (0, (2, 3)), (1, (2, 3))]
    places = ray.get([actor.place.remote() for actor in actors])
    assert places == [(0, (0, 1), 0, 2), (1, (0, 1), 1, 2), (2, (2, 3), 0, 2), (3, (2, 3), 1, 2)]
    assert ray.get([actor.add_up.remote() for actor in actors], timeout=60) == [1.0, 2.0, 3.0, 4.0]


def test_reference_transport_over_a_process_group_of_ours(actors):
    config = CommConfig(transport="reference", bootstrap_deadline_s=30.0, deadline_s=10.0)
    ranks = bootstrap(actors, config=config, ep_size=2, process_group="gloo", timeout_s=60)
    assert {r.transport for r in ranks} == {"reference"}
    assert ray.get([actor.add_up.remote() for actor in actors], timeout=60) == [1.0, 2.0, 3.0, 4.0]
    teardown(actors)


def test_a_busy_actor_is_named_within_the_deadline(actors):
    busy = actors[2].sleep.remote(8.0)
    config = CommConfig(bootstrap_deadline_s=6.0, num_threads=1, heap_gib=1.0)  # the rendezvous starts within it too
    begin = time.monotonic()
    with pytest.raises(
        BootstrapError, match=r"rank 2 did not reach 'join' within 6 s \(rank 2, Worker, pid \d+"
    ) as info:
        bootstrap(actors, config=config)
    assert time.monotonic() - begin < config.bootstrap_deadline_s + 2.0
    assert info.value.missing == [2]
    ray.get(busy)
    bootstrap(actors, config=CONFIG)  # the others are free again, and the busy one too
    assert ray.get([actor.add_up.remote() for actor in actors], timeout=60) == [1.0, 2.0, 3.0, 4.0]


def test_a_killed_actor_is_named_by_its_peers_and_by_the_next_bootstrap(actors):
    bootstrap(actors, config=CONFIG)
    pid = ray.get(actors[1].pid.remote())
    survivors = [actors[rank] for rank in (0, 2, 3)]
    loops = [actor.dispatch_until_fault.remote() for actor in actors]
    time.sleep(1.0)
    os.kill(pid, signal.SIGKILL)
    errors = ray.get([loops[rank] for rank in (0, 2, 3)], timeout=CONFIG.deadline_s + 5)
    assert [error.record.peer for error in errors] == [1, 1, 1]
    assert {error.record.peer_pid for error in errors} == {pid}
    with pytest.raises(BootstrapError, match="rank 1 did not reach 'join'") as info:
        bootstrap(actors, config=CONFIG)
    assert info.value.missing == [1]
    assert "died" in info.value.detail
    actors[1] = new_actor()
    bootstrap(actors, config=CONFIG)
    assert ray.get([actor.add_up.remote() for actor in (actors[1], *survivors)], timeout=60) == [2.0, 1.0, 3.0, 4.0]


def test_what_an_actor_raises_comes_back_typed(actors):
    with pytest.raises(InvalidArgumentError, match="process_group"):
        bootstrap(actors, config=CONFIG, swap=True)
    # Without a process group there is nothing to fall back on, and the error says so.
    with pytest.raises(Exception, match="transport reference needs a torch process group"):
        bootstrap(actors, config=CommConfig(transport="reference", bootstrap_deadline_s=30.0))


def test_a_failed_communicator_leaves_no_process_group(actors):
    """No actor here has a GPU; the process group was made before that shows."""
    config = CommConfig(transport="cuda", bootstrap_deadline_s=30.0)
    with pytest.raises(TransportUnavailableError, match="transport cuda"):
        bootstrap(actors[:2], config=config, process_group="gloo", timeout_s=60)
    assert bootstrap(actors[:2], config=CONFIG, process_group="gloo", timeout_s=60)[0].transport == "shm"
    assert ray.get([actor.add_up.remote() for actor in actors[:2]], timeout=60) == [1.0, 2.0]
    teardown(actors[:2])


def test_an_actor_that_stops_in_torchs_bootstrap_is_named(actors):
    """Rank 0 hosts torch's store, which others ask without a deadline of torch's."""
    made = [new_actor(), actors[0]]
    pid = ray.get(made[0].pid.remote(), timeout=60)
    ray.get(made[0].__ray_call__.remote(cluster_cases.stop_in_torchs_bootstrap))
    config = CommConfig(bootstrap_deadline_s=6.0, num_threads=1, heap_gib=1.0)
    begin = time.monotonic()
    with pytest.raises(BootstrapError, match="rank 0 did not reach") as info:
        bootstrap(made, config=config, process_group="gloo", timeout_s=600)
    assert info.value.missing == [0] and f"pid {pid}" in info.value.detail
    assert time.monotonic() - begin < config.bootstrap_deadline_s + 12.0
    # The other one is free again.
    assert ray.get(made[1].pid.remote(), timeout=config.bootstrap_deadline_s + 5.0) > 0
    os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"config": "fast"}, "config: must be a CommConfig; got 'str'"),
        ({"process_group": 7}, "process_group: must be a str; got 7"),
        ({"timeout_s": "9"}, "timeout_s: must be a number; got '9'"),
        ({"swap": 1}, "swap: must be a bool or a SwapConfig; got 'int'"),
        ({"ep_size": 1.5}, "ep_size: must be an int, or None; got 1.5"),
    ],
)
def test_arguments_of_another_type_are_refused(actors, arguments, text):
    with pytest.raises(InvalidTypeError, match=re.escape(text)):
        bootstrap(actors, **({"config": CONFIG} | arguments))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda actors: 7, InvalidTypeError, "actors: must be a sequence of Ray actor handles; got 'int'"),
        (lambda actors: [], InvalidArgumentError, "actors: must name at least one actor"),
        (lambda actors: [actors[0], "a"], InvalidTypeError, "actors: must be Ray actor handles; got 'str at 1'"),
        (lambda actors: [actors[0], actors[0]], InvalidArgumentError, "actors: must be different actors"),
    ],
)
def test_bad_actors_are_refused(actors, change, error, text):
    with pytest.raises(error, match=re.escape(text)):
        bootstrap(change(actors), config=CONFIG)


def test_a_degree_that_does_not_fit_is_refused(actors):
    with pytest.raises(InvalidArgumentError, match="ep_size: must divide the world size 4; got 3"):
        bootstrap(actors, config=CONFIG, ep_size=3)


def test_current_outside_an_actor(cluster):
    with pytest.raises(NotBootstrappedError, match="ExpertParallelConfig"):
        current()


# ExpertParallelConfig without a Train run


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"ep_size": 0}, InvalidArgumentError),
        ({"ep_size": 1.5}, InvalidTypeError),
        ({"comm": {}}, InvalidTypeError),
        ({"hang_deadline_s": -1.0}, InvalidArgumentError),
        ({"init_method": "file"}, InvalidArgumentError),
        ({"fault_log": None}, InvalidTypeError),
    ],
)
def test_config_refuses_bad_fields(fields, error):
    with pytest.raises(error, match=next(iter(fields))):
        ExpertParallelConfig(**fields)


def test_a_worker_that_does_not_answer_is_named_at_start(actors):
    group = FakeWorkerGroup(actors[:2])
    # Rank 0 would else spend the three seconds on importing Ray Train.
    ray.get([group.execute_single_async(rank, get_address_and_port) for rank in range(2)], timeout=120)
    busy = actors[1].sleep.remote(5.0)
    with pytest.raises(WorkerBootstrapError, match="rank 1 did not reach 'reach' within 3 s") as info:
        ExpertParallelBackend().on_start(group, ExpertParallelConfig(comm=SHORT, swap=False))
    assert info.value.missing == [1]
    assert group.was_shut_down
    ray.get(busy)


def supervisor_of(group: FakeWorkerGroup, **config) -> FaultSupervisor:
    """A supervisor as Ray Train sets it up for the first attempt of a run."""
    supervisor = FaultSupervisor()
    context = SimpleNamespace(
        backend_config=ExpertParallelConfig(swap=False, **config), get_run_config=lambda: RunConfig(name="r")
    )
    supervisor.after_controller_start(context)
    supervisor.after_worker_group_start(group)
    ray.get(supervisor._board.read.remote(1), timeout=60)  # its process has started
    return supervisor


def told(supervisor: FaultSupervisor, **reports: HealthReport) -> WorkerGroupPollStatus:
    """What a poll of running workers finds once their health threads have sent ``r0=...`` and so on."""
    for name, report in reports.items():
        BoardSender(board=supervisor._board, attempt=1, world_rank=int(name[1:]))(report)
    status = WorkerGroupPollStatus({rank: WorkerStatus(running=True) for rank in range(2)})
    supervisor.after_worker_group_poll_status(status)
    return status


def test_a_fault_is_reported_while_every_main_thread_still_waits(actors, capsys, tmp_path):
    group = FakeWorkerGroup(actors[:2], pids=ray.get([actor.pid.remote() for actor in actors[:2]]))
    supervisor = supervisor_of(group, fault_log=str(tmp_path / "faults.jsonl"))
    quiet = HealthReport(beacon=Beacon(step=3, phase="backward", age_s=0.1))
    assert told(supervisor, r0=quiet, r1=quiet).errors == {}
    waiting = HealthReport(beacon=Beacon(step=3, phase="combine", age_s=4.1), faults=(RECORD,), gpu="GPU-0")
    late = HealthReport(beacon=Beacon(step=3, phase="data", age_s=4.2), gpu="GPU-1")
    status = told(supervisor, r0=waiting, r1=late)
    culprit = status.errors[1].culprit
    assert (culprit.world_rank, culprit.cause, culprit.reporters, culprit.gpu) == (1, "late", (0,), "GPU-1")
    line = json.loads(capsys.readouterr().out.partition("RAY_DEEPEP_FAULT ")[2])
    assert json.loads((tmp_path / "faults.jsonl").read_text()) == line
    assert (line["operation"], line["phase"], line["expected"], line["seen"]) == ("combine", "wait_published", 9, 8)
    assert line["beacons"]["1"]["phase"] == "data" and line["gpu"] == "GPU-1"
    assert line["node_id"] == ray.get_runtime_context().get_node_id()
    assert told(supervisor, r0=waiting, r1=late).errors == {}, "one fault, one report"


class GroupWithAnError(FakeWorkerGroup):
    """One whose workers tell what they raised when asked once more."""

    def execute_single_async(self, rank, function, *args):
        assert function is raised_within
        return ray.put(UserExceptionWithTraceback(MemoryError("too much"), "traceback"))


@pytest.mark.parametrize(("group_of", "cause"), [(GroupWithAnError, "out_of_memory"), (FakeWorkerGroup, "closed")])
def test_who_leaves_is_asked_why(actors, capsys, group_of, cause):
    """Rank 1 was polled between the end of its communicator and of its training function, or cannot say more."""
    group = group_of(actors[:2], pids=ray.get([actor.pid.remote() for actor in actors[:2]]))
    record = dataclasses.replace(RECORD, cause="peer_closed")
    left = HealthReport(beacon=Beacon(step=3, phase="backward", age_s=0.1))
    waited = HealthReport(beacon=Beacon(step=3, phase="combine", age_s=0.1), faults=(record,))
    assert set(told(supervisor_of(group), r0=waited, r1=left).errors) == {1}
    line = json.loads(capsys.readouterr().out.partition("RAY_DEEPEP_FAULT ")[2])
    assert (line["rank"], line["cause"]) == (1, cause)


def test_a_job_that_stands_still_is_reported(actors):
    group = FakeWorkerGroup(actors[:2], pids=ray.get([actor.pid.remote() for actor in actors[:2]]))
    supervisor = supervisor_of(group, hang_deadline_s=60.0)
    waits = HealthReport(beacon=Beacon(step=3, phase="optimizer", age_s=61.0))
    busy = HealthReport(beacon=Beacon(step=3, phase="data", age_s=59.0))
    hangs = HealthReport(beacon=Beacon(step=3, phase="data", age_s=70.0))
    assert told(supervisor, r0=waits, r1=busy).errors == {}
    culprit = told(supervisor, r0=waits, r1=hangs).errors[1].culprit
    assert (culprit.world_rank, culprit.cause) == (1, "hung")


def test_the_board_keeps_one_attempt(cluster):
    board = make_board()
    report = HealthReport(beacon=Beacon(step=1, phase="data"))
    for attempt, rank in ((1, 0), (2, 1), (1, 2)):
        BoardSender(board=board, attempt=attempt, world_rank=rank)(report)
    assert list(read_board(board, 2, 30.0)) == [1], "what an earlier attempt tells late does not count"
    assert read_board(board, 1, 30.0) == {}
    ray.kill(board, no_restart=False)
    end = time.monotonic() + 60
    while not read_board(board, 2, 1.0):  # it comes back, and the next report fills it
        assert time.monotonic() < end
        BoardSender(board=board, attempt=2, world_rank=1)(report)
    ray.kill(board)
    end = time.monotonic() + 60
    while read_board(board, 2, 1.0):  # a board that is gone is no error
        assert time.monotonic() < end
    assert read_board(None, 2, 1.0) == {}


def test_a_stopped_worker_is_found_where_no_deadline_would_find_it(actors):
    """As in a torch.distributed collective, which waits for half an hour."""
    victim = new_actor()
    pid = ray.get(victim.pid.remote())
    group = FakeWorkerGroup([actors[0], victim], pids=[ray.get(actors[0].pid.remote()), pid])
    supervisor = supervisor_of(group, comm=CommConfig(deadline_s=0.5))
    group._world_rank_to_ongoing_poll = {1: None}
    beacons = {rank: Beacon(step=3, phase=phase) for rank, phase in enumerate(("dispatch", "data"))}
    supervisor._reports = lambda: {rank: HealthReport(beacon=beacon) for rank, beacon in beacons.items()}
    os.kill(pid, signal.SIGSTOP)
    while process_state(ProcessId(node_id="", host="", pid=pid)) != "stopped":
        time.sleep(0.01)
    status = WorkerGroupPollStatus({rank: WorkerStatus(running=True) for rank in range(2)})
    supervisor.after_worker_group_poll_status(status)
    assert status.errors == {}, "a moment is no fault"
    time.sleep(0.7)
    supervisor.after_worker_group_poll_status(status)
    assert status.errors[1].culprit.cause == "stopped"
    assert status.errors[1].culprit.beacons == beacons, "the report shows what the others were doing"
    with pytest.raises(ray.exceptions.ActorDiedError):
        ray.get(victim.pid.remote(), timeout=20)


# The doctor


def test_the_doctor_examines_the_nodes_of_a_cluster(cluster, capsys):
    (node,) = examine_cluster(60.0)
    assert node.node_id == ray.get_runtime_context().get_node_id()
    assert node.finding("ray").value == ray.__version__
    assert node.finding("CPU cores").value == str(len(os.sched_getaffinity(0)))
    assert run_cluster(as_json=True, deadline_s=60.0) == exit_code(node.findings)
    report = json_in(capsys.readouterr().out)
    assert [n["node_id"] for n in report["nodes"]] == [node.node_id]
    assert report["differences"] == []
    assert ray.is_initialized(), "a connection that was there is kept"


def test_a_node_that_does_not_answer_in_time_is_a_problem(cluster):
    (node,) = examine_cluster(0.01)
    assert [finding.value for finding in node.findings] == ["did not answer within 0.01 s"]
    assert exit_code(node.findings) == 1
