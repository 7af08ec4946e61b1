"""Jobs without a cluster: what a log says, what an entry point is, what is refused before anything is sent."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import re
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from ray_deepep import job_log
from ray_deepep.checkout import commit_of
from ray_deepep.cli import main
from ray_deepep.entrypoint import describe, parse
from ray_deepep.errors import ClusterUnreachableError, InvalidArgumentError, UnknownJobError
from ray_deepep.report.reader import find_runs
from ray_deepep.run_state import state_of_folder, state_of_job, table

ROOT = Path(__file__).parents[1]
FAULT = {"rank": 1, "cause": "died", "text": "rank 1 (pid 7 on node-a) died"}
LOG = (
    "Running entrypoint for job x: python -m train.main",
    "\x1b[36m(RayTrainWorker pid=123, ip=10.0.0.1)\x1b[0m attempt 1 begins",
    "(RayTrainWorker pid=123) step 4/200 loss 3.2100 tokens/s 12345 validation 3.1000",
    "(RayTrainWorker pid=123) checkpoint after step 4: /runs/x/checkpoints/step_000004",
    f"(TrainController pid=9) RAY_DEEPEP_FAULT {json.dumps(FAULT)}",
    "(RayTrainWorker pid=321) attempt 2 begins",
    "(RayTrainWorker pid=321) step 7/200 loss 3.1 tokens/s 999",
)


@pytest.mark.parametrize(
    ("num_lines", "phase", "step", "restarts", "num_faults"),
    [(1, "starting", 0, 0, 0), (2, "starting", 0, 0, 0), (4, "training", 4, 0, 0)]
    + [(5, "restarting", 4, 0, 1), (6, "restarting", 4, 1, 1), (7, "training", 7, 1, 1)],
)
def test_what_a_log_says_as_it_grows(num_lines, phase, step, restarts, num_faults):
    state = state_of_job("x", "RUNNING", job_log.read(LOG[:num_lines]))
    assert (state.phase, state.step, state.restarts, state.num_faults) == (phase, step, restarts, num_faults)


def test_state_of_a_job_in_full():
    state = state_of_job("x", "RUNNING", job_log.read(LOG), metadata={"preset": "tiny"})
    assert (state.num_steps, state.loss, state.tokens_per_s, state.val_loss) == (200, 3.1, 999.0, 3.1)
    assert state.checkpoint == "/runs/x/checkpoints/step_000004"
    assert state.last_fault == FAULT
    assert json.loads(state.to_json())["metadata"] == {"preset": "tiny"}
    text = str(state)
    for part in ("step             7 of 200", "restarts         1", "rank 1 (pid 7 on node-a) died", "preset"):
        assert part in text
    assert table([state]).splitlines()[1].split() == [
        "x",
        "training",
        "7/200",
        "3.1000",
        "999",
        "1",
        "rank",
        "1",
        "died",
    ]


@pytest.mark.parametrize(
    ("status", "more", "phase", "error"),
    [
        ("PENDING", [], "pending", ""),
        ("RUNNING", ["stopping: as asked"], "stopping", ""),
        ("STOPPED", ["stopping: as asked"], "stopped", ""),
        ("SUCCEEDED", [], "succeeded", ""),
        ("FAILED", ["error: no data"], "failed", "no data"),
        ("FAILED", [], "failed", "Ray's words"),
    ],
)
def test_ends_of_a_job(status, more, phase, error):
    state = state_of_job("x", status, job_log.read([*LOG, *more]), message="Ray's words")
    assert (state.phase, state.error) == (phase, error)
    assert state.ended == (phase in ("stopped", "succeeded", "failed"))


def test_lines_that_only_look_like_it_are_left_alone():
    lines = ["a step 4/200 loss 3.2", "step up", "step x/y loss 3", "attempt two begins", "RAY_DEEPEP_FAULT {cut"]
    assert job_log.read([*lines, "RAY_DEEPEP_FAULT [1]", "step 4/9 loss nan", "", "stopping"]) == job_log.LogState()
    assert job_log.parse_step("step 4/200 loss 3.21").tokens_per_s is None


def test_lines_are_read_as_they_are_written():
    step = job_log.StepLine(step=3, num_steps=9, loss=2.5, tokens_per_s=100.0, val_loss=2.25)
    assert job_log.parse_step(str(step)) == step
    lines = [job_log.attempt_line(3), job_log.checkpoint_line(5, "/a b"), job_log.stopping_line("now")]
    state = job_log.read(lines)
    assert (state.num_attempts, state.checkpoint, state.is_stopping) == (3, "/a b", True)


def test_state_of_a_folder(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text('{"name": "tiny", "run": {"steps": 9, "backend": "stock"}}')
    steps = [{"step": n, "loss": 3.0 - n, "tokens_per_s": 10.0 * n, "time_s": 100.0 + n} for n in (1, 2)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    starts = [
        {"time_s": t, "step": 0, "environment": {"EP size": 2, "ranks": 4, "commit": "abc"}} for t in (99.0, 99.5)
    ]
    (run / "starts.jsonl").write_text("".join(json.dumps(start) + "\n" for start in starts))
    (run / "faults.jsonl").write_text(json.dumps(FAULT | {"time_s": 99.2}) + "\n")
    (found,) = find_runs([run])
    state = state_of_folder(found, now=found.last_written_s + 5)
    assert (state.phase, state.step, state.num_steps, state.loss) == ("training", 2, 9, 1.0)
    assert (state.restarts, state.num_faults, state.last_fault["cause"]) == (1, 1, "died")
    wanted = {"preset": "tiny", "backend": "stock", "ep_size": "2", "num_workers": "4", "git_sha": "abc"}
    assert state.metadata == wanted
    assert state_of_folder(found, now=found.last_written_s + 1e6).phase == "ended"


def test_status_of_a_folder_needs_no_cluster(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"run": {"steps": 9}}')
    assert main(["status", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_steps"] == 9


def test_entry_points():
    module = parse(["train.main", "--preset", "tiny"], str(ROOT))
    assert (module.module, module.root, module.arguments) == ("train.main", str(ROOT), ["--preset", "tiny"])
    assert module.command("/usr/bin/python3") == "/usr/bin/python3 -m train.main --preset tiny"
    command = parse(["--", "python", "-m", "train.main", "--out", "a b"], str(ROOT))
    assert (command.module, command.arguments) == ("train.main", ["--out", "a b"])
    assert command.command("unused") == "python -m train.main --out 'a b'"
    other = parse(["bash", "-c", "echo $HOME"], str(ROOT))
    assert (other.module, other.root, other.command("unused")) == ("", "", "bash -c 'echo $HOME'")
    with pytest.raises(InvalidArgumentError, match="entrypoint: must be a command"):
        parse(["--"], str(ROOT))


def test_a_module_describes_its_job():
    asked = ["--preset", "tiny", "--workers", "4", "--backend", "ray_deepep", "--out", "/runs/x"]
    found = describe(parse(["train.main", *asked], str(ROOT)))
    assert found == {
        "preset": "tiny",
        "backend": "ray_deepep",
        "num_workers": "4",
        "ep_size": "4",
        "out_dir": "/runs/x",
    }
    assert describe(parse(["python", "-m", "train.ray_main", *asked], str(ROOT))) == found
    assert describe(parse(["train.main", "--no-ray"], str(ROOT)))["num_workers"] == "1"


def test_a_module_without_a_description_is_not_imported(tmp_path, monkeypatch):
    (tmp_path / "my_script.py").write_text("raise SystemExit('it ran')\n")
    entry = parse(["my_script", "--lr", "1"], str(tmp_path))
    assert (entry.module, describe(entry)) == ("my_script", {})
    assert "my_script" not in sys.modules


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.main", "--preset", "huge"], "preset = 'huge': must be one of tiny, demo,"),
        (["train.main", "--workers", "3", "--set", "model.ep_size=2"], "must divide the world size 3"),
        (["train.main", "--workers", "0"], "--workers = 0: must be at least 1"),
        (["train.ray_main", "--no-such-option"], "has arguments it refuses"),
        ([], "must be a command, or a Python module"),
    ],
)
def test_what_a_module_refuses_is_not_submitted(words, message, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")  # asked, it would be another error
    assert main(["submit", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", [["submit", "--", "true"], ["status"], ["status", "x"], ["stop", "x"]])
def test_a_cluster_that_is_not_there(command, capsys):
    pytest.importorskip("ray", reason="jobs need Ray")
    where = command.index("--") if "--" in command else len(command)
    assert main([*command[:where], "--address", "http://127.0.0.1:1", *command[where:]]) == 2
    assert "no Ray cluster answers at 'http://127.0.0.1:1'" in capsys.readouterr().err


def test_a_cluster_that_takes_connections_and_never_answers(monkeypatch):
    pytest.importorskip("ray", reason="jobs need Ray")
    from ray_deepep.cluster import jobs

    monkeypatch.setattr(jobs, "_CONNECT_S", 0.5)
    mute = socket.create_server(("127.0.0.1", 0))
    with mute, pytest.raises(ClusterUnreachableError, match=r"no answer within 0\.5 s"):
        jobs.JobClient(f"http://127.0.0.1:{mute.getsockname()[1]}")


def test_resources_that_no_node_has():
    pytest.importorskip("ray", reason="jobs need Ray")
    from ray_deepep.cluster.jobs import check_resources

    nodes = [{"CPU": 4.0}, {"CPU": 2.0, "GPU": 8.0}]
    check_resources({"CPU": 2.0, "GPU": 8.0}, nodes)
    with pytest.raises(
        InvalidArgumentError, match="the 2 nodes of the cluster have at most 4 CPU, 8 GPU; got '4 CPU, 8"
    ):
        check_resources({"CPU": 4.0, "GPU": 8.0}, nodes)
    with pytest.raises(InvalidArgumentError, match="have at most 0 TPU"):
        check_resources({"TPU": 1.0}, nodes)


def test_errors_survive_the_way_between_processes():
    for error in (ClusterUnreachableError("http://x", "why"), UnknownJobError("a", "http://x", ["b", "c"])):
        copy = pickle.loads(pickle.dumps(error))
        assert (str(copy), copy.args) == (str(error), error.args)
    assert "its jobs: b, c" in str(UnknownJobError("a", "http://x", ["b", "c"]))


def test_commit_of_a_folder(tmp_path):
    assert commit_of(tmp_path) == ""
    assert commit_of(tmp_path / "missing") == ""


class PendingJob:
    """As much of Ray's client as following a job calls; the job starts after some looks."""

    def __init__(self, num_looks: int) -> None:
        self.num_looks = num_looks

    async def tail_job_logs(self, job_id):
        while self.num_looks > 0:
            await asyncio.sleep(0.01)
        yield "first line\nsecond"

    def get_job_info(self, job_id):
        from ray.job_submission import JobStatus

        self.num_looks -= 1
        ended, message = self.num_looks < 0, "waiting for the runtime environment"
        return SimpleNamespace(status=JobStatus.SUCCEEDED if ended else JobStatus.PENDING, message=message)


