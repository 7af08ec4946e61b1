"""Frozen settings of a communicator. Defaults come from the environment (see ``env.py``) when the object is made."""

from __future__ import annotations

import dataclasses

from . import env
from .errors import InvalidArgumentError

TRANSPORTS = ("auto", "cuda", "shm", "reference")
HEAP_PROVIDERS = ("auto", "vmm", "ipc")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommConfig:
    """Settings of a :class:`~ray_deepep.Communicator`; the same on every rank."""

    transport: str = dataclasses.field(default_factory=env.transport)
    """``cuda``: the CUDA core (GPUs of one NVLink domain); ``shm``: the CPU core over shared memory (one host);
    ``reference``: torch.distributed (any hosts); ``auto``: the first of these that serves all ranks."""
    deadline_s: float = dataclasses.field(default_factory=env.deadline_s)
    """Seconds that one wait inside an operation may last."""
    bootstrap_deadline_s: float = dataclasses.field(default_factory=env.bootstrap_deadline_s)
    """Seconds that bootstrap and buffer allocation wait for all ranks."""
    num_threads: int = dataclasses.field(default_factory=env.num_threads)
    """Copy threads of this rank; 0: cores of the host divided by the ranks on it."""
    num_sms: int = dataclasses.field(default_factory=env.num_sms)
    """Multiprocessors that row-moving kernels of transport ``cuda`` may use."""
    heap_provider: str = "auto"
    """How GPU memory is shared: ``vmm`` (file descriptors), ``ipc`` (CUDA IPC), or ``auto`` (vmm where supported)."""
    device_heap_gib: float = dataclasses.field(default_factory=env.device_heap_gib)
    """GPU memory that DeepSpeed's swap asks for, per buffer, GiB. It is used at once, unlike ``heap_gib``."""
    heap_gib: float = dataclasses.field(default_factory=env.heap_gib)
    """Largest address space of one rank's part of a buffer's heap, GiB. Memory is used only where rows were written."""

    allow_shared_gpus: bool = dataclasses.field(default_factory=env.allow_shared_gpus)
    """Whether ranks on the same GPU are on purpose, as in tests under MPS. If not, transport ``cuda`` warns of them,
    and a run on Ray refuses them."""

    def __post_init__(self) -> None:
        if self.transport not in TRANSPORTS:
            raise InvalidArgumentError("transport", self.transport, f"must be one of {', '.join(TRANSPORTS)}")
        for name in ("deadline_s", "bootstrap_deadline_s", "heap_gib", "device_heap_gib"):
            if not getattr(self, name) > 0:
                raise InvalidArgumentError(name, getattr(self, name), "must be > 0")
        if self.heap_provider not in HEAP_PROVIDERS:
            raise InvalidArgumentError(
                "heap_provider", self.heap_provider, f"must be one of {', '.join(HEAP_PROVIDERS)}"
            )
        if self.num_sms < 1:
            raise InvalidArgumentError("num_sms", self.num_sms, "must be >= 1")
        if self.num_threads < 0:
            raise InvalidArgumentError("num_threads", self.num_threads, "must be >= 0")
