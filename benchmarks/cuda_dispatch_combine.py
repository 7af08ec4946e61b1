"""Dispatch and combine of transport ``cuda``: whole API calls between CUDA events, L2 flushed before each, median.

    python -m benchmarks.cuda_dispatch_combine                          # 2 ranks, 4096 x 7168, top-8 of 256
    python -m benchmarks.cuda_dispatch_combine --ranks 1 --num-sms 24 --only cached
    python -m benchmarks.cuda_dispatch_combine --routing one_rank --tokens 256 1024 --profile

One rank per GPU; with fewer GPUs than ranks, run it under MPS, and read the figures as those of a shared GPU. Times
are those of the slowest rank (largest median). *us*: the GPU is idle when the call is made, so that host work before
the launches counts; *queued*: it is busy until all is launched. *floor* is the time that the bytes which must cross to
other ranks, each row once, take at the measured speed of the wire.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from ray_deepep import CommConfig, Communicator
from ray_deepep.config import HEAP_PROVIDERS

from .cuda_timing import Stopwatch, kernel_times
from .cuda_traffic import ROUTINGS, Case, Inputs, Traffic
from .cuda_variants import Variant, Variants, make_buffer
from .nccl_baselines import Baseline, NcclBaselines, nccl_problem
from .ranks import run_ranks
from .records import RESULTS, Record, append, machine, markdown_table, run_facts

NAME = "cuda_dispatch_combine"
RESULTS_PATH = RESULTS / f"{NAME}.jsonl"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What is timed, and how."""

    num_sms: tuple[int, ...]
    num_rounds: int
    only: str
    """Variants whose name holds this; empty: all."""
    profile: bool
    heap_provider: str
    domain_size: int = 0
    """Ranks of a (logical) node, between which rows hop over NVSHMEM; 0: one node."""


class CaseRun:
    """One case on one rank."""

    def __init__(self, case: Case, options: Options) -> None:
        self.case, self.options = case, options
        self.rank = dist.get_rank()
        torch.cuda.set_device(self.rank % torch.cuda.device_count())
        self.inputs = Inputs.make(case, self.rank)
        self.traffic = Traffic.of(case, self.inputs.topk_idx)
        self.stopwatch = Stopwatch(options.num_rounds)

    def run(self) -> list[Record]:
        """Records of all variants; those of rank 0 count."""
        nodes = {"transport": "nvshmem", "domain_size": self.options.domain_size}
        one = {"transport": "cuda", "heap_provider": self.options.heap_provider}
        config = CommConfig(**(nodes if self.options.domain_size else one))
        with Communicator.from_process_group(config=config) as comm:
            buffer = make_buffer(comm, self.case, self.traffic)
            variants = Variants(self.case, self.inputs, self.traffic, buffer)
            chosen = [variant for variant in variants if self.options.only in variant.name]
            turns = list(itertools.product(self.options.num_sms, chosen))
            records = []
            for num_sms, variant in tqdm(turns, desc=self.case.title, unit="variant", disable=self.rank != 0):
                variants.num_sms = num_sms
                records.append({"num_sms": num_sms, **variant.facts, **self._time(variant)})
            buffer.check()
        return records + self._nccl()

    def _time(self, what: Variant | Baseline) -> Record:
        timing = self.stopwatch.measure(what.call)
        config = dataclasses.asdict(self.case)
        if self.options.domain_size:
            config["domain_size"] = self.options.domain_size
        elif self.options.heap_provider != "auto":
            config["heap_provider"] = self.options.heap_provider
        record = {"config": config, "variant": what.name, **timing.record()}
        record |= what.moved.record(timing.idle.median)
        if self.options.profile:
            record["kernels_us"] = kernel_times(what.call)
        return record

    def _nccl(self) -> list[Record]:
        if nccl_problem(self.case.num_ranks) or self.options.only not in "NCCL":
            return []
        baselines = NcclBaselines(self.case, self.inputs, self.traffic)
        records = [{"num_sms": None, "operation": "nccl", **self._time(baseline)} for baseline in baselines.all()]
        baselines.close()
        return records


