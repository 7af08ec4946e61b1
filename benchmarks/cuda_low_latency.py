"""Low-latency dispatch and combine of transport ``cuda``: CUDA-graph replays, microseconds.

    python -m benchmarks.cuda_low_latency                                  # 2 ranks, 128 x 7168, top-8 of 288
    python -m benchmarks.cuda_low_latency --ranks 1 --tokens 1 8 32 128 512 --num-sms 24 64 128

*us*: one call of a graph that holds several, one after the other, median over replays; of the slowest rank. *p50*,
*p99*: replays of a graph with one call, each between two events, which add some microseconds. *send*: how long a call
with a hook keeps the GPU busy before the hook, between two events / its kernel, by the profiler. *heap*: memory that
peers read, per rank. With fewer GPUs than ranks, run it under MPS: the figures are those of a shared GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from ray_deepep import Buffer, CommConfig, Communicator, Float8Cast

from .ranks import run_ranks
from .records import RESULTS, Record, append, by_case, by_sms, has_own_gpus, machine, markdown_table, run_facts

NAME = "cuda_low_latency"
RESULTS_PATH = RESULTS / f"{NAME}.jsonl"
CALLS_PER_GRAPH = 20
NUM_REPLAYS = 30
NUM_SENDS = 60
NUM_PROFILED = 5
"""Replays of a graph under the profiler."""
BUSY_CYCLES = 2_000_000
"""About a millisecond, in which the host gets ahead of the GPU."""
_TERMS = (
    "*p50* and *p99* of single replays: of a graph with one call between two events, which are in the figures and add "
    "some microseconds; *send*: how long a call with a hook keeps the GPU busy before the hook, between two events, "
    "and its kernel alone. "
    "*Exact* brings back a row for each route, not one for each token and rank; with *zero copy* peers read the rows "
    "where experts left them. *Heap* is memory that peers read, per rank."
)
EXPLANATION = (
    "Calls of a decode step, with fixed shapes and in CUDA graphs; us of the slowest rank. By number of SMs: one call "
    f"of a graph of {CALLS_PER_GRAPH}, one after the other, median over replays. The last two columns are with the "
    f"most SMs (calls take all of them unless told otherwise). {_TERMS}"
)
FULL_EXPLANATION = (
    "Calls of a decode step, with fixed shapes and in CUDA graphs; of the slowest rank. *us*: one call of a graph of "
    f"{CALLS_PER_GRAPH}, one after the other, median, p10 and p90 over replays; *kernel*: of that its kernels, by the "
    f"profiler. {_TERMS}"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes per rank."""

    num_ranks: int
    num_tokens: int
    hidden: int
    num_topk: int
    num_experts: int
    masked: bool = False
    """The last rank and the others have masked each other."""

    @property
    def title(self) -> str:
        """One line."""
        sizes = f"{self.num_tokens} × {self.hidden}, top-{self.num_topk} of {self.num_experts}"
        ranks = f"{self.num_ranks} rank{'s' if self.num_ranks > 1 else ''}"
        return f"{ranks}{', the last one masked' if self.masked else ''}, {sizes}"

    @property
    def rows_bytes(self) -> int:
        """Of a block for each expert of a rank, in bfloat16."""
        return self.num_experts * self.num_tokens * self.hidden * 2


class Calls:
    """The operations of one case on one rank, with static inputs."""

    def __init__(self, case: Case, buffer: Buffer, rank: int) -> None:
        generator = torch.Generator("cuda").manual_seed(rank)
        shape = (case.num_tokens, case.num_experts)
        self.buffer, self.num_sms = buffer, 1
        x = torch.randn(case.num_tokens, case.hidden, generator=generator, device="cuda")
        self.x = x.to(torch.bfloat16)
        self.weights, self.topk_idx = torch.rand(shape, generator=generator, device="cuda").topk(case.num_topk)
        self.rows = torch.ones_like(self.dispatch().x)
        self.rows_in_heap = buffer.symm_empty(self.rows.shape[:-1].numel()).view(self.rows.shape).fill_(1.0)
        self.handle = self.dispatch().handle

    def dispatch(self, **more: object):
        return self.buffer.low_latency_dispatch(
            self.x, self.topk_idx, topk_weights=self.weights, num_sms=self.num_sms, **more
        )

    def combine(self, **more: object):
        return self.buffer.low_latency_combine(self.rows, self.handle, num_sms=self.num_sms, **more)

    def combine_in_place(self, **more: object):
        options = {"reduce": "exact", "zero_copy": True, "num_sms": self.num_sms, **more}
        return self.buffer.low_latency_combine(self.rows_in_heap, self.handle, **options)

    def step(self) -> None:
        """A decode step's two calls."""
        handle = self.dispatch(cast=Float8Cast()).handle
        self.buffer.low_latency_combine(self.rows, handle, num_sms=self.num_sms)

    def all(self) -> dict[str, Callable[..., object]]:
        """By name; all but ``step`` take ``return_recv_hook``."""
        return {
            "dispatch bf16": self.dispatch,
            "dispatch fp8": lambda **more: self.dispatch(cast=Float8Cast(), **more),
            "combine bf16": self.combine,
            "combine bf16, exact": lambda **more: self.combine(reduce="exact", **more),
            "combine bf16, exact, zero copy": self.combine_in_place,
            "dispatch fp8 + combine": self.step,
        }


