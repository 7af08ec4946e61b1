"""Parts of the demo and of its Ray, and what it refuses. Whole demos: test_demo_ray.py."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
from process_cases import processes_below, wait_until_gone

pytest.importorskip("ray", reason="the demo needs Ray")

from ray.job_submission import JobStatus

from ray_deepep.cluster import jobs
from ray_deepep.errors import ClusterUnreachableError, InvalidArgumentError
from train import local_ray
from train.demo import DemoOptions, main, options_from_args
from train.errors import ConfigError, DataError
from train.inject import Injection
from train.local_ray import LocalRay, LocalRayError
from train.presets import get_preset
from train.ray_jobs import JobFailedError, reason_of
from train.ray_main import RayOptions, check_resources, connect, first_step_moments, with_absolute_paths
from train.ray_worker import Attempt
from train.timeline import RecoveryTimes, StartTimes

pytestmark = pytest.mark.xdist_group("ray")
ROOT = Path(__file__).parents[1]


# Parts, without Ray


def test_command_of_a_job_quotes_what_the_user_gave(tmp_path):
    options = options_from_args(["--data", str(ROOT / "README.md"), "--out", str(tmp_path / "a b"), "--steps", "7"])
    assert "gpus" not in options.entrypoint("stock", here=False)
    command = options.entrypoint("stock", here=False)
    assert command.startswith("python -m train.ray_main ")
    assert "--backend stock --workers 2" in command
    assert options.entrypoint("stock", here=True).startswith(sys.executable)
    assert f"--out '{tmp_path}/a b/stock'" in command
    assert "--steps 7" in command
    assert "--resume" not in command


def test_an_earlier_demo_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert options_from_args([]).out == tmp_path / "runs/demo"
    (tmp_path / "runs/demo").mkdir(parents=True)
    (tmp_path / "runs/demo-2").mkdir()
    assert options_from_args([]).out == tmp_path / "runs/demo-3"


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (["--workers", "0"], ConfigError, "--workers = 0: must be at least 1"),
        (["--steps", "0"], ConfigError, "--steps = 0: must be at least 1"),
        (["--preset", "huge"], ConfigError, "preset = 'huge'"),
        (["--set", "model.ep_size"], ConfigError, "--set = 'model.ep_size': must be FIELD=VALUE"),
        (["--set", "model.ep_size=3"], ConfigError, "model.ep_size = 3: must divide"),
        (["--set", "model.experts=3"], ConfigError, "model.experts"),
        (["--resume", "nowhere"], ConfigError, "must be the folder of an earlier demo"),
        (["--data", "no/such/file"], DataError, "no such file or folder"),
    ],
)
def test_bad_arguments_are_refused_before_anything_starts(arguments, error, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=re.escape(text)):
        options_from_args(arguments)
    assert main(arguments) == 2
    assert text in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_reason_of_a_failed_job_is_its_own_error_line():
    assert reason_of(["x", "error: no data", "Traceback", ""]) == "no data"
    assert reason_of(["x", "last words", ""]) == "last words"
    assert reason_of([]) == "the job printed nothing"
    assert "no data" in str(JobFailedError("no data"))


class FakeRay:
    """Answers of Ray's job client, one a question; an exception is raised."""

    submits: ClassVar[list] = []
    logs: ClassVar[list] = []
    infos: ClassVar[list] = []

    def __init__(self, url):
        pass

    def get_address(self):
        return "http://127.0.0.1:1"

    def submit_job(self, **_):
        return self._next(self.submits)

    def get_job_info(self, job_id):
        return SimpleNamespace(status=self._next(self.infos))

    async def tail_job_logs(self, job_id):
        for chunk in self._next(self.logs):
            if isinstance(chunk, Exception):
                raise chunk
            yield chunk

    @staticmethod
    def _next(answers):
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def fake_ray(monkeypatch):
    monkeypatch.setattr(jobs, "JobSubmissionClient", FakeRay)
    return FakeRay


def test_ports_are_none_that_connections_are_given(monkeypatch):
    """A port that is free now and given away before Ray listens on it ends Ray, or leaves it without an agent."""
    given = Path("/proc/sys/net/ipv4/ip_local_port_range")
    assert local_ray._first_given_port() == (int(given.read_text().split()[0]) if given.exists() else 0)
    begin, end = local_ray._ABOVE_RAYS_WORKERS, local_ray._ABOVE_RAYS_WORKERS + 2000
    monkeypatch.setattr(local_ray, "_first_given_port", lambda: end)
    found = [port for _ in range(20) for port in local_ray._free_ports(3)]
    assert all(begin <= port < end for port in found)
    assert all(len({*found[i : i + 3]}) == 3 for i in range(0, len(found), 3))


def test_a_busy_port_is_left_out(monkeypatch):
    (port,) = local_ray._free_ports(1)
    monkeypatch.setattr(local_ray, "_ABOVE_RAYS_WORKERS", port)
    monkeypatch.setattr(local_ray, "_first_given_port", lambda: port + 2)
    with socket.create_server(("", port)):
        assert local_ray._free_ports(1) == [port + 1]


