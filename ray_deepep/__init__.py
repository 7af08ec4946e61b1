"""Expert-parallel Mixture-of-Experts training on Ray: dispatch and combine in a compiled core.

Names are loaded when first used: programs that need only a part, such as the log of a job, do not wait for torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .lazy_names import lazy_getattr
from .version import __version__

if TYPE_CHECKING:
    from .autograd import combine, dispatch
    from .buffer import Buffer
    from .communicator import Communicator
    from .config import CommConfig, NvshmemConfig
    from .errors import (
        BootstrapError,
        ClosedError,
        CommFaultError,
        CudaError,
        FaultRecord,
        HeapFullError,
        HookError,
        InvalidArgumentError,
        InvalidTypeError,
        MismatchError,
        NvshmemError,
        RankMaskedError,
        RayDeepEPError,
        ReceiveOverflowError,
        SharedGpuError,
        TransportUnavailableError,
    )
    from .float8 import Float8Cast, Float8Rows
    from .handle import CombineResult, DeviceCounts, DispatchHandle, DispatchResult, ExpertMajor, Padded, TokenMajor
    from .low_latency import (
        ExpertBlocks,
        LayoutRanges,
        LowLatencyCombineResult,
        LowLatencyDispatchResult,
        LowLatencyHandle,
        LowLatencyStats,
    )
    from .overlap import leave_sms
    from .progress import Beacon, Progress
    from .telemetry import CommStats
    from .work import Work

__all__ = [
    "Beacon",
    "BootstrapError",
    "Buffer",
    "ClosedError",
    "CombineResult",
    "CommConfig",
    "CommFaultError",
    "CommStats",
    "Communicator",
    "CudaError",
    "DeviceCounts",
    "DispatchHandle",
    "DispatchResult",
    "ExpertBlocks",
    "ExpertMajor",
    "FaultRecord",
    "Float8Cast",
    "Float8Rows",
    "HeapFullError",
    "HookError",
    "InvalidArgumentError",
    "InvalidTypeError",
    "LayoutRanges",
    "LowLatencyCombineResult",
    "LowLatencyDispatchResult",
    "LowLatencyHandle",
    "LowLatencyStats",
    "MismatchError",
    "NvshmemConfig",
    "NvshmemError",
    "Padded",
    "Progress",
    "RankMaskedError",
    "RayDeepEPError",
    "ReceiveOverflowError",
    "SharedGpuError",
    "TokenMajor",
    "TransportUnavailableError",
    "Work",
    "__version__",
    "combine",
    "dispatch",
    "leave_sms",
]

_NAMES_OF = {
    "autograd": ("combine", "dispatch"),
    "buffer": ("Buffer",),
    "communicator": ("Communicator",),
    "config": ("CommConfig", "NvshmemConfig"),
    "errors": (
        "BootstrapError",
        "ClosedError",
        "CommFaultError",
        "CudaError",
        "FaultRecord",
        "HeapFullError",
        "HookError",
        "InvalidArgumentError",
        "InvalidTypeError",
        "MismatchError",
        "NvshmemError",
        "RankMaskedError",
        "RayDeepEPError",
        "ReceiveOverflowError",
        "SharedGpuError",
        "TransportUnavailableError",
    ),
    "float8": ("Float8Cast", "Float8Rows"),
    "handle": (
        "CombineResult",
        "DeviceCounts",
        "DispatchHandle",
        "DispatchResult",
        "ExpertMajor",
        "Padded",
        "TokenMajor",
    ),
    "low_latency": (
        "ExpertBlocks",
        "LayoutRanges",
        "LowLatencyCombineResult",
        "LowLatencyDispatchResult",
        "LowLatencyHandle",
        "LowLatencyStats",
    ),
    "overlap": ("leave_sms",),
    "progress": ("Beacon", "Progress"),
    "telemetry": ("CommStats",),
    "work": ("Work",),
}
__getattr__ = lazy_getattr(__name__, _NAMES_OF)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
