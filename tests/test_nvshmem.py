"""NVSHMEM's settings, and its compiled part on a machine without a GPU: it loads, mints ids, and no call hangs."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import textwrap
import time
import types

import pytest

from ray_deepep import CommConfig, InvalidArgumentError, InvalidTypeError, NvshmemConfig, env, nvshmem
from ray_deepep.version import __version__


def nvshmem_problem() -> str:
    try:
        nvshmem.load()
    except (ImportError, OSError) as error:
        return f"no NVSHMEM core: {error}"
    return ""


needs_core = pytest.mark.skipif(bool(nvshmem_problem()), reason=nvshmem_problem())


def start(program: str, *args: str) -> subprocess.Popen[str]:
    """A process that cannot see a GPU; a fresh one, because a stuck NVSHMEM cannot be undone."""
    prelude = "import json, sys, time\nfrom ray_deepep import nvshmem\ncore = nvshmem.load()\n"
    return subprocess.Popen(
        [sys.executable, "-c", prelude + textwrap.dedent(program), *args],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME": "lo"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> dict:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err[-3000:]
    return json.loads(out.splitlines()[-1])


MINT = """
    ids = [core.make_unique_id() for _ in range(2)]
    versions = [core.built_version(), core.loaded_version()]
    print(json.dumps([*versions, core.status(), [len(i) for i in ids], ids[0] != ids[1]]))
"""
ALONE = """
    start = time.monotonic()
    try:
        core.init(core.make_unique_id(), 0, 2, -1, 1.0)
    except core.CoreBootstrapError as error:
        first = error.args
    elapsed = time.monotonic() - start
    try:
        core.init(core.make_unique_id(), 0, 2, -1, 1.0)
    except core.CoreNvshmemError as error:
        second = error.args
    print(json.dumps({"first": first, "elapsed_s": elapsed, "second": second, "abandoned": core.abandoned()}))
"""
REFUSED = """
    found = {}
    calls = {"pe": core.pe, "allocate": lambda: core.allocate(8, 1.0), "free": lambda: core.free([0], 1.0),
             "addresses": lambda: core.addresses(0, [0]), "finalize": lambda: core.finalize(1.0),
             "zero": lambda: core.allocate(0, 1.0), "rank": lambda: core.init(bytes(128), 2, 2, -1, 1.0),
             "unique_id": lambda: core.init(b"short", 0, 2, -1, 1.0)}
    for name, call in calls.items():
        try:
            call()
        except Exception as error:
            found[name] = [type(error).__name__, *error.args]
    print(json.dumps(found))
