"""Times of the low-latency calls, for the tables that ``test_low_latency.py`` and ``test_inference.py`` print."""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from device_cases import use_gpu
from harness import RankContext, RankPool, shm_problem

from ray_deepep import Buffer, Float8Cast, LowLatencyDispatchResult
from ray_deepep.cuda import cuda_problem

NUM_WARMUP = 3
DEVICE = "cpu" if cuda_problem() else "cuda"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """T and H per rank, and how often each thing is timed."""

    num_tokens: int
    hidden: int
    num_experts: int
    num_topk: int
    num_rounds: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timed:
    """One thing that was timed on one rank."""

    name: str
    remote_bytes: int
    """That this rank read from others, in one round."""
    times_us: list[float]


def pause(seconds: float) -> None:
    """Be late."""
    time.sleep(seconds)


def remote_rows(sizes: Sizes, topk_idx: torch.Tensor, context: RankContext) -> tuple[int, int]:
    """(token, rank) pairs, and routes, of this rank that cross to others."""
    owner = topk_idx // (sizes.num_experts // context.num_ranks)
    pairs = sum(int((owner == peer).any(1).sum()) for peer in range(context.num_ranks) if peer != context.rank)
    return pairs, int((owner != context.rank).sum())


def make_buffer(context: RankContext, sizes: Sizes) -> Buffer:
    """Collective; on GPUs, if there are any."""
    if DEVICE == "cuda":
        use_gpu(context.rank)
    return context.buffer(
        "cuda" if DEVICE == "cuda" else "shm",
        num_experts=sizes.num_experts,
        hidden=sizes.hidden,
        num_topk=sizes.num_topk,
        max_tokens=0,
        low_latency_max_tokens=sizes.num_tokens,
    )


def inputs(context: RankContext, sizes: Sizes) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, experts and weights of one rank."""
    generator = torch.Generator().manual_seed(context.rank)
    x = torch.randn(sizes.num_tokens, sizes.hidden, generator=generator).to(torch.bfloat16)
    weights, topk_idx = torch.rand(sizes.num_tokens, sizes.num_experts, generator=generator).topk(sizes.num_topk)
    return x.to(DEVICE), topk_idx.to(DEVICE), weights.to(DEVICE)


def expert_outputs(got: LowLatencyDispatchResult) -> torch.Tensor:
    """Rows where there is a token; memory that was never written is not what a step reads."""
    rows = torch.empty(got.x.shape, dtype=torch.bfloat16, device=got.x.device)
    for block, count in zip(rows, got.counts.tolist()):
        block[:count] = 1.0
    return rows


def measure_calls(context: RankContext, sizes: Sizes) -> list[Timed]:
    """Each call alone; and sends and receives apart."""
    x, topk_idx, weights = inputs(context, sizes)
    pairs, routes = remote_rows(sizes, topk_idx, context)
    row, row8 = sizes.hidden * 2, sizes.hidden + sizes.hidden // 128 * 4
    cast = Float8Cast()
    with make_buffer(context, sizes) as buffer:

        def dispatch(**more: object):
            return buffer.low_latency_dispatch(x, topk_idx, topk_weights=weights, **more)

        got = dispatch()
        rows = expert_outputs(got)

        def combine(**more: object):
            return buffer.low_latency_combine(rows, got.handle, **more)

        calls: dict[str, tuple[int, Callable]] = {
            "dispatch bfloat16": (pairs * row, dispatch),
            "dispatch float8 cast inside": (pairs * row8, lambda **m: dispatch(cast=cast, **m)),
            "combine fast": (pairs * row, combine),
            "combine exact": (routes * row, lambda **m: combine(reduce="exact", **m)),
        }
        found = []
        for name, (num_bytes, call) in calls.items():
            times = _times(call, sizes.num_rounds)
            found.append(Timed(name=name, remote_bytes=num_bytes, times_us=times))
            for part, times in zip(("send", "receive"), _split_times(call, sizes.num_rounds)):
                found.append(Timed(name=f"{name}: {part}", remote_bytes=0, times_us=times))
        return found


def measure_step(context: RankContext, sizes: Sizes) -> list[Timed]:
    """A decode step's dispatch and combine, one after the other."""
    x, topk_idx, weights = inputs(context, sizes)
    pairs, _ = remote_rows(sizes, topk_idx, context)
    row, row8 = sizes.hidden * 2, sizes.hidden + sizes.hidden // 128 * 4
    found = []
    with make_buffer(context, sizes) as buffer:
        got = buffer.low_latency_dispatch(x, topk_idx, topk_weights=weights)
        rows = expert_outputs(got)
        for name, cast, sent in (("bfloat16", None, row), ("float8", Float8Cast(), row8)):

            def step(cast: Float8Cast | None = cast) -> None:
                result = buffer.low_latency_dispatch(x, topk_idx, topk_weights=weights, cast=cast)
                buffer.low_latency_combine(rows, result.handle)

            times = _times(step, sizes.num_rounds)
            found.append(Timed(name=name, remote_bytes=pairs * (sent + row), times_us=times))
    return found


