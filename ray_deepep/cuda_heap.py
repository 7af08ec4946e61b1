"""What every buffer in GPU memory starts with: the compiled core, this rank's GPU, and where its heap comes from."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, TypeVar

import torch

from .core_errors import PublicErrors
from .errors import FaultRecord, InvalidArgumentError
from .shm import ShmDomain
from .version import __version__

if TYPE_CHECKING:
    from .nvshmem import NvshmemRuntime, SymmBlock

B = TypeVar("B")


def load_core() -> ModuleType:
    """The compiled CUDA core; ImportError where it cannot be had."""
    core = importlib.import_module("ray_deepep._cuda")
    if core.version != __version__:
        raise ImportError(f"the CUDA core is version {core.version}, the package {__version__}; build it again")
    return core


class CudaHeap:
    """The heap of one buffer."""

    def __init__(
        self,
        domain: ShmDomain,
        *,
        heap_provider: str,
        nvshmem: NvshmemRuntime | None,
        on_fault: Callable[[FaultRecord], None],
    ) -> None:
        self.core, self.errors = load_core(), PublicErrors(domain, on_fault)
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._wanted, self._nvshmem = heap_provider, nvshmem
        self._ranks = [peer.rank for peer in domain.peers]
        self._block: SymmBlock | None = None

    def make(self, num_bytes: Callable[[], int], build: Callable[[object, list[int]], B]) -> B:
        """Build a buffer of ``num_bytes()``, which is given a provider and the segments; collective."""
        with self.errors:
            self._block = self._allocate(num_bytes)
        try:
            with self.errors:
                return build(self._provider(), list(self._block.segments) if self._block else [])
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Give back memory that NVSHMEM gave; the buffer is closed."""
        if self._block is not None:
            self._nvshmem.release(self._block)
            self._block = None

    def _provider(self):
        kinds = self.core.HeapProvider
        if self._block is not None:
            return kinds.GIVEN
        vmm = self._wanted == "vmm" or (self._wanted == "auto" and self.core.vmm_supported(self.device.index))
        return kinds.VMM if vmm else kinds.IPC

    def _allocate(self, num_bytes: Callable[[], int]) -> SymmBlock | None:
        """The heap's memory, where NVSHMEM gives it; collective."""
        if self._nvshmem is None:
            return None
        if self._nvshmem.device != self.device.index:
            rule = f"must be GPU {self._nvshmem.device}, on which NVSHMEM was brought up"
            raise InvalidArgumentError("device", self.device.index, rule)
        return self._nvshmem.allocate(num_bytes(), ranks=self._ranks)