def capture(call: Callable[[], object], count: int) -> torch.cuda.CUDAGraph:
    """A graph of ``count`` calls; collective."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for _ in range(count):
            call()
    return graph


def replay_times(graph: torch.cuda.CUDAGraph, count: int) -> list[float]:
    """us of each replay."""
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    dist.barrier()
    for start, end in pairs:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e3 for start, end in pairs]


def send_times(call: Callable[..., object]) -> list[float]:
    """us that sending keeps the GPU busy; it is busy before, so that the host's time does not show."""
    found = []
    for _ in range(NUM_SENDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        dist.barrier()
        torch.cuda._sleep(BUSY_CYCLES)
        start.record()
        sent = call(return_recv_hook=True)
        end.record()
        sent.hook()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end) * 1e3)
    return found


def send_kernel_times(call: Callable[..., object]) -> list[float]:
    """us of the sending kernels by the profiler, without launch and events."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(NUM_SENDS):
            torch.cuda.synchronize()
            dist.barrier()
            call(return_recv_hook=True).hook()
        torch.cuda.synchronize()
    kernels = [event for event in profiler.events() if "low_latency_" in event.name]
    kernels.sort(key=lambda event: event.time_range.start)
    return [event.time_range.elapsed_us() for event in kernels[::2]]  # sending and receiving take turns


def kernel_times(graph: torch.cuda.CUDAGraph) -> list[float]:
    """us of one call's kernels in such a graph, by the profiler: without the gaps between launches."""
    dist.barrier()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(NUM_PROFILED):
            graph.replay()
        torch.cuda.synchronize()
    kernels = [event for event in profiler.events() if "low_latency_" in event.name]
    kernels.sort(key=lambda event: event.time_range.start)
    times = [event.time_range.elapsed_us() for event in kernels]
    per_call = len(times) // (NUM_PROFILED * CALLS_PER_GRAPH)
    return [sum(times[i : i + per_call]) for i in range(0, len(times), per_call)] if per_call else []


def slowest(values: list[float], quantile: float) -> float:
    """Of all ranks' quantiles, the largest."""
    own = sorted(values)[min(len(values) - 1, int(quantile * len(values)))]
    everyone = [0.0] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return max(everyone)