def _clock() -> float:
    """us, when all that was started has ended."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() * 1e6


def _times(call: Callable[[], object], num_rounds: int) -> list[float]:
    times = []
    for _ in range(NUM_WARMUP + num_rounds):
        dist.barrier()
        start = _clock()
        call()
        times.append(_clock() - start)
    return times[NUM_WARMUP:]


def _split_times(call: Callable, num_rounds: int) -> tuple[list[float], list[float]]:
    sends, receives = [], []
    for _ in range(NUM_WARMUP + num_rounds):
        dist.barrier()
        start = _clock()
        result = call(return_recv_hook=True)
        sends.append(_clock() - start)
        dist.barrier()
        start = _clock()
        result.hook()
        receives.append(_clock() - start)
    return sends[NUM_WARMUP:], receives[NUM_WARMUP:]


HEADER = f"{'':40} {'p50 us':>9} {'p99 us':>9} {'MB read':>9} {'GB/s':>7}"


def line(name: str, of_ranks: list[Timed]) -> str:
    """Times of the slowest rank in each round; bytes that one rank read from others, mean."""
    slowest = torch.tensor([timed.times_us for timed in of_ranks]).amax(0)
    p50, p99 = (float(slowest.quantile(q)) for q in (0.5, 0.99))
    num_bytes = sum(timed.remote_bytes for timed in of_ranks) / len(of_ranks)
    volume = f"{num_bytes / 1e6:9.2f} {num_bytes / p50 / 1e3:7.2f}" if num_bytes else ""
    return f"{name:40} {p50:9.1f} {p99:9.1f} {volume}"


def table(by_rank: list[list[Timed]], sizes: Sizes) -> str:
    """All that was timed at one size."""
    title = f"{sizes.num_tokens} tokens x {sizes.hidden}, top-{sizes.num_topk} of {sizes.num_experts}"
    lines = [line(of_ranks[0].name, list(of_ranks)) for of_ranks in zip(*by_rank)]
    return "\n".join([f"{title}, {len(by_rank)} ranks", HEADER, *lines])


def parser(doc: str) -> argparse.ArgumentParser:
    """Sizes on the command line."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--tokens", "--batch_size", type=int, default=128, help="T, per rank")
    parser.add_argument("--hidden", "--hidden_size", type=int, default=7168)
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--experts", type=int, default=288)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--ranks", type=int, default=2, help="processes")
    return parser


def report_calls(args: argparse.Namespace) -> None:
    """Print the table of :func:`measure_calls`."""
    announce()
    sizes = sizes_of(args, args.tokens)
    with RankPool(args.ranks) as pool:
        print(table(pool.run(measure_calls, sizes, deadline_s=600.0), sizes))


def report_steps(args: argparse.Namespace) -> None:
    """Print :func:`measure_step` for batches up to the asked one."""
    announce()
    print(f"hidden {args.hidden}, top-{args.topk} of {args.experts}, {args.ranks} ranks: dispatch + combine (fast)")
    print(HEADER)
    batches = sorted({min(batch, args.tokens) for batch in (1, 8, 32, 128, 512, args.tokens)})
    with RankPool(args.ranks) as pool:
        for batch in batches:
            by_rank = pool.run(measure_step, sizes_of(args, batch), deadline_s=600.0)
            for of_ranks in zip(*by_rank):
                print(line(f"batch {batch}, {of_ranks[0].name}", list(of_ranks)), flush=True)


def sizes_of(args: argparse.Namespace, num_tokens: int) -> Sizes:
    """From the command line."""
    return Sizes(
        num_tokens=num_tokens,
        hidden=args.hidden,
        num_experts=args.experts,
        num_topk=args.topk,
        num_rounds=args.rounds,
    )


def announce() -> None:
    """What is measured, and what is not."""
    # Before the server of the ranks starts: DeepSpeed, if it is there, looks for an accelerator and warns.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if DEVICE == "cpu" and shm_problem():
        raise SystemExit(shm_problem())
    where = "CPU core" if DEVICE == "cpu" else "GPUs, with what the host takes (kernels: benchmarks.cuda_low_latency)"
    print(f"{where}. Times of the slowest rank; bytes that a rank reads from others.")
