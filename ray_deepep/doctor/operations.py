"""How long operations of all ranks at once take: constants for ``ray-deepep plan``, by the public API.

Every rank dispatches tokens with uniform routing and combines them again. Cases differ in one thing at a time (size,
staging, routing that is new, layout), so that each constant is a difference of two of them. Cases take turns, round
after round; what counts is the lower quartile of the rounds, because other programs only add time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from ..buffer import Buffer
from ..communicator import Communicator
from ..handle import ExpertMajor, TokenMajor

NUM_ROUNDS, _CALLS = 8, 3
_EXPERTS_PER_RANK, _NUM_TOPK = 8, 4
_LOW_LATENCY_TOKENS = (1, 32, 128)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OperationCase:
    """One dispatch and its combine; sizes per rank."""

    num_tokens: int
    hidden: int
    num_topk: int
    num_experts: int
    layout: str = "token_major"
    """``token_major`` or ``expert_major``."""
    reduce: str = "fast"
    rows_in_heap: bool = True
    """Whether tokens and expert outputs lie in tensors of ``symm_empty``."""
    new_routing: bool = False
    """Whether the dispatch plans anew."""
    low_latency: bool = False
    """Whether it is a pair of low-latency calls; in bfloat16, for which the CPU core keeps outputs ready."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OperationTime:
    """What a case took: us of a call, of the slowest rank."""

    case: OperationCase
    dispatch_us: float
    combine_us: float

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> OperationTime:
        """From what ``dataclasses.asdict`` made of one."""
        return cls(**entry | {"case": OperationCase(**entry["case"])})


def fitting_cases(*, transport: str, num_ranks: int, hidden: int, num_tokens: int) -> list[OperationCase]:
    """Cases from which ``ray-deepep plan`` gets its constants; ``num_tokens`` is the largest."""
    base = OperationCase(
        num_tokens=num_tokens, hidden=hidden, num_topk=_NUM_TOPK, num_experts=_EXPERTS_PER_RANK * num_ranks
    )
    cases = [dataclasses.replace(base, num_tokens=n) for n in (1, num_tokens // 16, num_tokens // 4, num_tokens)]
    cases.append(dataclasses.replace(base, rows_in_heap=False))
    cases.append(dataclasses.replace(base, new_routing=True))
    if transport == "cuda":
        # On GPUs token-major rows wait for the link; rows that land several times show the GPU's own memory.
        cases += [dataclasses.replace(base, layout="expert_major", reduce=reduce) for reduce in ("fast", "exact")]
        # What staging a row costs beside its bytes.
        cases.append(dataclasses.replace(base, hidden=hidden // 2, rows_in_heap=False))
    else:
        cases += [dataclasses.replace(base, low_latency=True, num_tokens=n) for n in _LOW_LATENCY_TOKENS]
    return cases


def time_operations(
    comm: Communicator,
    cases: list[OperationCase],
    *,
    dtype: torch.dtype,
    num_rounds: int = NUM_ROUNDS,
    progress: bool = False,
) -> list[OperationTime]:
    """Time all cases; collective over the default process group, the same answer on every rank."""
    with contextlib.ExitStack() as stack:
        timers = [_make_timer(comm, case, dtype, stack) for case in cases]
        own = torch.empty(num_rounds, len(cases), 2, dtype=torch.float64)
        rounds = range(-1, num_rounds)  # the first warms up
        for round_ in tqdm(rounds, desc="operations", leave=False, disable=None if progress else True):
            for index, timer in enumerate(timers):
                own[max(round_, 0), index] = torch.tensor(timer(), dtype=torch.float64)
        everyone = [torch.empty_like(own) for _ in range(comm.num_ranks)]
        dist.all_gather(everyone, own)
    slowest = torch.stack(everyone).amax(0)
    return [
        OperationTime(case=case, dispatch_us=_quartile(slowest[:, i, 0]), combine_us=_quartile(slowest[:, i, 1]))
        for i, case in enumerate(cases)
    ]


def _quartile(values: torch.Tensor) -> float:
    if len(values) == 1:
        return float(values[0])
    return statistics.quantiles(values.tolist(), n=4, method="inclusive")[0]


Timer = Callable[[], tuple[float, float]]
"""Times a dispatch and a combine, us of this rank."""


def _make_timer(comm: Communicator, case: OperationCase, dtype: torch.dtype, stack: contextlib.ExitStack) -> Timer:
    device = f"cuda:{torch.cuda.current_device()}" if comm.transport == "cuda" else "cpu"
    generator = torch.Generator().manual_seed(comm.rank)
    topk_idx = torch.rand(case.num_tokens, case.num_experts, generator=generator).topk(case.num_topk).indices.to(device)
    most_rows = 2 * case.num_tokens * case.num_topk + 256
    dtype = torch.bfloat16 if case.low_latency else dtype
    row_bytes = case.hidden * dtype.itemsize
    buffer = stack.enter_context(
        Buffer(
            comm,
            num_experts=case.num_experts,
            hidden=case.hidden,
            num_topk=case.num_topk,
            max_tokens=case.num_tokens,
            low_latency_max_tokens=case.num_tokens if case.low_latency else 0,
            symm_bytes=(case.num_tokens + most_rows) * row_bytes + 4096 if case.rows_in_heap else 0,
            # Uniform routing brings no more; GPUs set memory aside for them.
            max_rows=most_rows,
            max_element_size=dtype.itemsize,
        )
    )
    x = torch.ones(case.num_tokens, case.hidden, dtype=dtype, device=device)
    if case.low_latency:
        return _low_latency_timer(buffer, x, topk_idx, comm)
    layout = TokenMajor() if case.layout == "token_major" else ExpertMajor()
    first = buffer.dispatch(x, topk_idx, layout=layout)
    rows = first.x
    if case.rows_in_heap:
        x = buffer.symm_empty(case.num_tokens, dtype).copy_(x)
        rows = buffer.symm_empty(len(first.x), dtype).copy_(first.x)

    def dispatch() -> object:
        if case.new_routing:
            return buffer.dispatch(x, topk_idx, layout=layout)
        return buffer.dispatch(x, handle=first.handle)

    def combine() -> object:
        return buffer.combine(rows, first.handle, reduce=case.reduce)

    return lambda: (_mean_us(dispatch, comm), _mean_us(combine, comm))


def _low_latency_timer(buffer: Buffer, x: torch.Tensor, topk_idx: torch.Tensor, comm: Communicator) -> Timer:
    # Rows packed one group after the other; blocks reserve room for every token of every rank in each group.
    def dispatch():
        return buffer.low_latency_dispatch(x, topk_idx, layout=ExpertMajor())

    def both() -> tuple[float, float]:
        latest = dispatch()
        combine_us = _mean_us(lambda: buffer.low_latency_combine(latest.x, latest.handle), comm)
        return _mean_us(dispatch, comm), combine_us

    return both


def _mean_us(run: Callable[[], object], comm: Communicator) -> float:
    """Calls go in small batches: ranks leave a barrier tens of microseconds apart, and each waits for its peers."""
    synchronize = torch.cuda.synchronize if comm.transport == "cuda" else _nothing
    synchronize()
    dist.barrier()
    start = time.perf_counter()
    for _ in range(_CALLS):
        run()
    synchronize()
    return (time.perf_counter() - start) / _CALLS * 1e6


def _nothing() -> None:
    """CPU operations have ended when their calls return."""
