"""Jobs on a real Ray: submitted from another folder, asked how they are, hit by a fault, and stopped."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="jobs need Ray")

from cluster_cases import attempt_details, json_in
from harness import shm_problem

from ray_deepep import run_files
from ray_deepep.cli import main
from ray_deepep.cluster.jobs import JobClient
from ray_deepep.dashboard import ANNOTATIONS, PANELS
from train.metrics import read_metrics

pytestmark = pytest.mark.xdist_group("ray")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def cluster(shared_ray, tmp_path_factory):
    """The shared Ray, asked from a folder in which no code of ours can be found by accident."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTHONPATH", raising=False)
        patch.chdir(tmp_path_factory.mktemp("elsewhere"))
        yield shared_ray


def ray_deepep(capsys, command: str, url: str, *arguments: str) -> tuple[int, str, str]:
    status = main([command, "--address", url, *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def wait_for(client: JobClient, job_id: str, condition, deadline_s: float):
    """The job's state once it meets the condition."""
    end = time.monotonic() + deadline_s
    while not condition(state := client.state(job_id)):
        assert not state.ended, f"{state}\n{client._client.get_job_logs(job_id)}"
        assert time.monotonic() < end, f"not within {deadline_s:g} s: {state}"
        time.sleep(0.5)
    return state


def workers_of(out: Path) -> list[str]:
    """Command lines of living processes that train into `out`, and of Ray Train's workers on this test's Ray."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            environment = (path.parent / "environ").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if str(out) in words or ("RayTrainWorker" in words and str(out) in environment):
            found.append(words)
    return found


def test_a_command_runs_with_what_was_asked_for(cluster, capsys):
    """The package is sent along, and so are environment and metadata; the log is shown to the end."""
    show = "import os, ray_deepep.shm as s; print(s.__file__, s.core_version()[1] or 'core', os.environ['FLAVOUR'])"
    options = ["--env", "FLAVOUR=sweet", "--metadata", "who=tests", "--num-cpus", "1", "--job-id", "shown"]
    status, out, err = ray_deepep(capsys, "submit", cluster.url, *options, "--", sys.executable, "-c", show)
    assert status == 0, out + err
    line = next(line for line in out.splitlines() if line.endswith(" sweet"))
    assert "/py_modules_files/" in line, "the copy that was sent"
    assert shm_problem() or " core " in line
    assert "shown succeeded" in out.splitlines()
    status, out, _ = ray_deepep(capsys, "status", cluster.url, "shown", "--json")
    state = json_in(out)
    assert (status, state["phase"], state["metadata"]["who"]) == (0, "succeeded", "tests")
    status, out, err = ray_deepep(capsys, "submit", cluster.url, *options, "--", "true")
    assert status == 2 and "shown" in err, "the name is taken"


def test_a_wheel_is_sent_as_the_packages_in_it(cluster, capsys, tmp_path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "some-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("from_a_wheel/__init__.py", "WORD = 'hello from a wheel'\n")
        wheel.writestr("some-1.0.dist-info/METADATA", "Requires-Dist: torch\n")
    show = "import from_a_wheel; print(from_a_wheel.WORD)"
    words = ["--ship", str(tmp_path / "some-1.0-py3-none-any.whl"), "--", sys.executable, "-c", show]
    status, out, err = ray_deepep(capsys, "submit", cluster.url, *words)
    assert status == 0, out + err
    assert "hello from a wheel" in out.splitlines()
    assert ray_deepep(capsys, "submit", cluster.url, "--ship", str(ROOT / "LICENSE"), "--", "true")[0] == 2
    (tmp_path / "bad.whl").write_text("no wheel")
    status, _, err = ray_deepep(capsys, "submit", cluster.url, "--ship", str(tmp_path / "bad.whl"), "--", "true")
    assert status == 2 and "--ship: must be a wheel" in err


def test_what_cannot_be_is_said_in_one_line(cluster, capsys):
    for command, words, message in (
        ("submit", ["--num-gpus", "3", "--", "true"], "the 1 nodes of the cluster have at most 0 GPU; got '3 GPU'"),
        ("submit", ["--resource", "tpu=1", "--", "true"], "have at most 0 tpu"),
        ("submit", ["--env", "FLAVOUR", "--", "true"], "--env: must be NAME=VALUE"),
        ("submit", ["--working-dir", "/no/such/folder", "--", "true"], "--working-dir: must be a folder"),
        ("status", ["nothing_of_that_name"], "has no job 'nothing_of_that_name'; its jobs: "),
        ("stop", ["nothing_of_that_name"], "has no job 'nothing_of_that_name'"),
        ("stop", ["shown"], "must be running; it has succeeded"),
    ):
        status, _, err = ray_deepep(capsys, command, cluster.url, *words)
        assert (status, err.count("\n")) == (2, 1)
        assert message in err


def test_a_relative_folder_is_refused_where_it_would_be_lost(cluster, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = ["--working-dir", "examples", "--", sys.executable, "-m", "train.main", "--out", "runs/x"]
    status, _, err = ray_deepep(capsys, "submit", cluster.url, *words)
    assert status == 2
    assert "out_dir: must be absolute" in err


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs") / "run"


@pytest.fixture(scope="module")
def prometheus(cluster, tmp_path_factory):
    """A Prometheus that scrapes the Ray of this file; gives its address, or None where it is not installed."""
    if shutil.which("prometheus") is None:
        yield None
        return
    folder, port = tmp_path_factory.mktemp("prometheus"), free_port()
    targets = cluster.folder / "prom_metrics_service_discovery.json"
    scrape = {"job_name": "ray", "file_sd_configs": [{"files": [str(targets)]}]}
    (folder / "prometheus.yml").write_text(
        json.dumps({"global": {"scrape_interval": "2s"}, "scrape_configs": [scrape]})
    )
    files = [f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            ["prometheus", *files, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log
        )
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait(20)


@pytest.fixture(scope="module")
def run(cluster, prometheus, out):
    """A run by module name in which a worker raised, that was restarted and trains again; its state then."""
    if shm_problem():
        pytest.skip(shm_problem())
    words = ["train.main", "--preset", "tiny", "--workers", "2", "--backend", "ray_deepep", "--steps", "100000"]
    words += ["--out", str(out), "--inject", "raise:rank=1,step=40"]
    words += ["--set", "run.checkpoint_every=20", "run.eval_every=0"]
    before = os.getcwd()
    os.chdir(ROOT)
    try:
        assert main(["submit", "--address", cluster.url, "--no-wait", "--job-id", "hit", *words]) == 0
    finally:
        os.chdir(before)
    client = JobClient(cluster.url)
    return wait_for(client, "hit", lambda state: state.restarts == 1 and state.phase == "training", 400)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_is_followed_through_a_fault(cluster, run, out, capsys):
    assert (run.num_faults, run.last_fault["cause"], run.last_fault["rank"]) == (1, "raised", 1)
    beacon = run.last_fault["beacons"]["1"]
    assert (beacon["step"], beacon["phase"]) == (40, "callbacks")
    (noted,) = (out / run_files.FAULTS).read_text().splitlines()
    assert json.loads(noted) == run.last_fault
    assert any("InjectedError" in detail for detail in attempt_details(cluster.url, "tiny-ray_deepep"))
    assert run.num_steps == 100000 and run.loss < 6 and run.tokens_per_s > 0
    described = {"preset": "tiny", "backend": "ray_deepep", "num_workers": "2", "ep_size": "2", "out_dir": str(out)}
    assert described.items() <= run.metadata.items()
    _, text, _ = ray_deepep(capsys, "status", cluster.url)
    assert any(line.split()[:2] == ["hit", "training"] and "rank 1 raised" in line for line in text.splitlines())
    assert workers_of(out)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_panel_of_the_board_has_data(run, prometheus):
    """Asked of a real Prometheus while the run goes; the fault and the restart are among the annotations."""
    if prometheus is None:
        pytest.skip("prometheus is not installed")
    queries = {panel.title: query.expr for panel in PANELS for query in panel.queries}
    queries |= {query.legend: f"last_over_time(({query.expr})[10m:2s])" for query in ANNOTATIONS}
    end = time.monotonic() + 120
    while queries:
        queries = {title: expr for title, expr in queries.items() if not ask(prometheus, expr)}
        assert time.monotonic() < end, f"no data: {queries}"
        time.sleep(1.0)
    (fault,) = ask(prometheus, "max by (run, rank, cause) (ray_deepep_faults_total)")
    assert (fault["metric"]["rank"], fault["metric"]["cause"], fault["value"][1]) == ("1", "raised", "1")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_stopped_run_leaves_a_checkpoint_and_nothing_else(cluster, run, out):
    """Stopped as the dashboard's button does, and `ray job stop`."""
    stop = urllib.request.Request(f"{cluster.url}/api/jobs/hit/stop", method="POST")
    with urllib.request.urlopen(stop, timeout=30) as answer:
        assert json.load(answer)["stopped"] is True
    client = JobClient(cluster.url)
    client.wait("hit", 120)
    state = client.state("hit")
    assert state.phase == "stopped"
    newest = max(out.glob("checkpoints/step_*"))
    assert (newest / "trainer_state.json").is_file()
    assert state.checkpoint == str(newest)
    steps = read_metrics(out / "metrics.jsonl")
    assert steps[-1].step == int(newest.name.removeprefix("step_")) == state.step < 100000
    end = time.monotonic() + 30
    while left := workers_of(out):
        assert time.monotonic() < end, left
        time.sleep(0.2)
    assert not [name for name in set(os.listdir("/dev/shm")) - cluster.shared_memory if "deepep" in name]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def ask(prometheus: str, expr: str) -> list[dict]:
    """What Prometheus answers; nothing while it comes up."""
    query = urllib.parse.urlencode({"query": expr.replace("$run", ".*")})
    try:
        with urllib.request.urlopen(f"{prometheus}/api/v1/query?{query}", timeout=20) as answer:
            return json.load(answer)["data"]["result"]
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{expr}: {error.read().decode()}") from error
    except OSError:
        return []