def test_where_no_such_port_is_known_any_free_one_does(monkeypatch):
    monkeypatch.setattr(local_ray, "_first_given_port", lambda: 0)
    (port,) = local_ray._free_ports(1)
    assert port > 1024


def test_a_job_is_submitted_again_while_ray_has_no_agent(fake_ray, monkeypatch):
    no_agent = RuntimeError("500: No available agent to submit job, please try again later..")
    fake_ray.submits[:] = [no_agent, "id", RuntimeError("500: no entrypoint"), no_agent]
    client, spec = jobs.JobClient("http://127.0.0.1:1"), jobs.JobSpec(command="true")
    assert client.submit(spec) == "id"
    with pytest.raises(InvalidArgumentError, match="no entrypoint"):
        client.submit(spec)
    monkeypatch.setattr(jobs, "_AGENT_S", -1.0)
    with pytest.raises(ClusterUnreachableError, match=r"no agent to run jobs with .*dashboard-agent-listen-port"):
        client.submit(spec)


def test_a_log_that_breaks_off_is_taken_up_where_it_was(fake_ray, monkeypatch):
    cut, running, done = ConnectionError("cut"), JobStatus.RUNNING, JobStatus.SUCCEEDED
    fake_ray.logs[:] = [["one\ntwo\n", cut], ["one\ntwo\nthree\n"]]
    fake_ray.infos[:] = [ConnectionError("cut too"), running, done]
    lines = []
    client = jobs.JobClient("http://127.0.0.1:1")
    assert client.follow("id", lines.append) == "SUCCEEDED"
    assert lines == ["one", "two", "three"]
    fake_ray.logs[:] = [[cut]] * jobs._LOG_ATTEMPTS
    fake_ray.infos[:] = [running] * jobs._LOG_ATTEMPTS
    with pytest.raises(ClusterUnreachableError, match="the log of id broke off 5 times: cut"):
        client.follow("id", lines.append)


def test_times_add_up_and_name_their_parts():
    start = StartTimes(
        submitted=10.0,
        driver_started=11.0,
        driver_imported=13.0,
        ray_connected=13.5,
        worker_started=17.5,
        worker_entered=25.5,
        first_step_began=27.5,
        first_step_done=27.75,
    )
    assert start.total_s == 17.75
    assert start.parts_s()["controller and placement"] == 4.0
    assert str(start).startswith("17.8 s (job start 1.0, driver imports 2.0, connect 0.5,")
    recovery = RecoveryTimes(
        fault=1.0, worker_started=2.0, worker_entered=4.0, first_step_began=8.0, first_step_done=8.5
    )
    assert list(recovery.parts_s().values()) == [1.0, 2.0, 4.0, 0.5]


def test_injections():
    assert Injection.parse("kill:rank=1,step=7") == Injection(kind="kill", rank=1, step=7)
    assert Injection.parse("slow:rank=0,step=2,seconds=1.5").seconds == 1.5
    for kind in ("stop", "raise", "hang", "oom", "assert", "node"):
        assert Injection.parse(f"{kind}:rank=0,step=2").kind == kind


@pytest.mark.parametrize(
    "text",
    ["kill", "melt:rank=1,step=7", "kill:rank=1", "kill:rank=-1,step=7", "kill:rank=1,step=0", "kill:rank=1,step=2,x=3"]
    + ["slow:rank=1,step=2", "kill:rank=1,step=2,seconds=3", "kill:rank=one,step=2"],
)
def test_bad_injections(text):
    with pytest.raises(ConfigError, match="--inject"):
        Injection.parse(text)


def test_options_of_a_run_are_checked():
    with pytest.raises(ConfigError, match="--workers = 0"):
        RayOptions(num_workers=0)
    with pytest.raises(ConfigError, match="rank must be less than --workers 2"):
        RayOptions(num_workers=2, inject=(Injection(kind="kill", rank=2, step=1),))
    for share in (0.0, 1.5, float("nan")):
        with pytest.raises(ConfigError, match=r"--gpus-per-worker = .*: must be more than 0 and at most 1"):
            RayOptions(gpus_per_worker=share)


def test_workers_get_gpus_where_there_are_enough():
    config, options = get_preset("tiny"), RayOptions(num_workers=2)
    assert not check_resources(config, options, {"CPU": 2.0})
    assert not check_resources(config, options, {"CPU": 2.0, "GPU": 1.0})
    assert check_resources(config, options, {"CPU": 2.0, "GPU": 2.0})
    assert not check_resources(config.replace(**{"run.device": "cpu"}), options, {"CPU": 2.0, "GPU": 2.0})
    with pytest.raises(ConfigError, match="needs 2 GPUs and the cluster has 1; use fewer, or let them share"):
        check_resources(config.replace(**{"run.device": "cuda"}), options, {"CPU": 2.0, "GPU": 1.0})
    with pytest.raises(ConfigError, match="needs 2 CPUs and the cluster has 1; use fewer"):
        check_resources(config, options, {"CPU": 1.0})