def test_a_job_that_does_not_start_says_what_ray_says(monkeypatch):
    pytest.importorskip("ray", reason="jobs need Ray")
    from ray_deepep.cluster import jobs

    monkeypatch.setattr(jobs, "_PENDING_S", 0.02)
    client = jobs.JobClient.__new__(jobs.JobClient)
    client._client, client.url = PendingJob(num_looks=2), "http://127.0.0.1:1"
    lines: list[str] = []
    assert client.follow("job-7", lines.append) == "SUCCEEDED"
    *waiting, first, second = lines
    assert (first, second) == ("first line", "second")
    assert len(waiting) == 2
    assert all(re.fullmatch(r"waiting: job-7 has not started after \d+ s: waiting for .* env.*", s) for s in waiting)


def test_jobs_of_this_machine_find_what_this_process_finds(monkeypatch, tmp_path):
    """Ray itself may have been found through PYTHONPATH."""
    pytest.importorskip("ray", reason="jobs need Ray")
    from ray_deepep.cluster import jobs
    from train.ray_jobs import JobRunner

    specs = []

    class Client:
        url, head_is_here = "http://127.0.0.1:1", True

        def __init__(self, url):
            pass

        def submit(self, spec):
            specs.append(spec)
            return "job"

        def follow(self, job_id, keep):
            keep('TRAIN_RESULT {"ok": 1}')
            return "SUCCEEDED"

    monkeypatch.setattr(jobs, "JobClient", Client)
    monkeypatch.setenv("PYTHONPATH", "/somewhere/site")
    assert JobRunner("http://127.0.0.1:1", local=True).run("true", tmp_path / "log", print) == {"ok": 1}
    assert specs[0].runtime_env["env_vars"]["PYTHONPATH"].split(os.pathsep) == [str(ROOT), "/somewhere/site"]
