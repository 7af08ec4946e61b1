"""Times variants in turn on all ranks: round after round, each variant once per round, in rotating order."""

from __future__ import annotations

import dataclasses
import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to do the thing that is measured."""

    name: str
    run: Callable[[], Any]
    """Does it once. Its value is dropped after the clock stops."""
    prepare: Callable[[], None] | None = None
    """Called before each run, outside the clock."""
    parts: Callable[[], dict[str, float]] | None = None
    """Called after each run, outside the clock: further numbers about it, such as ms of its parts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """Times of one variant, one per round."""

    name: str
    span_ms: list[float]
    """From the first rank's start to the last rank's end. Ranks start together, after a barrier."""
    rank_ms: list[float]
    """Largest time of any rank between its own start and end. Less than the span where ranks share cores in turn."""
    cpu_ms: list[float]
    """Processor time of all ranks and their threads together; waiting asleep is not in it, nor is what others run."""
    page_faults: list[float]
    """Pages of fresh memory that all ranks together touched first: each costs a trip into the kernel."""
    parts: dict[str, list[float]]
    """Mean over ranks of each part."""


def measure(
    variants: list[Variant], *, num_rounds: int, nice: int = 0, num_warmup: int = 3, title: str = ""
) -> list[Timing]:
    """Time all variants; collective over the default process group, the same answer on every rank.

    ``nice`` below 0 puts this process before others while the clock runs (with the right to do so), and leaves them
    as much time again after each run: for figures from a machine that others use.
    """
    samples = [_Samples() for _ in variants]
    rounds = range(-num_warmup, num_rounds)
    for round_ in tqdm(rounds, desc=title, unit="round", disable=dist.get_rank() != 0, leave=False):
        for position in range(len(variants)):
            # Rotated, so that no variant always runs in the caches that one certain other left behind.
            index = (position + round_) % len(variants)
            sample = _run_once(variants[index], nice)
            if round_ >= 0:
                samples[index].add(sample)
    return [_gather(variant.name, own) for variant, own in zip(variants, samples, strict=True)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sample:
    start: float
    end: float
    cpu: float
    page_faults: int
    parts: dict[str, float]


class _Samples:
    def __init__(self) -> None:
        self.columns: list[list[float]] = [[], [], [], []]
        self.parts: dict[str, list[float]] = {}

    def add(self, sample: _Sample) -> None:
        for column, value in zip(self.columns, (sample.start, sample.end, sample.cpu, sample.page_faults)):
            column.append(value)
        for name, value in sample.parts.items():
            self.parts.setdefault(name, []).append(value)


def _run_once(variant: Variant, nice: int) -> _Sample:
    if variant.prepare is not None:
        variant.prepare()
    with _priority(nice):
        dist.barrier()
        before, start = _used(), time.perf_counter()
        # Kept alive while the clock runs: freeing it is not part of the work.
        result = variant.run()
        end, after = time.perf_counter(), _used()
    del result
    return _Sample(
        start=start,
        end=end,
        cpu=after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        page_faults=after.ru_minflt - before.ru_minflt,
        parts={} if variant.parts is None else variant.parts(),
    )


def _used() -> resource.struct_rusage:
    return resource.getrusage(resource.RUSAGE_SELF)


@contextmanager
def _priority(nice: int) -> Iterator[None]:
    if nice == 0:
        yield
        return
    start = time.perf_counter()
    _set_nice(nice)
    try:
        yield
    finally:
        _set_nice(0)
        time.sleep(time.perf_counter() - start)


def _set_nice(nice: int) -> None:
    # Threads have values of their own: gloo's and autograd's work for this process too.
    for thread in os.listdir("/proc/self/task"):
        os.setpriority(os.PRIO_PROCESS, int(thread), nice)


def _gather(name: str, own: _Samples) -> Timing:
    # perf_counter is the host's monotonic clock, the same in all processes.
    mine = torch.tensor([*own.columns, *own.parts.values()], dtype=torch.float64)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    every = torch.stack(everyone)
    starts, ends, cpu, page_faults = every[:, :4].unbind(1)
    parts = every[:, 4:].mean(0)
    return Timing(
        name=name,
        span_ms=((ends.amax(0) - starts.amin(0)) * 1e3).tolist(),
        rank_ms=((ends - starts).amax(0) * 1e3).tolist(),
        cpu_ms=(cpu.sum(0) * 1e3).tolist(),
        page_faults=page_faults.sum(0).tolist(),
        parts={part: parts[i].tolist() for i, part in enumerate(own.parts)},
    )