def test_paths_are_absolute_for_workers(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = get_preset("tiny").replace(**{"data.paths": ["a.txt"], "run.resume_from": "old", "run.out_dir": "out"})
    moved = with_absolute_paths(config)
    assert moved.data.paths == (str(tmp_path / "a.txt"),)
    assert (moved.run.resume_from, moved.run.out_dir) == (str(tmp_path / "old"), str(tmp_path / "out"))
    assert moved.data.tokenizer_file == ""


def test_a_ray_that_does_not_start_says_why(monkeypatch):
    monkeypatch.setattr(LocalRay, "_head_command", lambda *_: [sys.executable, "-c", "print('no room'); exit(3)"])
    local = LocalRay(num_workers=1)
    with pytest.raises(LocalRayError, match="Ray did not start:\nno room"):
        local.__enter__()
    assert not local._folder.exists()


def test_a_head_that_will_not_listen_is_killed_with_its_children(monkeypatch, tmp_path):
    """The watchdog ends what came from the head, even a grandchild in a session of its own that ignores SIGTERM."""
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    start_child = f"s.Popen([sys.executable, '-c', {stubborn!r}], start_new_session=True)"
    head = f"import subprocess as s, sys; {start_child}; {stubborn}"
    folder = tmp_path / "ray"
    folder.mkdir()
    command = [sys.executable, "-m", "train.local_ray", str(folder), json.dumps([sys.executable, "-c", head])]
    watchdog = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE)
    end = time.monotonic() + 20
    while len(pids := processes_below(watchdog.pid)) < 2:
        assert time.monotonic() < end
        time.sleep(0.1)
    watchdog.stdin.close()
    assert watchdog.wait(20) == 0
    assert wait_until_gone(pids, 5) == []
    assert not folder.exists()


def test_a_watchdog_that_does_not_end_is_ended(monkeypatch):
    """Its head and what came from that too, and the folder."""
    monkeypatch.setattr(local_ray, "_WATCHDOG_DEADLINE_S", 1.0)
    monkeypatch.setattr(LocalRay, "_head_command", lambda *_: [sys.executable, "-c", "import time; time.sleep(600)"])
    local = LocalRay(num_workers=1)
    local._start(0)
    end = time.monotonic() + 20
    while not (pids := processes_below(local._watchdog.pid)):
        assert time.monotonic() < end
        time.sleep(0.1)
    pids = [local._watchdog.pid, *pids]
    os.kill(local._watchdog.pid, signal.SIGSTOP)
    begin = time.monotonic()
    local.close()
    assert time.monotonic() - begin < 1.0 + 2 * local_ray._STOP_DEADLINE_S + 5.0
    assert wait_until_gone(pids, 5) == []
    assert not local._folder.exists()
    assert "watchdog of Ray did not end" in local.notes[-1]


def test_a_cluster_that_is_not_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    assert main(["--preset", "tiny", "--out", str(tmp_path / "demo")]) == 2
    assert "127.0.0.1:1" in capsys.readouterr().err


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense"])
def test_a_cluster_to_train_on_that_is_not_there(address):
    with pytest.raises(ConfigError, match=f"--address = '{address}': must be that of a running Ray cluster"):
        connect(RayOptions(address=address))


def test_an_address_that_is_none(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RAY_ADDRESS", "nonsense")
    assert main(["--preset", "tiny", "--out", str(tmp_path / "demo")]) == 2
    assert "error: RAY_ADDRESS = 'nonsense': Invalid address format" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_empty_address_is_none_set(monkeypatch, tmp_path):
    from train import demo

    class Started(Exception):
        pass

    def start(**options):
        raise Started

    monkeypatch.setenv("RAY_ADDRESS", "")
    monkeypatch.setattr(demo, "LocalRay", start)
    with pytest.raises(Started):
        main(["--preset", "tiny", "--out", str(tmp_path / "demo")])


def test_out_that_is_no_folder(tmp_path, capsys):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "demo"):
        assert main(["--preset", "tiny", "--out", str(out)]) == 2
        assert f"error: --out = '{out}': must be a folder that can be written to" in capsys.readouterr().err


def test_demo_options_know_their_steps(tmp_path):
    options = DemoOptions(
        preset="tiny", data=(), workers=2, steps=None, out=tmp_path, resume=False, backends=("stock",)
    )
    assert options.num_steps == get_preset("tiny").run.steps


def test_the_demo_sets_fields_of_both_runs(tmp_path):
    arguments = ["--preset", "tiny", "--workers", "4", "--out", str(tmp_path / "demo")]
    options = options_from_args([*arguments, "--set", "model.ep_size=2", "run.steps=5"])
    assert (options.config.model.ep_size, options.num_steps) == (2, 5)
    assert options.entrypoint("stock", here=True).endswith(" --set model.ep_size=2 run.steps=5")


def test_a_start_ends_with_the_first_attempt_that_came_to_a_step():
    failed = Attempt(started=1.0, entered=2.0)
    trained = Attempt(started=11.0, entered=12.0, first_step_began=13.0, first_step_done=14.0)
    moments = first_step_moments([failed, trained])
    assert moments == {
        "worker_started": 11.0,
        "worker_entered": 12.0,
        "first_step_began": 13.0,
        "first_step_done": 14.0,
    }
    assert first_step_moments([failed]) == {} == first_step_moments([])
