"""Expert-parallel Mixture-of-Experts training on Ray: dispatch and combine in a compiled core."""

from .autograd import combine, dispatch
from .buffer import Buffer
from .communicator import Communicator
from .config import CommConfig, NvshmemConfig
from .errors import (
    BootstrapError,
    ClosedError,
    CommFaultError,
    FaultRecord,
    HeapFullError,
    InvalidArgumentError,
    InvalidTypeError,
    MismatchError,
    NvshmemError,
    RayDeepEPError,
    ReceiveOverflowError,
    SharedGpuError,
    TransportUnavailableError,
)
from .float8 import Float8Cast, Float8Rows
from .handle import CombineResult, DeviceCounts, DispatchHandle, DispatchResult, ExpertMajor, Padded, TokenMajor
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
    "DeviceCounts",
    "DispatchHandle",
    "DispatchResult",
    "ExpertMajor",
    "FaultRecord",
    "Float8Cast",
    "Float8Rows",
    "HeapFullError",
    "InvalidArgumentError",
    "InvalidTypeError",
    "MismatchError",
    "NvshmemConfig",
    "NvshmemError",
    "Padded",
    "Progress",
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
