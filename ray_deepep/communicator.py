"""``Communicator``: the ranks of one EP group, brought together once and closed once.

It picks a transport that serves all ranks, and says which and why. Making one is collective. Buffers are made from it.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import secrets
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from . import cuda, nvshmem, rendezvous, shm
from .config import CommConfig
from .domains import Domains
from .errors import (
    BootstrapError,
    ClosedError,
    CommFaultError,
    FaultRecord,
    InvalidArgumentError,
    InvalidTypeError,
)
from .fault_board import FaultBoard
from .hop import HopTransport
from .hop_cuda import CudaHopTransport
from .hop_group import hang_up, hop_process_group
from .low_latency_cuda import CudaLowLatency
from .low_latency_reference import ReferenceLowLatency
from .low_latency_shm import ShmLowLatency
from .low_latency_transport import LowLatencyTransport
from .nvshmem_decisions import RankReport
from .progress import Progress
from .rank_info import Exchange, RankInfo, meet, warn_of_shared_gpus
from .reference import ReferenceTransport
from .transport import BufferGeometry, Transport
from .transport_choice import choose_domain_size, choose_transport

if TYPE_CHECKING:
    from .buffer import Buffer

logger = logging.getLogger("ray_deepep")

R = TypeVar("R")


class Communicator:
    """Ranks that dispatch and combine together.

    Use :meth:`from_process_group` under torchrun, Ray Train or DeepSpeed, or :meth:`from_exchange` anywhere else.
    A context manager; ``close()`` is not collective and never waits for a peer.
    """

    def __init__(
        self,
        exchange: Exchange,
        *,
        rank: int,
        num_ranks: int,
        config: CommConfig | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        _check_arguments(exchange, rank, num_ranks)
        self.rank, self.num_ranks = rank, num_ranks
        self.config = _config_or_default(config)
        self.group = group
        self._closed = False
        self._fault: FaultRecord | None = None
        self.progress = Progress()
        self._buffers: list[Buffer] = []
        self._domain: shm.ShmDomain | None = None
        self._nvshmem: nvshmem.NvshmemRuntime | None = None
        self._hop_group: dist.ProcessGroupGloo | None = None
        self.fault_board: FaultBoard | None = None
        self.peers = self._meet(exchange)
        wanted = self.config.transport
        domain_size = choose_domain_size(self.config.domain_size, wanted, self.peers)
        chosen, self.transport_reason = choose_transport(wanted, self.peers, domain_size)
        # NVSHMEM is where the CUDA core's memory comes from, and what joins its domains.
        self.transport = "cuda" if chosen == "nvshmem" else chosen
        self._heap_provider = "nvshmem" if chosen == "nvshmem" else self.config.heap_provider
        self.domains = Domains(
            rank=rank, num_ranks=num_ranks, domain_size=num_ranks if self.transport == "reference" else domain_size
        )
        if self.transport in ("shm", "cuda"):
            self._domain = self._connect_domain(exchange)
        if self.domains.num_nodes > 1:
            self._connect_nodes(exchange)
        if self.transport == "cuda" and self._heap_provider == "nvshmem":
            self._nvshmem = self._bring_up_nvshmem(exchange)
        log = logger.info if rank == 0 else logger.debug
        log("transport %s for %d ranks: %s", self.transport, num_ranks, self.transport_reason)
        if rank == 0 and self.transport == "cuda" and not self.config.allow_shared_gpus:
            warn_of_shared_gpus(self.peers)

    @classmethod
    def from_process_group(
        cls, group: dist.ProcessGroup | None = None, *, config: CommConfig | None = None
    ) -> Communicator:
        """Bring up the ranks of a torch process group (the default group if None); collective over it.

        Raises:
            BootstrapError: naming the ranks that did not come within ``config.bootstrap_deadline_s``.
            InvalidArgumentError: torch.distributed is not initialised, or this rank is not in the group.
        """
        if not dist.is_initialized():
            raise InvalidArgumentError("group", group, "torch.distributed must be initialised first")
        group = dist.group.WORLD if group is None else group
        rank = dist.get_rank(group)
        if rank < 0:
            raise InvalidArgumentError("group", "a group without this rank", "must contain this rank")
        config = _config_or_default(config)
        num_ranks = dist.get_world_size(group)
        exchange = rendezvous.store_exchange(group, rank, num_ranks, config.bootstrap_deadline_s)
        return cls(exchange, rank=rank, num_ranks=num_ranks, config=config, group=group)

    @classmethod
    def from_exchange(
        cls, exchange: Exchange, *, rank: int, num_ranks: int, config: CommConfig | None = None
    ) -> Communicator:
        """Bring up ranks with an exchange function of the caller's; see :data:`Exchange`."""
        return cls(exchange, rank=rank, num_ranks=num_ranks, config=config)

    @property
    def closed(self) -> bool:
        """Whether ``close()`` was called."""
        return self._closed

    @property
    def fault(self) -> FaultRecord | None:
        """The fault that ended this communicator, or None."""
        return self._fault

    @property
    def gpu(self) -> str:
        """UUID of the GPU that this rank uses; empty if its transport uses none."""
        return self.peers[self.rank].gpu if self.transport == "cuda" else ""

    def fault_records(self) -> tuple[FaultRecord, ...]:
        """Faults of this rank's buffers, also those that the thread which works has not met yet.

        For another thread, while that one waits, for a peer or for the GPU. Never raises; takes some microseconds.
        """
        found = [buffer.fault_record() for buffer in list(self._buffers)]
        records = dict.fromkeys(record for record in (self._fault, *found) if record is not None)
        return tuple(records)

    def give_up_on_gone_peers(self) -> None:
        """End waits, of GPUs too, for ranks whose process is gone; they would go on to the deadline. Local.

        For another thread, every now and then, while the one that works waits.
        """
        for buffer in list(self._buffers):
            buffer.give_up_on_gone_peers()

    def check_usable(self, operation: str) -> None:
        """Raise if the communicator is closed or has failed."""
        if self._closed:
            raise ClosedError(f"{operation}: the communicator is closed")
        if self._fault is not None:
            raise CommFaultError(self._fault)

    def mark_fault(self, record: FaultRecord) -> FaultRecord:
        """Record that an operation failed; every later call raises ``CommFaultError`` with the first record.

        Returns:
            That record. With several nodes it blames whom the first rank that failed, on any node, found to blame.
        """
        if self._fault is None:
            self._fault = record if self.fault_board is None else self.fault_board.settle(record)
            logger.error("%s", self._fault)
            if self._nvshmem is not None:
                self._nvshmem.abandon(str(record))
            if self.fault_board is not None:
                # The fault may be in another node, of which ranks that wait for this one know nothing yet.
                self._domain.close()
                if self._hop_group is not None:
                    hang_up(self._hop_group, self.domains)
        return self._fault

    def peer_is_gone(self, rank: int) -> bool:
        """Whether the process of a rank is known to have ended or left. Any thread."""
        domain = self.domains.domain_ranks
        return self._domain is not None and rank in domain and self._domain.core_domain.peer_is_gone(rank - domain[0])

    def make_transport(self, geometry: BufferGeometry) -> Transport:
        """A transport for one buffer; collective.

        Raises:
            BootstrapError: a rank did not come; over shared memory or GPUs the communicator is closed then.
        """
        self.check_usable("allocate")
        return self._allocate(lambda: self._make_transport(geometry))

    def make_low_latency(self, geometry: BufferGeometry, normal: Transport) -> LowLatencyTransport:
        """The low-latency calls of one buffer, beside its transport; collective. Raises as ``make_transport``."""
        if self.transport == "cuda" and self.domains.num_nodes == 1:
            options = self._heap_options()
            return self._allocate(lambda: CudaLowLatency(self._domain, geometry, normal, **options))
        if self.transport == "shm" and self.domains.num_nodes == 1:
            return self._allocate(lambda: ShmLowLatency(self._domain, geometry, normal, on_fault=self.mark_fault))
        return ReferenceLowLatency(self, geometry)

    def _allocate(self, make: Callable[[], R]) -> R:
        try:
            return make()
        except BootstrapError:
            if self._domain is not None:
                # A rank that comes late takes our offer for that of the next attempt; so there must be none.
                self.close()
            raise

    def adopt(self, buffer: Buffer) -> None:
        """Close ``buffer`` when the communicator closes."""
        self._buffers.append(buffer)

    def release(self, buffer: Buffer) -> None:
        """Forget a buffer that closed itself."""
        if buffer in self._buffers:
            self._buffers.remove(buffer)

    def close(self) -> None:
        """Close all buffers, then leave. Peers that still wait for this rank get a fault that names it."""
        if self._closed:
            return
        try:
            for buffer in list(self._buffers):
                buffer.close()
        finally:
            self._closed = True
            if self._domain is not None:
                self._domain.close()
            self._hop_group = None

    def finalize_nvshmem(self) -> str:
        """End NVSHMEM in this process, so that it can serve another group of ranks later; collective.

        ``close()`` does not, for it waits for nobody, and a process that ends need not. Call it before ``close()``,
        when no buffer is open on any rank and nobody else in the process uses NVSHMEM with these ranks.

        Returns:
            Empty, also where NVSHMEM is not in use; or why it was abandoned instead: a rank failed, is dead, or did
            not come. Then only a new process can use NVSHMEM.

        Raises:
            ClosedError: after ``close()``.
            InvalidArgumentError: a buffer is open.
            BootstrapError: NVSHMEM did not come back before ``config.bootstrap_deadline_s``; it is abandoned.
        """
        if self._closed:
            raise ClosedError("finalize_nvshmem: the communicator is closed")
        if self._nvshmem is None:
            return ""
        if self._buffers:
            raise InvalidArgumentError("buffers", f"{len(self._buffers)} open", "must be closed first")
        runtime, self._nvshmem = self._nvshmem, None
        return runtime.finalize(fault="" if self._fault is None else str(self._fault))

    def __enter__(self) -> Communicator:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _make_transport(self, geometry: BufferGeometry) -> Transport:
        if self.transport == "cuda" and self.domains.num_nodes > 1:
            runtime = self._heap_options()["nvshmem"]
            return CudaHopTransport(self, self._domain, geometry, num_sms=self.config.num_sms, nvshmem=runtime)
        if self.transport == "cuda":
            return cuda.CudaTransport(self._domain, geometry, num_sms=self.config.num_sms, **self._heap_options())
        if self.domains.num_nodes > 1:
            make_domain = functools.partial(shm.ShmTransport, self._domain)
            return HopTransport(self, geometry, group=self._hop_group, make_domain=make_domain)
        if self.transport == "shm":
            return shm.ShmTransport(self._domain, geometry, on_fault=self.mark_fault)
        return ReferenceTransport(self, geometry)

    def _connect_domain(self, exchange: Exchange) -> shm.ShmDomain:
        ranks = self.domains.domain_ranks
        mine = slice(ranks.start, ranks.stop)
        return shm.ShmDomain(
            lambda phase, payload: exchange(phase, payload)[mine],
            peers=self.peers[mine],
            rank=self.domains.local_rank,
            config=self.config,
        )

    def _connect_nodes(self, exchange: Exchange) -> None:
        try:
            token = exchange("connect_nodes", secrets.token_hex(8).encode())[0].decode()
            self.fault_board = FaultBoard(token, self.rank, self.peers)
            self._domain.hop_peers = tuple(self.peers[rank] for rank in self.domains.hop_ranks)
            if self.transport == "shm":
                self._hop_group = hop_process_group(token, self.domains, self.config.bootstrap_deadline_s)
        except BaseException:
            self._domain.close()
            raise

    def _heap_options(self) -> dict[str, Any]:
        if self._heap_provider == "nvshmem" and self._nvshmem is None:
            raise ClosedError("allocate: NVSHMEM was finalized; make a new communicator")
        return {
            "heap_provider": self._heap_provider,
            "nvshmem": self._nvshmem,
            "on_fault": self.mark_fault,
        }

    def _bring_up_nvshmem(self, exchange: Exchange) -> nvshmem.NvshmemRuntime:
        others = [rank for rank in range(self.num_ranks) if rank != self.rank]
        try:
            return nvshmem.NvshmemRuntime(
                exchange,
                rank=self.rank,
                num_ranks=self.num_ranks,
                device=cuda.gpu_index(),
                config=self.config,
                gone=lambda: [rank for rank in others if self.peer_is_gone(rank)],
            )
        except BaseException:
            if self.config.transport == "auto" and self.domains.num_nodes > 1 and self.rank == 0:
                logger.error("transport auto took NVSHMEM, which did not come up; transport reference does without it")
            self._domain.close()
            raise

    def _look_for_nvshmem(self) -> RankReport | None:
        """For ``auto`` only: who names a transport gets it, or an error."""
        if self.config.transport != "auto":
            return None
        if self.config.heap_provider in ("auto", "nvshmem"):
            return nvshmem.look(self.rank)[1]
        return RankReport(rank=self.rank, problem=f"heap_provider {self.config.heap_provider} was asked for")

    def _meet(self, exchange: Exchange) -> tuple[RankInfo, ...]:
        version, problem = shm.core_version()
        no_cuda = cuda.cuda_problem()
        mine = RankInfo(
            rank=self.rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            machine=shm.machine_id(),
            core=version,
            core_problem=problem,
            cuda_problem=no_cuda,
            gpu="" if no_cuda else cuda.gpu_uuid(),
            has_gpu=torch.cuda.is_available(),
            nvshmem=None if no_cuda else self._look_for_nvshmem(),
            config=dataclasses.asdict(self.config),
            has_group=self.group is not None,
        )
        return meet(exchange, mine, self.num_ranks)


def _check_arguments(exchange: object, rank: object, num_ranks: object) -> None:
    if not callable(exchange):
        raise InvalidTypeError("exchange", type(exchange).__name__, "must be a function of phase and payload")
    for name, value in (("rank", rank), ("num_ranks", num_ranks)):
        if type(value) is not int:
            raise InvalidTypeError(name, type(value).__name__, "must be an int")
    if num_ranks < 1:
        raise InvalidArgumentError("num_ranks", num_ranks, "must be >= 1")
    if not 0 <= rank < num_ranks:
        raise InvalidArgumentError("rank", rank, f"must be in [0, {num_ranks})")


def _config_or_default(config: object) -> CommConfig:
    if config is not None and not isinstance(config, CommConfig):
        raise InvalidTypeError("config", type(config).__name__, "must be a CommConfig")
    return CommConfig() if config is None else config
