"""All environment variables of ray_deepep: the only file that reads them.

| variable | default | meaning |
|---|---|---|
| ``RAY_DEEPEP`` | ``0`` | ``1``: programs started by ``ray-deepep run`` swap DeepSpeed's MoE layers at import |
| ``RAY_DEEPEP_TRANSPORT`` | ``auto`` | ``auto``, ``cuda``, ``nvshmem``, ``shm`` or ``reference`` |
| ``RAY_DEEPEP_HEAP_PROVIDER`` | ``auto`` | how GPU memory is shared: ``auto``, ``vmm``, ``ipc`` or ``nvshmem`` |
| ``RAY_DEEPEP_NUM_SMS`` | ``24`` | multiprocessors that row-moving kernels may use |
| ``RAY_DEEPEP_LOW_LATENCY_NUM_SMS`` | ``0`` | the same for low-latency calls; 0: all, divided by ranks on the GPU |
| ``RAY_DEEPEP_DOMAIN_SIZE`` | ``0`` | ranks of a node that read each other's memory; 0: found by their machines |
| ``RAY_DEEPEP_BULK_COPY`` | ``1`` | ``0``: plain vector copies also on GPUs that have bulk copies (sm_90 up) |
| ``RAY_DEEPEP_DEADLINE_S`` | ``120`` | seconds that a collective waits for a peer before it reports a fault |
| ``RAY_DEEPEP_BOOTSTRAP_DEADLINE_S`` | ``60`` | seconds that bootstrap waits for all ranks |
| ``RAY_DEEPEP_PLACEMENT_WAIT_S`` | ``60`` | seconds that a run on Ray waits for room for its workers |
| ``RAY_DEEPEP_HANG_DEADLINE_S`` | ``0`` | seconds without progress of any rank that are a hang, on Ray; 0: none |
| ``RAY_DEEPEP_ALLOW_SHARED_GPUS`` | ``0`` | ``1``: ranks on the same GPU are no mistake (tests under MPS) |
| ``RAY_DEEPEP_TIME_GPU_CALLS`` | ``0`` | ``1``: calls are timed on GPUs too, between events |
| ``RAY_DEEPEP_NUM_THREADS`` | ``0`` | copy threads of a rank's CPU core; 0: cores of the host / ranks on it |
| ``RAY_DEEPEP_LAYOUT`` | ``padded`` | rows that DeepSpeed's experts see: ``padded`` (as stock) or ``compact`` |
| ``RAY_DEEPEP_EXPERTS`` | ``auto`` | experts run in a ``loop``, as ``grouped`` products, or ``auto``: by device |
| ``RAY_DEEPEP_GRAPHS`` | ``auto`` | layers run as CUDA graphs where they can (GPUs, training), or ``off`` |
| ``RAY_DEEPEP_COMBINE`` | ``auto`` | ``exact`` (stock's bits), ``fast`` (sums); ``auto``: fast if experts are grouped |
| ``RAY_ADDRESS`` | empty | Ray's own: the cluster that jobs go to, if none is named |
| ``RAY_TRAIN_CALLBACKS`` | empty | Ray's own: callbacks of Train runs; ours are added to it |
| ``RAY_DEEPEP_DEVICE_HEAP_GIB`` | ``4`` | most GPU memory of a DeepSpeed buffer where gates drop no token |
| ``CUDA_MPS_PIPE_DIRECTORY`` | ``/tmp/nvidia-mps`` | CUDA's own: where the MPS daemon is found |
| ``RAY_DEEPEP_HEAP_GIB`` | ``64`` | largest address space per rank and buffer; memory is used only where rows are |

NVSHMEM reads variables of its own when it comes up. ``NvshmemConfig`` fills these in where they are not set:
``NVSHMEM_IB_SL``, ``NVSHMEM_HCA_LIST``, ``NVSHMEM_IB_ENABLE_IBGDA``, ``NVSHMEM_QP_DEPTH``, ``NVSHMEM_SYMMETRIC_SIZE``,
``NVSHMEM_DISABLE_NVLS``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from typing import TypeVar

from .errors import InvalidArgumentError

T = TypeVar("T")


def _read(name: str, default: T, parse: Callable[[str], T], rule: str) -> T:
    text = os.environ.get(name)
    if text is None or text == "":
        return default
    try:
        return parse(text)
    except ValueError as error:
        raise InvalidArgumentError(name, text, rule) from error


def _choice(*allowed: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in allowed:
            raise ValueError(text)
        return text

    return parse


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError(text)
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise ValueError(text)
    return value


def _at_least(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text)
        if value < least:
            raise ValueError(text)
        return value

    return parse


def enabled() -> bool:
    """``RAY_DEEPEP``."""
    return _read("RAY_DEEPEP", "0", _choice("0", "1"), "must be 0 or 1") == "1"


def transport() -> str:
    """``RAY_DEEPEP_TRANSPORT``."""
    return _read(
        "RAY_DEEPEP_TRANSPORT",
        "auto",
        _choice("auto", "cuda", "nvshmem", "shm", "reference"),
        "must be auto, cuda, nvshmem, shm or reference",
    )


def heap_provider() -> str:
    """``RAY_DEEPEP_HEAP_PROVIDER``."""
    return _read(
        "RAY_DEEPEP_HEAP_PROVIDER",
        "auto",
        _choice("auto", "vmm", "ipc", "nvshmem"),
        "must be auto, vmm, ipc or nvshmem",
    )


def deadline_s() -> float:
    """``RAY_DEEPEP_DEADLINE_S``."""
    return _read("RAY_DEEPEP_DEADLINE_S", 120.0, _positive, "must be a positive number of seconds")


def bootstrap_deadline_s() -> float:
    """``RAY_DEEPEP_BOOTSTRAP_DEADLINE_S``."""
    return _read("RAY_DEEPEP_BOOTSTRAP_DEADLINE_S", 60.0, _positive, "must be a positive number of seconds")


def placement_wait_s() -> float:
    """``RAY_DEEPEP_PLACEMENT_WAIT_S``."""
    return _read("RAY_DEEPEP_PLACEMENT_WAIT_S", 60.0, _positive, "must be a positive number of seconds")


def hang_deadline_s() -> float:
    """``RAY_DEEPEP_HANG_DEADLINE_S``."""
    return _read("RAY_DEEPEP_HANG_DEADLINE_S", 0.0, _seconds, "must be a number of seconds >= 0")


def allow_shared_gpus() -> bool:
    """``RAY_DEEPEP_ALLOW_SHARED_GPUS``."""
    return _read("RAY_DEEPEP_ALLOW_SHARED_GPUS", "0", _choice("0", "1"), "must be 0 or 1") == "1"


def time_gpu_calls() -> bool:
    """``RAY_DEEPEP_TIME_GPU_CALLS``."""
    return _read("RAY_DEEPEP_TIME_GPU_CALLS", "0", _choice("0", "1"), "must be 0 or 1") == "1"


def num_threads() -> int:
    """``RAY_DEEPEP_NUM_THREADS``."""
    return _read("RAY_DEEPEP_NUM_THREADS", 0, _at_least(0), "must be an integer >= 0")


def num_sms() -> int:
    """``RAY_DEEPEP_NUM_SMS``."""
    return _read("RAY_DEEPEP_NUM_SMS", 24, _at_least(1), "must be an integer >= 1")


def low_latency_num_sms() -> int:
    """``RAY_DEEPEP_LOW_LATENCY_NUM_SMS``."""
    return _read("RAY_DEEPEP_LOW_LATENCY_NUM_SMS", 0, _at_least(0), "must be an integer >= 0")


def domain_size() -> int:
    """``RAY_DEEPEP_DOMAIN_SIZE``."""
    return _read("RAY_DEEPEP_DOMAIN_SIZE", 0, _at_least(0), "must be an integer >= 0")


def bulk_copy() -> bool:
    """``RAY_DEEPEP_BULK_COPY``."""
    return _read("RAY_DEEPEP_BULK_COPY", "1", _choice("0", "1"), "must be 0 or 1") == "1"


def experts() -> str:
    """``RAY_DEEPEP_EXPERTS``."""
    return _read("RAY_DEEPEP_EXPERTS", "auto", _choice("auto", "loop", "grouped"), "must be auto, loop or grouped")


def graphs() -> str:
    """``RAY_DEEPEP_GRAPHS``."""
    return _read("RAY_DEEPEP_GRAPHS", "auto", _choice("auto", "off"), "must be auto or off")


def layout() -> str:
    """``RAY_DEEPEP_LAYOUT``."""
    return _read("RAY_DEEPEP_LAYOUT", "padded", _choice("padded", "compact"), "must be padded or compact")


def combine() -> str:
    """``RAY_DEEPEP_COMBINE``."""
    return _read("RAY_DEEPEP_COMBINE", "auto", _choice("auto", "exact", "fast"), "must be auto, exact or fast")


def heap_gib() -> float:
    """``RAY_DEEPEP_HEAP_GIB``."""
    return _read("RAY_DEEPEP_HEAP_GIB", 64.0, _positive, "must be a positive number of GiB")


def device_heap_gib() -> float:
    """``RAY_DEEPEP_DEVICE_HEAP_GIB``."""
    return _read("RAY_DEEPEP_DEVICE_HEAP_GIB", 4.0, _positive, "must be a positive number of GiB")


NVSHMEM_IB_SL = "NVSHMEM_IB_SL"
NVSHMEM_HCA_LIST = "NVSHMEM_HCA_LIST"
NVSHMEM_IB_ENABLE_IBGDA = "NVSHMEM_IB_ENABLE_IBGDA"
NVSHMEM_QP_DEPTH = "NVSHMEM_QP_DEPTH"
NVSHMEM_SYMMETRIC_SIZE = "NVSHMEM_SYMMETRIC_SIZE"
NVSHMEM_DISABLE_NVLS = "NVSHMEM_DISABLE_NVLS"


def set_missing(values: Mapping[str, str]) -> dict[str, str]:
    """Set the variables that are not set. Returns those that are, with their values, where they differ from ours."""
    kept = {}
    for name, value in values.items():
        present = os.environ.setdefault(name, value)
        if present != value:
            kept[name] = present
    return kept


def ray_address() -> str:
    """``RAY_ADDRESS``."""
    return os.environ.get("RAY_ADDRESS", "")


def ray_train_callbacks() -> list[str]:
    """``RAY_TRAIN_CALLBACKS``: dotted paths of Ray Train callbacks that are already asked for."""
    return [path for path in os.environ.get("RAY_TRAIN_CALLBACKS", "").split(",") if path]


def cuda_mps_pipe_directory() -> str:
    """``CUDA_MPS_PIPE_DIRECTORY``."""
    return os.environ.get("CUDA_MPS_PIPE_DIRECTORY") or "/tmp/nvidia-mps"
