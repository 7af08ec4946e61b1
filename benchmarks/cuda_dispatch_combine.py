"""Dispatch and combine of transport ``cuda``: whole API calls between CUDA events, L2 flushed before each, median.

    python -m benchmarks.cuda_dispatch_combine [--ranks 2] [--num-sms 8 24 64]

One rank per GPU; with fewer GPUs than ranks, run it under MPS, and read the figures as those of shared GPUs. Beside
each stands the wire floor of the bytes that cross to other ranks.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ray_deepep import Buffer, CommConfig, Communicator, ExpertMajor, TokenMajor

WIRE_GB_S = 374.0
"""NVLink 4, one direction, measured on H100."""
TOKENS, HIDDEN, TOPK, EXPERTS = 4096, 7168, 8, 256


def measure_us(call: Callable[[], object], flush: torch.Tensor, rounds: int = 30) -> dict[str, float]:
    """Median, p10 and p90 over rounds, this rank's events."""
    times = []
    for i in range(rounds + 5):
        flush.zero_()
        torch.cuda.synchronize()
        dist.barrier()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        if i >= 5:
            times.append(start.elapsed_time(end) * 1e3)
    deciles = statistics.quantiles(times, n=10)
    return {"median_us": statistics.median(times), "p10_us": deciles[0], "p90_us": deciles[-1]}


def variants(buffer: Buffer, x: torch.Tensor, topk_idx: torch.Tensor, weights: torch.Tensor) -> dict[str, Callable]:
    """Calls to time, each complete."""
    tokens, experts = (
        buffer.dispatch(x, topk_idx, weights, layout=layout) for layout in (TokenMajor(), ExpertMajor(128))
    )
    return {
        "dispatch token-major": lambda: buffer.dispatch(x, topk_idx, weights),
        "dispatch token-major, cached": lambda: buffer.dispatch(x, handle=tokens.handle),
        "dispatch expert-major": lambda: buffer.dispatch(x, topk_idx, weights, layout=ExpertMajor(128)),
        "dispatch expert-major, cached": lambda: buffer.dispatch(x, handle=experts.handle),
        "combine token-major": lambda: buffer.combine(tokens.x, tokens.handle),
        "combine expert-major, fast, weighted": lambda: buffer.combine(
            experts.x, experts.handle, weighted=True, reduce="fast"
        ),
        "combine expert-major, exact, weighted": lambda: buffer.combine(experts.x, experts.handle, weighted=True),
    }


def run_rank(rank: int, args: argparse.Namespace) -> None:
    """One rank of the benchmark."""
    gpus = torch.cuda.device_count()
    torch.cuda.set_device(rank % gpus)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{args.port}", rank=rank, world_size=args.ranks)
    generator = torch.Generator(device="cuda").manual_seed(rank)
    x = torch.randn(TOKENS, HIDDEN, device="cuda", dtype=torch.bfloat16, generator=generator)
    scores = torch.rand(TOKENS, EXPERTS, device="cuda", generator=generator)
    weights, topk_idx = scores.topk(TOPK)
    flush = torch.empty(64 << 20, dtype=torch.int32, device="cuda")
    elsewhere = (topk_idx // (EXPERTS // args.ranks)).unsqueeze(2) == torch.arange(args.ranks, device="cuda")
    remote_rows = int(elsewhere.any(1).sum()) - int(elsewhere.any(1)[:, rank].sum())
    records = []
    for num_sms in args.num_sms:
        config = CommConfig(transport="cuda", num_sms=num_sms)
        with Communicator.from_process_group(config=config) as comm:
            buffer = Buffer(comm, num_experts=EXPERTS, hidden=HIDDEN, num_topk=TOPK, max_tokens=TOKENS)
            for name, call in variants(buffer, x, topk_idx, weights).items():
                times = measure_us(call, flush)
                floor = remote_rows * HIDDEN * 2 / WIRE_GB_S / 1e3
                records.append({"variant": name, "num_sms": num_sms, "floor_us": floor, **times})
    if rank == 0:
        report(records, args, gpus)
    dist.barrier()


def report(records: list[dict], args: argparse.Namespace, gpus: int) -> None:
    """Print a table and append JSON lines."""
    from benchmarks.records import run_facts

    facts = {**run_facts(), "gpu": torch.cuda.get_device_name(), "gpus": gpus, "ranks": args.ranks}
    print(f"{TOKENS} tokens x {HIDDEN} bf16, top-{TOPK} of {EXPERTS}, {args.ranks} ranks on {gpus} {facts['gpu']}")
    print(f"{'variant':40} {'SMs':>4} {'us':>8} {'p10':>8} {'p90':>8} {'floor':>7}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("a") as file:
        for r in records:
            times = "".join(f" {r[key]:8.1f}" for key in ("median_us", "p10_us", "p90_us"))
            print(f"{r['variant']:40} {r['num_sms']:4}{times} {r['floor_us']:7.1f}")
            file.write(json.dumps({"benchmark": "cuda_dispatch_combine", **facts, **r}) + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--num-sms", type=int, nargs="+", default=[8, 24, 64])
    parser.add_argument("--port", type=int, default=29577)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cuda_dispatch_combine.jsonl"))
    args = parser.parse_args()
    mp.spawn(run_rank, (args,), args.ranks)


if __name__ == "__main__":
    main()