"""


@needs_core
def test_mints_unique_ids_without_a_gpu() -> None:
    built, loaded, status, sizes, different = finish(start(MINT))
    assert built == loaded and status == 0
    assert sizes == [128, 128] and different


@needs_core
def test_a_missing_rank_ends_the_wait_at_the_deadline() -> None:
    found = finish(start(ALONE))
    phase, missing, deadline_s, detail = found["first"]
    assert (phase, missing, deadline_s) == ("nvshmem_init", [], 1.0)
    assert "start a new one" in detail
    assert 1.0 <= found["elapsed_s"] < 10.0
    assert found["second"][0] == "init" and "given up (init did not return)" in found["second"][3]
    assert found["abandoned"] == "init did not return"


@needs_core
def test_ranks_that_meet_without_a_gpu_are_told() -> None:
    program = """
        print(core.make_unique_id().hex(), flush=True)
        unique_id = bytes.fromhex(sys.stdin.readline())
        try:
            core.init(unique_id, int(sys.argv[1]), 2, -1, 30.0)
        except core.CoreNvshmemError as error:
            print(json.dumps([*error.args, core.status()]))
    """
    processes = [start(program, str(rank)) for rank in range(2)]
    # Both are ready before either waits for the other.
    ids = [process.stdout.readline() for process in processes]
    for process in processes:
        process.stdin.write(ids[0])
        process.stdin.flush()
    for process in processes:
        step, code, status, reason, later = finish(process)
        assert (step, code, status, later) == ("init", 0, 1, 1)
        assert "no GPU" in reason


@needs_core
def test_calls_are_refused_where_nvshmem_would_exit() -> None:
    found = finish(start(REFUSED))
    for name in ("pe", "allocate", "free", "addresses"):
        assert found[name][0] == "CoreNvshmemError" and "not up in this process" in found[name][4]
    assert "init() was not called" in found["finalize"][4]
    assert found["zero"][:3] == ["CoreArgumentError", "bytes", "0"]
    assert found["rank"][:3] == ["CoreArgumentError", "rank", "2"]
    assert found["unique_id"][:3] == ["CoreArgumentError", "unique_id", "5 bytes"]


@needs_core
def test_ctrl_c_ends_a_wait() -> None:
    process = start("""
        import signal
        # What a shell starts in the background ignores SIGINT, and so do its children.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print("ready", flush=True)
        try:
            core.init(core.make_unique_id(), 0, 2, -1, 50.0)
        except KeyboardInterrupt:
            print(json.dumps(core.abandoned()))
    """)
    assert process.stdout.readline() == "ready\n"
    time.sleep(1.0)
    process.send_signal(2)
    assert finish(process) == "interrupted during init"


@needs_core
def test_another_thread_may_end_a_wait() -> None:
    reason, elapsed_s = finish(
        start("""
        import threading
        began = time.monotonic()
        threading.Timer(0.3, core.abandon, ["rank 1 is dead"]).start()
        try:
            core.init(core.make_unique_id(), 0, 2, -1, 50.0)
        except core.CoreNvshmemError as error:
            print(json.dumps([error.args[3], time.monotonic() - began]))
        """)
    )
    assert "given up (rank 1 is dead)" in reason
    assert elapsed_s < 10.0


@pytest.mark.parametrize(
    ("versions", "text"),
    (
        ((__version__, "3.4.5", "3.8.0"), "built for NVSHMEM 3.4.5, but 3.8.0 is loaded"),
        (("0.0.0", "3.4.5", "3.4.5"), "the NVSHMEM core is version 0.0.0"),
    ),
    ids=("library", "package"),
)
def test_other_versions_are_refused(monkeypatch: pytest.MonkeyPatch, versions: tuple[str, ...], text: str) -> None:
    package, built, loaded = versions
    core = types.SimpleNamespace(version=package, built_version=lambda: built, loaded_version=lambda: loaded)
    monkeypatch.setitem(sys.modules, "ray_deepep._nvshmem", core)
    monkeypatch.setattr(nvshmem.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=text):
        nvshmem.load()


def test_settings_become_variables() -> None:
    assert NvshmemConfig().variables() == {"NVSHMEM_DISABLE_NVLS": "1"}
    config = NvshmemConfig(
        service_level=3, hca_list=("mlx5_0:1", "mlx5_1"), ibgda=True, qp_depth=2048, symmetric_bytes=1 << 30, nvls=True
    )
    assert config.variables() == {
        "NVSHMEM_IB_SL": "3",
        "NVSHMEM_HCA_LIST": "mlx5_0:1,mlx5_1",
        "NVSHMEM_IB_ENABLE_IBGDA": "1",
        "NVSHMEM_QP_DEPTH": "2048",
        "NVSHMEM_SYMMETRIC_SIZE": "1073741824",
        "NVSHMEM_DISABLE_NVLS": "0",
    }


def test_variables_that_are_set_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NVSHMEM_IB_SL", "NVSHMEM_QP_DEPTH", "NVSHMEM_DISABLE_NVLS"):
        # Set first, so that what the call adds is taken away again.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("NVSHMEM_IB_SL", "5")
    monkeypatch.setenv("NVSHMEM_QP_DEPTH", "64")
    assert env.set_missing(NvshmemConfig(service_level=3, qp_depth=64).variables()) == {"NVSHMEM_IB_SL": "5"}
    assert os.environ["NVSHMEM_IB_SL"] == "5"
    assert os.environ["NVSHMEM_DISABLE_NVLS"] == "1"


@pytest.mark.parametrize(
    ("fields", "error", "argument"),
    (
        ({"service_level": 16}, InvalidArgumentError, "service_level"),
        ({"service_level": -1}, InvalidArgumentError, "service_level"),
        ({"service_level": "3"}, InvalidTypeError, "service_level"),
        ({"service_level": True}, InvalidTypeError, "service_level"),
        ({"qp_depth": 1000}, InvalidArgumentError, "qp_depth"),
        ({"symmetric_bytes": 0}, InvalidArgumentError, "symmetric_bytes"),
        ({"hca_list": ("mlx5_0,mlx5_1",)}, InvalidArgumentError, "hca_list"),
        ({"hca_list": "mlx5_0"}, InvalidTypeError, "hca_list"),
        ({"ibgda": 1}, InvalidTypeError, "ibgda"),
        ({"nvls": None}, InvalidTypeError, "nvls"),
    ),
    ids=str,
)
def test_bad_settings(fields: dict, error: type, argument: str) -> None:
    with pytest.raises(error) as caught:
        NvshmemConfig(**fields)
    assert caught.value.argument == argument


def test_settings_are_part_of_the_communicators() -> None:
    config = CommConfig(heap_provider="nvshmem", nvshmem=NvshmemConfig(hca_list=("mlx5_0",), service_level=1))
    assert CommConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config
    with pytest.raises(InvalidTypeError):
        CommConfig(nvshmem="mlx5_0")
    with pytest.raises(InvalidArgumentError):
        CommConfig(heap_provider="symmetric")


def test_the_environment_may_name_the_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_DEEPEP_HEAP_PROVIDER", "nvshmem")
    assert CommConfig().heap_provider == "nvshmem"
    monkeypatch.setenv("RAY_DEEPEP_HEAP_PROVIDER", "shmem")
    with pytest.raises(InvalidArgumentError, match="RAY_DEEPEP_HEAP_PROVIDER: must be auto, vmm, ipc or nvshmem"):
        CommConfig()


def test_transport_nvshmem_sets_the_heap_provider() -> None:
    config = CommConfig(transport="nvshmem")
    assert config.heap_provider == "nvshmem" and CommConfig(**dataclasses.asdict(config)) == config
    with pytest.raises(InvalidArgumentError, match="heap_provider: must be auto with transport nvshmem; got 'vmm'"):
        CommConfig(transport="nvshmem", heap_provider="vmm")