def run_case(case_fields: Record, all_num_sms: list[int], num_singles: int, only: str) -> list[Record]:
    """One case; called on every rank."""
    case, rank = Case(**case_fields), dist.get_rank()
    torch.cuda.set_device(rank % torch.cuda.device_count())
    records = []
    with Communicator.from_process_group(config=CommConfig(transport="cuda")) as comm:
        buffer = Buffer(
            comm,
            num_experts=case.num_experts,
            hidden=case.hidden,
            num_topk=case.num_topk,
            max_tokens=0,
            low_latency_max_tokens=case.num_tokens,
            symm_bytes=case.rows_bytes,
            max_element_size=2,
        )
        last = case.num_ranks - 1
        for peer in range(case.num_ranks if case.masked else 0):
            if (peer == last) != (rank == last):
                buffer.mask_rank(peer)
        calls = Calls(case, buffer, rank)
        turns = [turn for turn in itertools.product(all_num_sms, calls.all().items()) if only in turn[1][0]]
        for num_sms, (name, call) in tqdm(turns, desc=case.title, unit="variant", disable=rank != 0):
            calls.num_sms = num_sms
            call()
            graph = capture(call, CALLS_PER_GRAPH)
            times, in_graph = replay_times(graph, NUM_REPLAYS)[5:], kernel_times(graph)
            singles = replay_times(capture(call, 1), num_singles)[num_singles // 10 :]
            sends = [] if call == calls.step else send_times(call)[5:]
            kernels = [] if call == calls.step else send_kernel_times(call)[5:]
            records.append(
                {
                    "config": case_fields,
                    "variant": name,
                    "num_sms": num_sms,
                    "median_us": slowest([t / CALLS_PER_GRAPH for t in times], 0.5),
                    "kernel_us": slowest(in_graph, 0.5) if in_graph else None,
                    "p10_us": slowest([t / CALLS_PER_GRAPH for t in times], 0.1),
                    "p90_us": slowest([t / CALLS_PER_GRAPH for t in times], 0.9),
                    "single_p50_us": slowest(singles, 0.5),
                    "single_p99_us": slowest(singles, 0.99),
                    "num_singles": num_singles,
                    "send_us": slowest(sends, 0.5) if sends else None,
                    "send_kernel_us": slowest(kernels, 0.5) if kernels else None,
                    "heap_bytes": buffer.low_latency_heap_bytes,
                }
            )
        buffer.check()
    return records


def title(records: list[Record]) -> str:
    """Of one case, in words."""
    return f"{_case(records)}, {machine(records[0])}"


def _case(records: list[Record]) -> str:
    return f"{Case(**records[0]['config']).title}, heap {records[0]['heap_bytes'] / 1e6:.1f} MB"


def table(records: list[Record]) -> str:
    """All variants of one case."""
    rows = [
        [
            r["variant"],
            str(r["num_sms"]),
            f"{r['median_us']:.1f}",
            f"{r['p10_us']:.1f}–{r['p90_us']:.1f}",
            "" if r.get("kernel_us") is None else f"{r['kernel_us']:.1f}",
            f"{r['single_p50_us']:.1f}",
            f"{r['single_p99_us']:.1f}",
            _send(r),
        ]
        for r in records
    ]
    return markdown_table(["call", "SMs", "us", "p10–p90", "kernel", "p50 alone", "p99 alone", "send"], rows)


def _send(record: Record) -> str:
    """With events around it, and of that the kernel; older lines have the first alone."""
    times = [record["send_us"], record.get("send_kernel_us")]
    return " / ".join(f"{us:.1f}" for us in times if us is not None)


def summary_table(records: list[Record]) -> str:
    """A table per case, calls by number of SMs."""
    return "\n\n".join(map(_case_table, by_case(records)))


def _case_table(records: list[Record]) -> str:
    all_sms = sorted({record["num_sms"] for record in records})
    rows = []
    for name, found in by_sms(records).items():
        times = [f"{found[num_sms]['median_us']:.1f}" if num_sms in found else "" for num_sms in all_sms]
        most = found[max(found)]
        alone = f"{most['single_p50_us']:.1f} / {most['single_p99_us']:.1f}"
        rows.append([name, *times, alone, _send(most)])
    header = [f"us a call, {_case(records)}", *(f"{num_sms} SMs" for num_sms in all_sms)]
    return markdown_table([*header, "single replay, p50 / p99", "send"], rows)


def is_headline(record: Record) -> bool:
    """The case that stands for the others, over a wire."""
    wanted = {"num_tokens": 128, "hidden": 7168, "num_topk": 8, "num_experts": 288}
    return has_own_gpus(record) and wanted.items() <= record["config"].items() and not record["config"].get("masked")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2])
    parser.add_argument("--tokens", type=int, nargs="+", default=[128], help="T, per rank")
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--experts", type=int, default=288)
    parser.add_argument("--num-sms", type=int, nargs="+", default=[24, 64, 132])
    parser.add_argument("--replays", type=int, default=10_000, help="of a graph with one call, for p50 and p99")
    parser.add_argument("--only", default="", help="calls whose name holds this")
    parser.add_argument("--masked", action="store_true", help="with the last rank masked")
    parser.add_argument("--out", type=Path, default=RESULTS_PATH, help="results file to append to")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    for num_ranks, num_tokens in itertools.product(args.ranks, args.tokens):
        case = Case(
            num_ranks=num_ranks,
            num_tokens=num_tokens,
            hidden=args.hidden,
            num_topk=args.topk,
            num_experts=args.experts,
            masked=args.masked,
        )
        gpus = torch.cuda.device_count()
        facts = {**run_facts(), "benchmark": NAME, "gpu": torch.cuda.get_device_name(), "gpus": gpus}
        facts["shared_gpu"] = gpus < num_ranks
        found = run_ranks(run_case, num_ranks, dataclasses.asdict(case), args.num_sms, args.replays, args.only)
        # Lines of before there were masks have no such word.
        config = {name: value for name, value in dataclasses.asdict(case).items() if value is not False}
        records = [facts | record | {"config": config} for record in found]
        append(args.out, records)
        print(f"\n{title(records)}\n\n{table(records)}\n", flush=True)


if __name__ == "__main__":
    main()
