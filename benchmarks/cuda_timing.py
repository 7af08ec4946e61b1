"""Times GPU operations of several ranks: CUDA events around whole calls, L2 flushed before each; and their kernels."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from .nccl_baselines import nccl_problem

NUM_WARMUP = 5
FLUSH_BYTES = 256 << 20
"""Written before each call: several times the L2."""
BUSY_CYCLES = 1_500_000
"""Almost a millisecond, in which the host gets ahead of the GPU."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantiles:
    """Of one rank's rounds, us."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, values: list[float]) -> Quantiles:
        """Of at least two values."""
        deciles = statistics.quantiles(values, n=10, method="inclusive")
        return cls(median=statistics.median(values), p10=deciles[0], p90=deciles[-1])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """One variant on all ranks."""

    idle: Quantiles
    """The GPU has nothing to do when the call is made: what the host needs before its launches shows. Of the rank with
    the largest median."""
    queued: Quantiles
    """The GPU is busy until all is launched (unless the call itself waits for it), and ranks that have a GPU each begin
    together. Of the rank with the largest."""
    host: Quantiles
    """From call to return on the host, GPU idle before. Of the rank with the largest."""
    idle_medians: list[float]
    """By rank."""

    def record(self) -> dict[str, object]:
        """Fields of a result line."""
        return {
            "median_us": round(self.idle.median, 2),
            "p10_us": round(self.idle.p10, 2),
            "p90_us": round(self.idle.p90, 2),
            "queued_median_us": round(self.queued.median, 2),
            "queued_p10_us": round(self.queued.p10, 2),
            "queued_p90_us": round(self.queued.p90, 2),
            "host_median_us": round(self.host.median, 2),
            "rank_median_us": [round(median, 2) for median in self.idle_medians],
        }


def make_flush() -> torch.Tensor:
    """Memory to write so that nothing of use is left in the L2."""
    return torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")


class Stopwatch:
    """Times calls that all ranks make together. Ranks meet before each through the host. Making one is collective."""

    def __init__(self, num_rounds: int) -> None:
        self.num_rounds = num_rounds
        self.flush = make_flush()
        self.met = torch.zeros(1, device="cuda")
        self.group = None
        if not nccl_problem(dist.get_world_size()):
            self.group = dist.new_group(backend="nccl")

    def _meet_on_gpus(self) -> None:
        """Hosts leave a barrier up to 100 us apart, which a peer's kernel would spend waiting."""
        if self.group is not None:
            dist.all_reduce(self.met, group=self.group)

    def prepare(self, *, idle: bool) -> None:
        """Before each round. ``idle``: the GPU has nothing left to do; else it is busy for a while, and ranks that have
        one each begin together then."""
        if idle:
            self.flush.zero_()
        torch.cuda.synchronize()
        dist.barrier()
        if not idle:
            self.flush.zero_()
            torch.cuda._sleep(BUSY_CYCLES)
            self._meet_on_gpus()

    def measure(self, call: Callable[[], object], *, before: Callable[[], object] | None = None) -> Timing:
        """Time ``call``; the same answer on every rank. ``before``: called ahead of each, off the clock."""
        device_us, host_us = self._rounds(call, before, idle=True)
        queued_us, _ = self._rounds(call, before, idle=False)
        own = [Quantiles.of(values) for values in (device_us, queued_us, host_us)]
        everyone: list[list[Quantiles]] = [own] * dist.get_world_size()
        dist.all_gather_object(everyone, own)
        idle, queued, host = zip(*everyone)

        def slowest(found: tuple[Quantiles, ...]) -> Quantiles:
            return max(found, key=lambda quantiles: quantiles.median)

        return Timing(
            idle=slowest(idle), queued=slowest(queued), host=slowest(host), idle_medians=[q.median for q in idle]
        )

    def _rounds(
        self, call: Callable[[], object], prepare: Callable[[], object] | None, *, idle: bool
    ) -> tuple[list[float], list[float]]:
        device_us, host_us = [], []
        for round_ in range(-NUM_WARMUP, self.num_rounds):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            if prepare is not None:
                prepare()
            self.prepare(idle=idle)
            start.record()
            before = time.perf_counter()
            result = call()
            after = time.perf_counter()
            end.record()
            torch.cuda.synchronize()
            del result
            if round_ >= 0:
                device_us.append(start.elapsed_time(end) * 1e3)
                host_us.append((after - before) * 1e6)
        return device_us, host_us


def kernel_times(call: Callable[[], object], num_calls: int = 10) -> dict[str, float]:
    """us per call of each kernel and copy of this rank. Waiting for peers is in the kernels that do it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(num_calls):
            torch.cuda.synchronize()
            dist.barrier()
            call()
        torch.cuda.synchronize()
    return {
        event.key: round(event.self_device_time_total / num_calls, 2)
        for event in profiler.key_averages()
        if event.self_device_time_total > 0
    }
