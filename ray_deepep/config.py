"""Frozen settings of a communicator. Defaults come from the environment (see ``env.py``) when the object is made."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType

from . import env
from .errors import InvalidArgumentError, InvalidTypeError
from .fields import check_bool, check_choice, check_int, check_positive, known_fields

TRANSPORTS = ("auto", "cuda", "nvshmem", "shm", "reference")
HEAP_PROVIDERS = ("auto", "vmm", "ipc", "nvshmem")
MAX_SERVICE_LEVEL = 15
"""InfiniBand has 16 service levels."""
_HCA = re.compile(r"[A-Za-z0-9_.\-]+(:[0-9]+)?")
# Months, and nearly a PiB: a wait without an end is never meant, and compiled cores count nanoseconds and bytes.
_LARGEST: Mapping[str, float] = MappingProxyType(
    {"deadline_s": 1e7, "bootstrap_deadline_s": 1e7, "heap_gib": 1e6, "device_heap_gib": 1e6}
)


@known_fields
@dataclasses.dataclass(frozen=True, kw_only=True)
class NvshmemConfig:
    """Settings that NVSHMEM reads from the environment when it comes up; used where it is, also if ``auto`` took it.

    A variable that is set already keeps its value, which is logged. None: NVSHMEM's own default.
    """

    service_level: int | None = None
    """InfiniBand service level of its traffic, 0 to 15 (``NVSHMEM_IB_SL``)."""
    hca_list: tuple[str, ...] = ()
    """Network adapters to use, each as ``name`` or ``name:port`` (``NVSHMEM_HCA_LIST``); empty: all."""
    ibgda: bool | None = None
    """Whether GPUs drive the network adapters themselves (``NVSHMEM_IB_ENABLE_IBGDA``)."""
    qp_depth: int | None = None
    """Requests that a queue pair holds (``NVSHMEM_QP_DEPTH``), a power of two."""
    symmetric_bytes: int | None = None
    """Bytes of each rank's symmetric heap (``NVSHMEM_SYMMETRIC_SIZE``)."""
    nvls: bool = False
    """Whether NVSHMEM may use NVLink multicast (``NVSHMEM_DISABLE_NVLS``). Off: it fails on hosts that are shared."""

    def __post_init__(self) -> None:
        self._check_integer("service_level", lambda v: 0 <= v <= MAX_SERVICE_LEVEL, f"in [0, {MAX_SERVICE_LEVEL}]")
        self._check_integer("qp_depth", lambda v: v >= 1 and v & (v - 1) == 0, "a power of two")
        self._check_integer("symmetric_bytes", lambda v: v >= 1, ">= 1")
        for name in ("ibgda", "nvls"):
            value = getattr(self, name)
            if not isinstance(value, bool) and not (name == "ibgda" and value is None):
                raise InvalidTypeError(name, value, "must be a bool" + (" or None" if name == "ibgda" else ""))
        if not isinstance(self.hca_list, tuple | list):
            raise InvalidTypeError("hca_list", self.hca_list, "must be a tuple of str")
        object.__setattr__(self, "hca_list", tuple(self.hca_list))
        for hca in self.hca_list:
            if not isinstance(hca, str) or not _HCA.fullmatch(hca):
                raise InvalidArgumentError("hca_list", hca, "entries must be name or name:port, such as mlx5_0:1")

    def _check_integer(self, name: str, fits: Callable[[int], bool], rule: str) -> None:
        value = getattr(self, name)
        if value is None:
            return
        if isinstance(value, bool) or not isinstance(value, int):
            raise InvalidTypeError(name, value, "must be an int or None")
        if not fits(value):
            raise InvalidArgumentError(name, value, f"must be {rule}")

    def variables(self) -> dict[str, str]:
        """Environment variables that say what these settings say."""
        wanted = {
            env.NVSHMEM_IB_SL: self.service_level,
            env.NVSHMEM_HCA_LIST: ",".join(self.hca_list) or None,
            env.NVSHMEM_IB_ENABLE_IBGDA: None if self.ibgda is None else int(self.ibgda),
            env.NVSHMEM_QP_DEPTH: self.qp_depth,
            env.NVSHMEM_SYMMETRIC_SIZE: self.symmetric_bytes,
            env.NVSHMEM_DISABLE_NVLS: int(not self.nvls),
        }
        return {name: str(value) for name, value in wanted.items() if value is not None}


