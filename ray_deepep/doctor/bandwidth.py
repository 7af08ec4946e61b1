"""``ray-deepep doctor --bandwidth``: how fast rows go between all pairs of ranks of this machine, by the public API.

One process per GPU where there are two or more, else a few on CPUs. For each ordered pair, dispatch takes rows from
``source`` to ``target`` and combine takes them back, while the other ranks hold no token; first many rows, for GB/s,
then one row, for the time of a whole operation. Then all ranks at once, for the constants of ``ray-deepep plan``.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import multiprocessing
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess

import torch
import torch.distributed as dist
from tqdm import tqdm

from .. import shm
from ..buffer import Buffer
from ..communicator import Communicator
from ..config import CommConfig
from ..errors import InvalidArgumentError
from .operations import OperationTime, fitting_cases, time_operations
from .pairs import PairOutcome, PairSpeed

_NUM_BATCHES, _CALLS_PER_BATCH = 3, 6
_MAX_CPU_RANKS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairTest:
    """Settings of the test between pairs."""

    num_ranks: int | None = None
    """Processes; None: one per GPU, or as many as cores (2 to 4) on CPUs. More than GPUs: on CPUs."""
    deadline_s: float = 120.0
    """Seconds for the whole test. Then its processes are ended."""

    def __post_init__(self) -> None:
        if self.num_ranks is not None and self.num_ranks < 2:
            raise InvalidArgumentError("num_ranks", self.num_ranks, "must be >= 2")
        if not self.deadline_s > 0:
            raise InvalidArgumentError("deadline_s", self.deadline_s, "must be > 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """What every rank must know."""

    transport: str
    num_ranks: int
    hidden: int
    num_rows: int
    dtype: torch.dtype
    deadline_s: float


def measure_pairs(test: PairTest, *, num_gpus: int) -> PairOutcome:
    """Run the test in processes of its own; ends within ``test.deadline_s`` and a second. A rank that fails or is late
    is named in the outcome, not raised.

    Args:
        test: settings.
        num_gpus: GPUs that the CUDA core can use; below two, the test runs on CPUs.
    """
    plan = _choose(test, num_gpus)
    problem_, pairs, operations = "", (), ()
    with tempfile.TemporaryDirectory(prefix="ray_deepep_doctor_") as folder:
        context = multiprocessing.get_context("spawn")
        processes = [
            context.Process(target=_rank_main, args=(rank, plan, folder), daemon=True) for rank in range(plan.num_ranks)
        ]
        end = time.monotonic() + test.deadline_s
        for process in processes:
            process.start()
        try:
            problem_ = _await(processes, end, folder, test.deadline_s)
        finally:
            for process in processes:
                process.kill()
                process.join(1.0)
        if not problem_:
            answer = json.loads((pathlib.Path(folder) / "answer.json").read_text())
            pairs = tuple(PairSpeed(**pair) for pair in answer["pairs"])
            operations = tuple(OperationTime.from_json(entry) for entry in answer["operations"])
    return PairOutcome(
        transport=plan.transport,
        num_ranks=plan.num_ranks,
        row_bytes=plan.hidden * plan.dtype.itemsize,
        num_rows=plan.num_rows,
        num_cores=len(os.sched_getaffinity(0)),
        pairs=pairs,
        operations=operations,
        problem=problem_,
    )


def _choose(test: PairTest, num_gpus: int) -> _Plan:
    if num_gpus >= 2 and (test.num_ranks or 2) <= num_gpus:
        num_ranks = test.num_ranks or num_gpus
        return _Plan(
            transport="cuda",
            num_ranks=num_ranks,
            hidden=7168,
            num_rows=4096,
            dtype=torch.bfloat16,
            deadline_s=test.deadline_s,
        )
    num_ranks = test.num_ranks or min(max(len(os.sched_getaffinity(0)), 2), _MAX_CPU_RANKS)
    transport = "shm" if shm.core_version()[0] else "reference"
    return _Plan(
        transport=transport,
        num_ranks=num_ranks,
        hidden=1024,
        num_rows=2048,
        dtype=torch.float32,
        deadline_s=test.deadline_s,
    )


def _await(processes: list[BaseProcess], end: float, folder: str, deadline_s: float) -> str:
    """Empty once all have ended well, else who did not, and why."""
    while any(process.is_alive() for process in processes) and time.monotonic() < end:
        if any(process.exitcode for process in processes):
            break
        time.sleep(0.02)
    failed = [rank for rank, process in enumerate(processes) if process.exitcode]
    if failed:
        # The first to fail is the cause; its peers fail over it.
        reasons = {rank: pathlib.Path(folder) / f"error{rank}" for rank in failed}
        first = min(failed, key=lambda rank: reasons[rank].stat().st_mtime if reasons[rank].exists() else 0.0)
        said = reasons[first].read_text() if reasons[first].exists() else f"exit code {processes[first].exitcode}"
        return f"rank {first} failed: {said}"
    late = [rank for rank, process in enumerate(processes) if process.is_alive()]
    if late:
        return f"ranks {', '.join(map(str, late))} did not end within {deadline_s:g} s"
    return ""


def _rank_main(rank: int, plan: _Plan, folder: str) -> None:
    """One rank, in a process of its own."""
    try:
        # All ranks are on this machine, whatever its host name resolves to.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        torch.set_num_threads(1)
        if plan.transport == "cuda":
            torch.cuda.set_device(rank)
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=plan.num_ranks)
        answer = _measure(rank, plan)
        if rank == 0:
            (pathlib.Path(folder) / "answer.json").write_text(json.dumps(answer))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException as error:
        (pathlib.Path(folder) / f"error{rank}").write_text(f"{type(error).__name__}: {' '.join(str(error).split())}")
        os._exit(1)


def _measure(rank: int, plan: _Plan) -> dict[str, list[dict[str, object]]]:
    config = CommConfig(
        transport=plan.transport,
        deadline_s=plan.deadline_s / 2,
        bootstrap_deadline_s=plan.deadline_s / 2,
        num_threads=1,
    )
    with Communicator.from_process_group(config=config) as comm:
        row_bytes = plan.hidden * plan.dtype.itemsize
        buffer = Buffer(
            comm,
            num_experts=plan.num_ranks,
            hidden=plan.hidden,
            num_topk=1,
            max_tokens=plan.num_rows,
            symm_bytes=2 * plan.num_rows * row_bytes,
        )
        pairs = list(itertools.permutations(range(plan.num_ranks), 2))
        # In a terminal only (None): the report may go into a file.
        bar = tqdm(pairs, desc=f"pairs over {plan.transport}", leave=False, disable=True if rank else None)
        speeds = [_measure_pair(rank, plan, buffer, *pair) for pair in bar]
        buffer.close()
        cases = fitting_cases(
            transport=plan.transport, num_ranks=plan.num_ranks, hidden=plan.hidden, num_tokens=plan.num_rows
        )
        # Without a core nothing is planned for: the reference is there to be read, and its times say nothing.
        measured = plan.transport in ("cuda", "shm")
        operations = time_operations(comm, cases, dtype=plan.dtype, progress=rank == 0) if measured else []
        return {
            "pairs": [dataclasses.asdict(pair) for pair in speeds],
            "operations": [dataclasses.asdict(operation) for operation in operations],
        }


def _measure_pair(rank: int, plan: _Plan, buffer: Buffer, source: int, target: int) -> PairSpeed:
    """Collective; the same answer on every rank."""
    many = _times(buffer, plan, source, target, plan.num_rows if rank == source else 0)
    one = _times(buffer, plan, source, target, 1 if rank == source else 0)
    num_bytes = plan.num_rows * plan.hidden * plan.dtype.itemsize
    return PairSpeed(
        source=source,
        target=target,
        dispatch_gb_per_s=num_bytes / many[0] / 1e9,
        combine_gb_per_s=num_bytes / many[1] / 1e9,
        dispatch_us=one[0] * 1e6,
        combine_us=one[1] * 1e6,
    )


def _times(buffer: Buffer, plan: _Plan, source: int, target: int, num_tokens: int) -> tuple[float, float]:
    """Median seconds of a dispatch with a plan that is known, and of its combine; of the slower end."""
    device = f"cuda:{torch.cuda.current_device()}" if plan.transport == "cuda" else "cpu"
    x = buffer.symm_empty(num_tokens, plan.dtype).fill_(1.0)
    topk_idx = torch.full((num_tokens, 1), target, dtype=torch.int64, device=device)
    first = buffer.dispatch(x, topk_idx)
    rows = buffer.symm_empty(len(first.x), plan.dtype).copy_(first.x)
    dispatch = _median(lambda: buffer.dispatch(x, handle=first.handle), plan)
    combine = _median(lambda: buffer.combine(rows, first.handle), plan)
    times = torch.tensor([dispatch, combine], dtype=torch.float64)
    everyone = [torch.empty_like(times) for _ in range(plan.num_ranks)]
    dist.all_gather(everyone, times)
    both = torch.stack([everyone[source], everyone[target]]).amax(0)
    return float(both[0]), float(both[1])


def _median(run: Callable[[], object], plan: _Plan) -> float:
    """Seconds of one call. Calls go in batches: ranks leave a barrier tens of microseconds apart, and each call waits
    for its peers anyway. The first batch is a warm-up."""
    synchronize = torch.cuda.synchronize if plan.transport == "cuda" else _nothing
    samples = []
    for _ in range(1 + _NUM_BATCHES):
        synchronize()
        dist.barrier()
        start = time.perf_counter()
        for _ in range(_CALLS_PER_BATCH):
            run()
        synchronize()
        samples.append((time.perf_counter() - start) / _CALLS_PER_BATCH)
    return statistics.median(samples[1:])


def _nothing() -> None:
    """CPU operations have ended when their calls return."""
