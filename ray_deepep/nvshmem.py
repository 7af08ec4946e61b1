"""NVSHMEM behind a communicator: brought up, allocated from and left by all ranks together, or by none.

NVSHMEM (``ray_deepep._nvshmem``) has one state per process and no time-outs: a call that one rank does not make holds
the others for ever. So ranks first tell each other what they have and want, over the communicator's exchange, and
decide from that alone (``nvshmem_decisions.py``). Only then they call.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import importlib
import importlib.util
import json
import logging
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from . import env
from .errors import BootstrapError, InvalidArgumentError, NvshmemError
from .nvshmem_decisions import (
    NOT_UP,
    READY,
    BringUp,
    RankReport,
    decide_abandon,
    decide_bring_up,
    decide_frees,
    decide_initialised,
    version_problem,
)
from .version import __version__

if TYPE_CHECKING:
    from .config import CommConfig
    from .rank_info import Exchange

logger = logging.getLogger("ray_deepep")

LIBRARY = "libnvshmem_host.so.3"
INIT_SHARE = 0.75
"""Part of the bootstrap deadline that one call of NVSHMEM gets. A rank whose call failed at once waits for the others
in the exchange that follows; theirs must come to their deadline before that exchange does."""


def load() -> ModuleType:
    """The extension ``ray_deepep._nvshmem``.

    Raises:
        ImportError: it was not built, NVSHMEM's library is not there, or one is of another version than it should be.
    """
    try:
        spec = importlib.util.find_spec("nvidia.nvshmem")
    except ModuleNotFoundError:
        spec = None
    for place in (spec.submodule_search_locations or []) if spec else []:
        # By path, since a package that is installed in place does not lie beside the wheel. A library of this name
        # that torch has loaded already is taken instead, which is what is wanted: one NVSHMEM per process.
        if (library := pathlib.Path(place) / "lib" / LIBRARY).exists():
            ctypes.CDLL(str(library))
    core = importlib.import_module("ray_deepep._nvshmem")
    if core.version != __version__:
        raise ImportError(f"the NVSHMEM core is version {core.version}, the package {__version__}; build it again")
    if problem := version_problem(core.built_version(), core.loaded_version()):
        raise ImportError(problem)
    return core


def look(rank: int, load_core: Callable[[], ModuleType] = load) -> tuple[ModuleType | None, RankReport]:
    """The extension, and what this process has of NVSHMEM. Local: loads the extension, and brings nothing up."""
    try:
        core = load_core()
    except (ImportError, OSError) as error:
        return None, RankReport(rank=rank, problem=f"{error}; pip install 'ray-deepep[nvshmem]' and build")
    version, status = core.loaded_version(), core.status()
    if reason := core.abandoned():
        problem = f"its NVSHMEM was given up ({reason}); start this process again"
        return core, RankReport(rank=rank, version=version, status=status, problem=problem)
    if status >= READY:
        return core, RankReport(rank=rank, version=version, status=status, pe=core.pe(), num_pes=core.num_pes())
    return core, RankReport(rank=rank, version=version, status=status)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SymmBlock:
    """Memory of which every rank has a piece."""

    block: int
    """Its number, the same on all ranks."""
    num_bytes: int
    segments: tuple[int, ...]
    """Addresses of the ranks that were asked for, as this rank's GPU reaches them."""