@known_fields
@dataclasses.dataclass(frozen=True, kw_only=True)
class CommConfig:
    """Settings of a :class:`~ray_deepep.Communicator`; the same on every rank."""

    transport: str = dataclasses.field(default_factory=env.transport)
    """``cuda``: the CUDA core (GPUs of one NVLink domain); ``nvshmem``: the same on NVSHMEM's symmetric heap (sets
    ``heap_provider``; the communicator's transport is then ``cuda``), which also serves several nodes; ``shm``: the CPU
    core over shared memory (one host, or several); ``reference``: torch.distributed (any hosts); ``auto``: ``cuda`` for
    GPUs of one domain, ``nvshmem`` for those of several if all ranks can load it, else shm or reference: the first that
    serves all ranks. For nodes see ``domain_size``."""
    deadline_s: float = dataclasses.field(default_factory=env.deadline_s)
    """Seconds that one wait inside an operation may last."""
    bootstrap_deadline_s: float = dataclasses.field(default_factory=env.bootstrap_deadline_s)
    """Seconds that bootstrap and buffer allocation wait for all ranks."""
    num_threads: int = dataclasses.field(default_factory=env.num_threads)
    """Copy threads of this rank; 0: cores of the host divided by the ranks on it."""
    num_sms: int = dataclasses.field(default_factory=env.num_sms)
    """Multiprocessors that row-moving kernels of transport ``cuda`` may use."""
    low_latency_num_sms: int = dataclasses.field(default_factory=env.low_latency_num_sms)
    """The same for low-latency calls, whose time is what their kernels cannot do at once. 0: all multiprocessors of the
    GPU, divided by the ranks that share it."""
    domain_size: int = dataclasses.field(default_factory=env.domain_size)
    """Ranks of a node: consecutive ones that read each other's memory. Fewer than all ranks: rows go once per (token,
    node) between nodes: over torch.distributed with transport ``shm``, over NVSHMEM with ``nvshmem``. 0: all ranks, or
    those of each host where they are on several, equally many on each, one host after the other, and are CPU hosts with
    at least two ranks each, or ``nvshmem`` is asked for or taken by ``auto``. Transport ``reference`` makes no use of
    it."""
    heap_provider: str = dataclasses.field(default_factory=env.heap_provider)
    """How GPU memory is shared: ``vmm`` (file descriptors), ``ipc`` (CUDA IPC), ``nvshmem`` (NVSHMEM's symmetric heap),
    or ``auto`` (vmm where supported, else ipc; nvshmem where the transport is). With ``vmm`` and ``ipc``, transport
    ``auto`` takes no NVSHMEM."""
    nvshmem: NvshmemConfig = dataclasses.field(default_factory=NvshmemConfig)
    """Settings of NVSHMEM; only used where it is. A dict of its fields will do as well."""
    device_heap_gib: float = dataclasses.field(default_factory=env.device_heap_gib)
    """Most GPU memory, GiB, that DeepSpeed's swap gives a buffer where gates drop no token, so that nobody knows how
    many rows a rank may get. With other gates it has the room that was needed so far, whatever that is."""
    heap_gib: float = dataclasses.field(default_factory=env.heap_gib)
    """Largest address space of one rank's part of a buffer's heap, GiB. Memory is used only where rows were written."""

    time_gpu_calls: bool = dataclasses.field(default_factory=env.time_gpu_calls)
    """Whether the times in ``CommStats`` are taken on GPUs too: two events around each call, some microseconds of the
    host's time."""

    allow_shared_gpus: bool = dataclasses.field(default_factory=env.allow_shared_gpus)
    """Whether ranks on the same GPU are on purpose, as in tests under MPS. If not, transport ``cuda`` warns of them,
    and a run on Ray refuses them."""

    def __post_init__(self) -> None:
        if isinstance(self.nvshmem, dict):
            # As dataclasses.asdict leaves it.
            object.__setattr__(self, "nvshmem", NvshmemConfig(**{str(name): v for name, v in self.nvshmem.items()}))
        if not isinstance(self.nvshmem, NvshmemConfig):
            raise InvalidTypeError("nvshmem", self.nvshmem, "must be an NvshmemConfig")
        check_choice("transport", self.transport, TRANSPORTS)
        self._check_numbers()
        check_choice("heap_provider", self.heap_provider, HEAP_PROVIDERS)
        if self.transport == "nvshmem":
            if self.heap_provider not in ("auto", "nvshmem"):
                raise InvalidArgumentError("heap_provider", self.heap_provider, "must be auto with transport nvshmem")
            object.__setattr__(self, "heap_provider", "nvshmem")
        check_bool("allow_shared_gpus", self.allow_shared_gpus)
        check_bool("time_gpu_calls", self.time_gpu_calls)

    def _check_numbers(self) -> None:
        for name, largest in _LARGEST.items():
            value = getattr(self, name)
            check_positive(name, value)
            if value > largest:
                raise InvalidArgumentError(name, value, f"must be at most {largest:g}")
        check_int("num_sms", self.num_sms, least=1)
        check_int("low_latency_num_sms", self.low_latency_num_sms, least=0)
        check_int("num_threads", self.num_threads, least=0)
        check_int("domain_size", self.domain_size, least=0)
