"""Expert-parallel Mixture-of-Experts training on Ray: dispatch and combine in a compiled core."""

from .autograd import combine, dispatch
from .buffer import Buffer
from .communicator import Communicator
from .config import CommConfig
from .errors import (
    BootstrapError,
    ClosedError,
    CommFaultError,
    FaultRecord,
    InvalidArgumentError,
    InvalidTypeError,
    MismatchError,
    RayDeepEPError,
    TransportUnavailableError,
)
from .handle import CombineResult, DispatchHandle, DispatchResult, ExpertMajor, Padded, TokenMajor
from .telemetry import CommStats
from .version import __version__

__all__ = [
    "BootstrapError",
    "Buffer",
    "ClosedError",
    "CombineResult",
    "CommConfig",
    "CommFaultError",
    "CommStats",
    "Communicator",
    "DispatchHandle",
    "DispatchResult",
    "ExpertMajor",
    "FaultRecord",
    "InvalidArgumentError",
    "InvalidTypeError",
    "MismatchError",
    "Padded",
    "RayDeepEPError",
    "TokenMajor",
    "TransportUnavailableError",
    "__version__",
    "combine",
    "dispatch",
]