class NvshmemRuntime:
    """NVSHMEM for the ranks of one communicator. Making one is collective, and so are ``allocate`` and ``finalize``.

    Args:
        exchange: the communicator's.
        rank, num_ranks: of this process in the group.
        device: index of this rank's GPU; -1 leaves the choice to NVSHMEM.
        config: of the communicator; its ``nvshmem`` settings go into the environment first.
        gone: ranks whose processes are known to have ended.
        load_core: gives the compiled core.

    Raises:
        NvshmemError: NVSHMEM is missing, of another release on some rank, up for another group, or failed.
        BootstrapError: a rank did not come, or did not come through, before the deadline.
    """

    def __init__(
        self,
        exchange: Exchange,
        *,
        rank: int,
        num_ranks: int,
        device: int,
        config: CommConfig,
        gone: Callable[[], list[int]],
        load_core: Callable[[], ModuleType] = load,
    ) -> None:
        self.rank, self.device = rank, device
        self._exchange, self._num_ranks, self._gone = exchange, num_ranks, gone
        self._deadline_s = config.bootstrap_deadline_s * INIT_SHARE
        self._num_exchanges = 0
        for name, value in env.set_missing(config.nvshmem.variables()).items():
            logger.warning("%s=%s was set already and stays; the settings ask for another value", name, value)
        core, report = look(rank, load_core)
        if rank == 0 and not report.problem and report.status == NOT_UP:
            report = _with_unique_id(core, report)
        reports = [RankReport(**r) for r in self._tell("nvshmem_bring_up", dataclasses.asdict(report))]
        plan = decide_bring_up(reports)
        assert core is not None, "decide_bring_up refuses ranks without a core"
        self._core = core
        self.joined = plan.join
        self.rank_to_pe = self._init(plan)
        log = logger.info if rank == 0 else logger.debug
        log("NVSHMEM %s %s on %d ranks", report.version, "joined" if plan.join else "brought up", num_ranks)

    def _init(self, plan: BringUp) -> tuple[int, ...]:
        """PE by rank. Where one rank failed, all give NVSHMEM up: it is up on some of them only."""
        own_error: Exception | None = None
        pe = -1
        try:
            with self._public_errors():
                # Joining counts as one more user, so that nobody else's finalize ends it under us.
                unique_id = plan.unique_id or bytes(128)
                self._core.init(unique_id, self.rank, self._num_ranks, self.device, self._deadline_s)
                pe = self._core.pe()
        except (NvshmemError, BootstrapError) as error:
            own_error = error
        try:
            return decide_initialised(self._tell("nvshmem_up", {"pe": pe, "error": str(own_error or "")}))
        except (NvshmemError, BootstrapError) as error:
            self.abandon(str(error))
            raise (own_error or error) from None

    @property
    def core(self) -> ModuleType:
        """The extension ``ray_deepep._nvshmem``."""
        return self._core

    def init_device(self) -> None:
        """Let the extension's kernels use NVSHMEM; collective. Does nothing where it was called before.

        Raises:
            NvshmemError: NVSHMEM's device side did not come up.
            BootstrapError: a rank did not come.
        """
        self.agree("init_device", {})
        with self._public_errors():
            self._core.init_device(self._deadline_s)

    def agree(self, step: str, what: Mapping[str, Any]) -> None:
        """Meet all ranks, who must say the same; collective.

        Raises:
            NvshmemError: a rank says something else.
            BootstrapError: a rank did not come.
        """
        told = self._tell(self._next_phase(step), what)
        different = [rank for rank, other in enumerate(told) if other != told[0]]
        if different:
            raise NvshmemError(step, different, f"rank 0 has {told[0]}, rank {different[0]} has {told[different[0]]}")

    def allocate(self, num_bytes: int, *, ranks: Sequence[int] | None = None) -> SymmBlock:
        """A block of ``num_bytes`` bytes on every rank; collective. What all ranks have released is freed first.

        Args:
            ranks: those whose pieces this rank's GPU must reach; None: all.

        Raises:
            MismatchError: ranks ask for different sizes.
            NvshmemError: there is no room, or a rank's memory is out of this GPU's reach.
            BootstrapError: a rank did not come.
        """
        if num_bytes < 1:
            raise InvalidArgumentError("num_bytes", num_bytes, "must be >= 1")
        request = {"num_bytes": num_bytes, "released": self._core.released()}
        frees = decide_frees(self._tell(self._next_phase("allocate"), request))
        with self._public_errors():
            if frees:
                self._core.free(frees, self._deadline_s)
            block = self._core.allocate(num_bytes, self._deadline_s)
            try:
                reached = range(self._num_ranks) if ranks is None else ranks
                segments = self._core.addresses(block, [self.rank_to_pe[rank] for rank in reached])
            except BaseException:
                self._core.release(block)
                raise
        return SymmBlock(block=block, num_bytes=num_bytes, segments=tuple(segments))

    def release(self, block: SymmBlock) -> None:
        """This rank no longer uses the block. Local; its memory is free for others after a later ``allocate``."""
        self._core.release(block.block)

    def abandon(self, reason: str) -> None:
        """Never call NVSHMEM in this process again: a rank is dead or stuck. Local, from any thread."""
        self._core.abandon(reason)

    def finalize(self, fault: str = "") -> str:
        """End NVSHMEM, so that this process can bring it up with other ranks later; collective.

        Nothing of it may be in use. A rank that has seen a ``fault``, or a dead peer, waits for nobody: it abandons.

        Returns:
            Empty, or why NVSHMEM was abandoned instead. Then only new processes can use it.

        Raises:
            BootstrapError: NVSHMEM itself did not come back in time; it is abandoned too.
        """
        reason = decide_abandon(fault=fault, gone=self._gone(), abandoned=self._core.abandoned())
        frees: list[int] = []
        if not reason:
            try:
                told = self._tell(self._next_phase("finalize"), {"num_bytes": 0, "released": self._core.released()})
                frees = decide_frees(told)
            except BootstrapError as error:
                reason = str(error)
        if reason:
            self.abandon(reason)
            logger.warning("NVSHMEM is abandoned, not finalized: %s", reason)
            return reason
        with self._public_errors():
            if frees:
                # It stays up where others in the process use it, and would keep them.
                self._core.free(frees, self._deadline_s)
            self._core.finalize(self._deadline_s)
        return ""

    def _next_phase(self, step: str) -> str:
        self._num_exchanges += 1
        return f"nvshmem_{step}_{self._num_exchanges}"

    def _tell(self, phase: str, what: Mapping[str, Any]) -> list[dict[str, Any]]:
        return [json.loads(payload) for payload in self._exchange(phase, json.dumps(what).encode())]

    @contextlib.contextmanager
    def _public_errors(self) -> Iterator[None]:
        """The core's exceptions as ray_deepep's."""
        core = self._core
        try:
            yield
        except core.CoreNvshmemError as error:
            step, code, status, reason = error.args
            raise NvshmemError(step, [self.rank], f"{reason} (code {code}, status {status})") from None
        except core.CoreBootstrapError as error:
            phase, missing, deadline_s, detail = error.args
            raise BootstrapError(phase, missing or self._gone(), deadline_s, detail) from None
        except core.CoreArgumentError as error:
            raise InvalidArgumentError(*error.args) from None


def _with_unique_id(core: ModuleType, report: RankReport) -> RankReport:
    try:
        return dataclasses.replace(report, unique_id=core.make_unique_id().hex())
    except core.CoreNvshmemError as error:
        return dataclasses.replace(report, problem=error.args[3])
