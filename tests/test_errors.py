"""Errors: text, data, types, and the way through pickle that Ray sends them."""

from __future__ import annotations

import inspect
import json
import pickle

import pytest

from ray_deepep import errors
from ray_deepep.errors import (
    BootstrapError,
    ClosedError,
    ClusterUnreachableError,
    CommFaultError,
    CudaError,
    FaultRecord,
    HeapFullError,
    HookError,
    InvalidArgumentError,
    InvalidTypeError,
    MismatchError,
    MissingPackageError,
    NvshmemError,
    RankMaskedError,
    RayDeepEPError,
    ReceiveOverflowError,
    SharedGpuError,
    TransportUnavailableError,
    UnknownJobError,
)

RECORD = FaultRecord(
    operation="combine",
    sequence=12,
    phase="wait_published",
    cause="timeout",
    rank=0,
    peer=3,
    expected=12,
    seen=11,
    elapsed_s=2.04,
    deadline_s=2.0,
    peer_host="node7",
    peer_pid=4711,
)
EXAMPLES = (
    (RayDeepEPError("something"), Exception, "something"),
    (InvalidArgumentError("hidden", 0, "must be >= 1"), ValueError, "hidden: must be >= 1; got 0"),
    (InvalidTypeError("x", "list", "must be a torch.Tensor"), TypeError, "x: must be a torch.Tensor; got 'list'"),
    (
        MismatchError("dispatch", 2, "dtype", "float32", "bfloat16"),
        ValueError,
        "dispatch: rank 2 passed dtype=bfloat16, rank 0 passed dtype=float32",
    ),
    (
        NvshmemError("bring_up", [0, 2], "NVSHMEM is up already"),
        RuntimeError,
        "NVSHMEM bring_up on ranks 0, 2: NVSHMEM is up already",
    ),
    (
        HookError("the hook of b #2", "the hook of a #1", "a #1 was sent before"),
        RuntimeError,
        "the hook of b #2: a #1 was sent before; call the hook of a #1 first",
    ),
    (
        RankMaskedError("low_latency_dispatch", [0, 2]),
        RuntimeError,
        "low_latency_dispatch: ranks 0, 2 masked this rank and went on without it; call rejoin()",
    ),
    (ReceiveOverflowError(2, 130, 128), RuntimeError, "max_recv_tokens: rank 2 needed 130 rows; got 128"),
    (
        SharedGpuError({"GPU-1": (0, 2)}),
        RuntimeError,
        "ranks 0 and 2 use the same GPU GPU-1; give each rank a GPU of its own (num_gpus=1, use_gpu=True),"
        " or set RAY_DEEPEP_ALLOW_SHARED_GPUS=1 if it is on purpose",
    ),
    (
        HeapFullError(1024, 1536, 512, 4096),
        RuntimeError,
        "symm_empty: asked for 1024 bytes; 1536 of symm_bytes=4096 are free, the largest piece has 512",
    ),
    (CudaError("cudaMalloc: cudaErrorMemoryAllocation"), RuntimeError, "cudaMalloc: cudaErrorMemoryAllocation"),
    (
        ClusterUnreachableError("http://head:8265", "no answer within 10 s"),
        ConnectionError,
        "no Ray cluster answers at 'http://head:8265': no answer within 10 s",
    ),
    (
        UnknownJobError("b", "http://head:8265", ["a"]),
        LookupError,
        "http://head:8265 has no job 'b'; its jobs: a",
    ),
    (
        MissingPackageError("tensorboard", "TensorBoard files", "No module named 'tensorboard'"),
        ImportError,
        "TensorBoard files need the package tensorboard: pip install tensorboard (No module named 'tensorboard')",
    ),
    (ClosedError("dispatch: the buffer is closed"), RuntimeError, "dispatch: the buffer is closed"),
    (TransportUnavailableError("transport shm: two hosts"), RuntimeError, "transport shm: two hosts"),
    (
        BootstrapError("meet", [1, 3], 60.0, "port 5"),
        RuntimeError,
        "bootstrap: ranks 1, 3 did not reach 'meet' within 60 s (port 5)",
    ),
    (
        CommFaultError(RECORD),
        RuntimeError,
        "combine #12 on rank 0, wait_published: rank 3 (pid 4711 on node7) sent no signal for 2.0 s"
        " (expected signal 12, seen 11, deadline 2 s)",
    ),
)


@pytest.mark.parametrize(("error", "base", "text"), EXAMPLES, ids=lambda value: type(value).__name__)
def test_error(error: RayDeepEPError, base: type, text: str) -> None:
    assert isinstance(error, RayDeepEPError) and isinstance(error, base)
    assert str(error) == text


@pytest.mark.parametrize("error", [example[0] for example in EXAMPLES], ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_keeps_text_and_data(error: RayDeepEPError, protocol: int) -> None:
    copy = pickle.loads(pickle.dumps(error, protocol))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)


def test_every_error_has_an_example() -> None:
    public = {
        value
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, Exception) and not name.startswith("_")
    }
    assert public == {type(example[0]) for example in EXAMPLES}


def test_bootstrap_error_without_names() -> None:
    assert str(BootstrapError("meet", [], 1.5)) == "bootstrap: a rank did not reach 'meet' within 1.5 s"


def test_fault_record_is_one_line_of_json() -> None:
    text = RECORD.to_json()
    assert "\n" not in text
    assert json.loads(text)["peer_host"] == "node7"
    assert FaultRecord.from_json(text) == RECORD


@pytest.mark.parametrize(
    ("cause", "text"),
    (
        ("timeout", "rank 3 (pid 4711 on node7) sent no signal for 2.0 s"),
        ("peer_died", "the process of rank 3 (pid 4711 on node7) is gone"),
        ("peer_closed", "rank 3 (pid 4711 on node7) closed its communicator"),
        ("aborted", "rank 3 (pid 4711 on node7) aborted the communicator"),
    ),
)
def test_fault_record_says_the_cause(cause: str, text: str) -> None:
    record = FaultRecord(**{**vars(RECORD), "cause": cause})
    assert text in str(record)


def test_fault_record_of_an_unknown_process() -> None:
    record = FaultRecord(**{**vars(RECORD), "peer_host": "", "peer_pid": 0})
    assert "rank 3 sent no signal" in str(record)


def test_faults_are_immutable() -> None:
    with pytest.raises(AttributeError):
        RECORD.peer = 1
