"""Settings and fixtures of all tests."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported, here and in the processes that tests start.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
# Ray's workers, at its usual 15, would get next to nothing while another process of the tests computes.
os.environ.setdefault("RAY_worker_niceness", "0")

import pytest
from harness import TRANSPORTS, Ranks, shm_problem


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For ``pytest -n 2 --dist loadgroup``: each file is a group of its own unless it names one.

    Those that name one come first: they are the files that start Ray and take longest. Then those with slow tests.
    Of the former, those on the shared Ray come last, so that it does not run beside Rays of other files.
    """
    slow_files = {item.path for item in items if item.get_closest_marker("slow")}
    sharing_files = {item.path for item in items if "shared_ray" in getattr(item, "fixturenames", ())}

    def order(item: pytest.Item) -> tuple[bool, bool, bool]:
        ungrouped = item.get_closest_marker("xdist_group") is None
        return ungrouped, item.path in sharing_files, item.path not in slow_files

    items.sort(key=order)
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


def pytest_collection_finish(session: pytest.Session) -> None:
    """pytest-xdist 3.8 names a test's group in its id, which pytest 9.2 does not keep: files would be torn apart, and
    two processes would start Rays at once."""
    grouped = getattr(session.config.option, "loadgroup", False)
    if grouped and not all("@" in item.nodeid.rpartition("]")[2] for item in session.items):
        raise pytest.UsageError("this pytest does not keep the groups of pytest-xdist: install pytest>=8,<9.1")


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Runs a function on N processes; see ``harness.Ranks``."""
    pools = Ranks()
    yield pools
    pools.close()


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedRay:
    """A Ray with 8 CPUs and a dashboard."""

    address: str
    """``HOST:PORT``, for ``ray.init``."""
    url: str
    """Of the dashboard and of job submission."""
    folder: Path
    """Ray's own."""
    shared_memory: frozenset[str]
    """What was in /dev/shm before."""


@pytest.fixture(scope="session")
def shared_ray() -> Iterator[SharedRay]:
    """One Ray for all files that need no nodes or settings of their own: its start, and Ray Train's helpers that stay,
    take seconds. It starts where no code of ours can be found by accident, and runs until the end of the session."""
    from train.local_ray import LocalRay

    shared_memory = frozenset(os.listdir("/dev/shm"))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTHONPATH", raising=False)
        local = LocalRay(num_workers=6)
        local.__enter__()
    try:
        yield SharedRay(address=local.address, url=local.url, folder=local._folder, shared_memory=shared_memory)
    finally:
        local.close()


@pytest.fixture(scope="module")
def connected_ray(shared_ray: SharedRay) -> Iterator[SharedRay]:
    """``shared_ray``, with this process connected to it; actors find ``cluster_cases``, which they cannot import."""
    import cluster_cases
    import ray

    ray.cloudpickle.register_pickle_by_value(cluster_cases)
    ray.init(address=shared_ray.address, log_to_driver=False)
    yield shared_ray
    ray.shutdown()
    ray.cloudpickle.unregister_pickle_by_value(cluster_cases)


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> str:
    """Each transport in turn; skipped with the reason where it cannot run."""
    if request.param == "shm" and shm_problem():
        pytest.skip(shm_problem())
    return request.param
