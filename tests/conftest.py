"""Settings and fixtures of all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Before torch is imported, here and in the processes that tests start.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

import pytest
from harness import TRANSPORTS, Ranks, shm_problem


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Runs a function on N processes; see ``harness.Ranks``."""
    pools = Ranks()
    yield pools
    pools.close()


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> str:
    """Each transport in turn; skipped with the reason where it cannot run."""
    if request.param == "shm" and shm_problem():
        pytest.skip(shm_problem())
    return request.param