def run_case(case: Record, options: Record) -> list[Record]:
    """One case; called on every rank."""
    return CaseRun(Case(**case), Options(**options)).run()


def gpu_facts() -> Record:
    """What lines of one run share."""
    return {**run_facts(), "benchmark": NAME, "gpu": torch.cuda.get_device_name(), "gpus": torch.cuda.device_count()}


def title(records: list[Record]) -> str:
    """Of one case, in words."""
    config = dict(records[0]["config"])
    domain_size = config.pop("domain_size", 0)
    nodes = f", {domain_size} a logical node" if domain_size else ""
    heap = f", heap {provider}" if (provider := config.pop("heap_provider", "")) else ""
    return f"{Case(**config).title}{nodes}{heap}, {machine(records[0])}"


def table(records: list[Record]) -> str:
    """All variants of one case."""
    rows = [
        [
            r["variant"],
            "" if r["num_sms"] is None else str(r["num_sms"]),
            f"{r['median_us']:.1f}",
            f"{r['p10_us']:.1f}–{r['p90_us']:.1f}",
            f"{r['queued_median_us']:.1f}",
            f"{r['host_median_us']:.1f}",
            f"{r['remote_bytes'] / 1e6:.1f}",
            f"{r['floor_us']:.1f}",
            f"{r['floor_us'] / r['queued_median_us']:.0%}",
            f"{r['deepep_gb_s']:.0f}",
        ]
        for r in records
    ]
    header = ["variant", "SMs", "us", "p10–p90", "queued", "host", "MB remote", "floor us", "floor / queued"]
    return markdown_table([*header, "DeepEP's GB/s"], rows)


def kernels_table(records: list[Record]) -> str:
    """Kernel times of all variants, rank 0."""
    rows = [
        [r["variant"], "" if r["num_sms"] is None else str(r["num_sms"]), f"{us:.1f}", name[:90]]
        for r in records
        for name, us in r["kernels_us"].items()
    ]
    return markdown_table(["variant", "SMs", "us a call", "kernel"], rows)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2])
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096], help="T, per rank")
    parser.add_argument("--hidden", type=int, nargs="+", default=[7168])
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--routing", choices=ROUTINGS, nargs="+", default=["uniform"])
    parser.add_argument("--num-sms", type=int, nargs="+", default=[8, 24, 64])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument(
        "--only",
        default="",
        help="variants whose name holds this, such as 'cached, in heap'; with --out: the newest run of a case is shown",
    )
    parser.add_argument("--profile", action="store_true", help="kernel times of each variant too")
    parser.add_argument("--heap-provider", choices=HEAP_PROVIDERS, default="auto")
    parser.add_argument("--domain-size", type=int, default=0, help="ranks of a logical node: rows hop over NVSHMEM")
    parser.add_argument("--out", type=Path, default=RESULTS_PATH, help="results file to append to")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    options = Options(
        num_sms=tuple(args.num_sms),
        num_rounds=args.rounds,
        only=args.only,
        profile=args.profile,
        heap_provider=args.heap_provider,
        domain_size=args.domain_size,
    )
    for sizes in itertools.product(args.ranks, args.tokens, args.hidden, args.routing):
        names = ("num_ranks", "num_tokens", "hidden", "routing")
        case = Case(**dict(zip(names, sizes)), num_topk=args.topk, num_experts=args.experts, dtype=args.dtype)
        facts = gpu_facts() | {"shared_gpu": torch.cuda.device_count() < case.num_ranks}
        found = run_ranks(run_case, case.num_ranks, dataclasses.asdict(case), dataclasses.asdict(options))
        records = [facts | record for record in found]
        append(args.out, records)
        print(f"\n{title(records)}\n\n{table(records)}\n", flush=True)
        if problem := nccl_problem(case.num_ranks):
            print(f"no NCCL baselines: {problem}\n")
        if args.profile:
            print(f"{kernels_table(records)}\n")


if __name__ == "__main__":
    main()
