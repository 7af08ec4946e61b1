"""A stand-in for ``ray_deepep._nvshmem``, and ranks as threads: what the bring-up decides, without NVSHMEM or a GPU."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import threading
from collections.abc import Callable
from typing import Any

from ray_deepep import BootstrapError, CommConfig
from ray_deepep.nvshmem import NvshmemRuntime

DEADLINE_S = 1.0
UNIQUE_ID = bytes(range(128))


class CoreNvshmemError(Exception):
    pass


class CoreBootstrapError(Exception):
    pass


class CoreArgumentError(Exception):
    pass


class Meeting:
    """An exchange between threads, as ``Communicator`` wants it; ``absent`` ranks never come."""

    def __init__(self, num_ranks: int, absent: tuple[int, ...] = ()) -> None:
        self.num_ranks, self.absent = num_ranks, absent
        self.phases: list[list[str]] = [[] for _ in range(num_ranks)]
        self._payloads: dict[tuple[int, str], dict[int, bytes]] = {}
        self._changed = threading.Condition()

    def of(self, rank: int) -> Callable[[str, bytes], list[bytes]]:
        def exchange(phase: str, payload: bytes) -> list[bytes]:
            self.phases[rank].append(phase)
            key = (len(self.phases[rank]), phase)
            with self._changed:
                came = self._payloads.setdefault(key, {})
                came[rank] = payload
                self._changed.notify_all()
                if not self._changed.wait_for(lambda: len(came) == self.num_ranks, DEADLINE_S):
                    raise BootstrapError(phase, sorted(set(range(self.num_ranks)) - set(came)), DEADLINE_S)
                return [came[peer] for peer in range(self.num_ranks)]

        return exchange


class FakeCore:
    """NVSHMEM of one process. ``calls`` is what was called, in order."""

    CoreNvshmemError, CoreBootstrapError, CoreArgumentError = CoreNvshmemError, CoreBootstrapError, CoreArgumentError

    def __init__(
        self,
        *,
        version: str = "3.4.5",
        status: int = 0,
        pe: int = -1,
        num_pes: int = 0,
        init_error: Exception | None = None,
    ) -> None:
        self._version, self._status, self._pe, self._num_pes = version, status, pe, num_pes
        self._init_error, self._abandoned = init_error, ""
        self.blocks: dict[int, int] = {}
        self._released: set[int] = set()
        self.calls: list[tuple[Any, ...]] = []

    def loaded_version(self) -> str:
        return self._version

    def status(self) -> int:
        return self._status

    def abandoned(self) -> str:
        return self._abandoned

    def abandon(self, reason: str) -> None:
        self._abandoned = self._abandoned or reason

    def make_unique_id(self) -> bytes:
        return UNIQUE_ID

    def init(self, unique_id: bytes, rank: int, num_ranks: int, device: int, deadline_s: float) -> None:
        self.calls.append(("init", unique_id, rank, num_ranks, device))
        if self._init_error is not None:
            raise self._init_error
        if self._status < 2:
            self._status, self._pe, self._num_pes = 2, rank, num_ranks

    def pe(self) -> int:
        return self._pe

    def num_pes(self) -> int:
        return self._num_pes

    def finalize(self, deadline_s: float) -> None:
        self.calls.append(("finalize",))
        self._status, self._pe, self._num_pes = 0, -1, 0

    def allocate(self, num_bytes: int, deadline_s: float) -> int:
        self.calls.append(("allocate", num_bytes))
        block = sum(call[0] == "allocate" for call in self.calls) - 1
        self.blocks[block] = num_bytes
        return block

    def addresses(self, block: int, pes: list[int]) -> list[int]:
        return [(block + 1) * 1000 + pe for pe in pes]

    def release(self, block: int) -> None:
        self._released.add(block)

    def released(self) -> list[int]:
        return sorted(self._released)

    def free(self, blocks: list[int], deadline_s: float) -> None:
        self.calls.append(("free", *blocks))
        for block in blocks:
            del self.blocks[block]
        self._released -= set(blocks)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankOutcome:
    """How a rank's function ended: a value or an exception."""

    value: Any = None
    error: Exception | None = None


def on_ranks(
    cores: list[FakeCore | Exception],
    function: Callable[[NvshmemRuntime], Any] = lambda runtime: runtime,
    *,
    absent: tuple[int, ...] = (),
    gone: tuple[int, ...] = (),
) -> list[RankOutcome]:
    """``function`` with the runtime of each rank, all at once. A core that is an exception cannot be loaded."""
    meeting = Meeting(len(cores), absent)

    def run(rank: int) -> RankOutcome:
        def load_core() -> Any:
            if isinstance(cores[rank], Exception):
                raise cores[rank]
            return cores[rank]

        if rank in absent:
            return RankOutcome()
        try:
            runtime = NvshmemRuntime(
                meeting.of(rank),
                rank=rank,
                num_ranks=len(cores),
                device=0,
                config=CommConfig(bootstrap_deadline_s=DEADLINE_S),
                gone=lambda: list(gone),
                load_core=load_core,
            )
            return RankOutcome(value=function(runtime))
        except Exception as error:
            return RankOutcome(error=error)

    with concurrent.futures.ThreadPoolExecutor(len(cores)) as pool:
        return list(pool.map(run, range(len(cores))))
