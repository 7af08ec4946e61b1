"""Expert-parallel Mixture-of-Experts training on Ray: dispatch and combine in a compiled core."""

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
from .progress import Beacon, Progress
from .telemetry import CommStats
from .version import __version__
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
]
