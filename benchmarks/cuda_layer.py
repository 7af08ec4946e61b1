"""A DeepSpeed MoE layer on GPUs, forward and backward: stock, and swapped with experts in a loop and grouped.

    python -m benchmarks.cuda_layer                     # 2 ranks, three shapes, bfloat16
    python -m benchmarks.cuda_layer --ranks 1 --profile

``deepspeed.moe.layer.MoE`` alone (no engine), 4,096 tokens a rank, experts of two linear layers. Times are between CUDA
events, the L2 flushed and the GPU idle before each call; of the slowest rank. *faster* is stock's median by the
variant's, of the same run.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from .cuda_timing import Stopwatch, kernel_times
from .ranks import run_ranks
from .records import RESULTS, Record, append, has_own_gpus, machine, markdown_table, run_facts

if TYPE_CHECKING:
    from deepspeed.moe.layer import MoE

NAME = "cuda_layer"
RESULTS_PATH = RESULTS / f"{NAME}.jsonl"
EXPLANATION = (
    "`deepspeed.moe.layer.MoE` alone in bfloat16, stock (NCCL's all-to-all) and swapped, in one run; experts of two "
    "linear layers, one after the other (*loop*) or as grouped products; with *graphs* forward and backward are a CUDA "
    "graph each. The GPU is idle before each call; median of the slowest rank, *faster* is against stock. *Host* is "
    "the share of forward and backward in which the call has not returned to the host: near 100 % figures tell of "
    "Python, launches and waits more than of rows moved. *Memory* is the most that torch has given out in a step, "
    "beyond what it had before the layer was swapped; for swapped layers + what their heap holds (4,300 MB where that "
    "is not said); *difference* is the largest of the output, relative to stock's largest value."
)
VARIANTS = {
    "padded, exact, loop": ("padded", "exact", "loop", "off"),
    "compact, exact, loop": ("compact", "exact", "loop", "off"),
    "exact, grouped": ("compact", "exact", "grouped", "off"),
    "fast, grouped": ("compact", "fast", "grouped", "off"),
    "exact, grouped, graphs": ("compact", "exact", "grouped", "auto"),
    "fast, grouped, graphs": ("compact", "fast", "grouped", "auto"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes; tokens per rank."""

    num_ranks: int
    hidden: int
    num_experts: int
    k: int
    inner: int
    """Width between an expert's two layers."""
    capacity_factor: float
    num_tokens: int = 4096

    @property
    def title(self) -> str:
        """In words."""
        sizes = f"H {self.hidden}, E {self.num_experts}, k {self.k}, F {self.inner}, capacity {self.capacity_factor}"
        return f"{self.num_ranks} ranks, {self.num_tokens} tokens, {sizes}"


WARM_UP_STEPS = 4
"""After them layers have their graphs."""
SHAPES = (
    {"hidden": 2048, "num_experts": 64, "k": 2, "inner": 1024, "capacity_factor": 1.25},
    {"hidden": 4096, "num_experts": 64, "k": 8, "inner": 1024, "capacity_factor": 1.25},
    {"hidden": 7168, "num_experts": 64, "k": 8, "inner": 512, "capacity_factor": 1.0},
)


class Expert(nn.Module):
    """H → F → H."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(hidden, inner), nn.Linear(inner, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(x)))


class LayerStep:
    """Forward, or forward and backward, of one layer on this rank."""

    def __init__(self, layer: MoE, case: Case, rank: int) -> None:
        generator = torch.Generator("cuda").manual_seed(rank)
        shape = (case.num_tokens, case.hidden)
        self.layer = layer
        self.x = torch.randn(shape, generator=generator, device="cuda").bfloat16().requires_grad_()
        self.grad = torch.randn(shape, generator=generator, device="cuda").bfloat16()

    def forward(self) -> Tensor:
        """Output ``[T, H]``; no gate here draws anything."""
        return self.layer(self.x)[0]

    def clear(self) -> None:
        """Let go of gradients, which is the optimizer's business."""
        self.layer.zero_grad()
        self.x.grad = None

    def both(self) -> Tensor:
        """Output, after the backward."""
        out = self.forward()
        out.backward(self.grad)
        return out

    def held_bytes(self) -> int:
        """What torch has given out, without gradients."""
        self.clear()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    def peak_bytes(self) -> int:
        """The most that it has given out in one step."""
        self.both()
        self.held_bytes()
        torch.cuda.reset_peak_memory_stats()
        self.both()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()


def run_case(case_fields: Record, num_rounds: int, profile: bool) -> list[Record]:
    """One case; called on every rank."""
    import deepspeed
    from deepspeed.moe.layer import MoE

    from ray_deepep import CommConfig
    from ray_deepep.deepspeed import SwapConfig, enable

    case, rank = Case(**case_fields), dist.get_rank()
    torch.cuda.set_device(rank % torch.cuda.device_count())
    deepspeed.init_distributed("nccl", verbose=False)
    torch.manual_seed(7)
    expert = Expert(case.hidden, case.inner)
    options = {"num_experts": case.num_experts, "ep_size": case.num_ranks, "k": case.k}
    factors = {"capacity_factor": case.capacity_factor, "top2_2nd_expert_sampling": False}
    layer = MoE(case.hidden, expert, **options, **factors)
    layer.set_deepspeed_parallelism()
    step = LayerStep(layer.cuda().bfloat16(), case, rank)
    clock = Stopwatch(num_rounds)
    expected = step.both().detach().float()
    held = step.held_bytes()
    records = [_measure(clock, step, case, "stock", expected, held, profile)]
    for name, (layout, combine, experts, graphs) in tqdm(VARIANTS.items(), desc=case.title, disable=rank != 0):
        comm = CommConfig(transport="cuda")
        with enable(SwapConfig(layout=layout, combine=combine, experts=experts, graphs=graphs, comm=comm)) as swap:
            for _ in range(WARM_UP_STEPS):
                step.both()
            records.append(_measure(clock, step, case, name, expected, held, profile))
            records[-1]["heap_bytes"] = sum(buffer.stats().heap_bytes or 0 for buffer in swap.buffers)
    return records


def _measure(
    clock: Stopwatch, step: LayerStep, case: Case, name: str, expected: Tensor, held: int, profile: bool
) -> Record:
    step.clear()
    error = (step.both().detach().float() - expected).abs().max() / expected.abs().max()
    record: Record = {
        "config": dataclasses.asdict(case),
        "variant": name,
        "relative_error": round(float(error), 5),
        "memory_bytes": step.peak_bytes() - held,
    }
    calls: dict[str, Callable[[], object]] = {"forward": step.forward, "both": step.both}
    for part, call in calls.items():
        record |= {f"{part}_{key}": value for key, value in clock.measure(call, before=step.clear).record().items()}
    if profile:
        record["kernels_us"] = kernel_times(lambda: (step.clear(), step.both()))
    return record


def title(records: list[Record]) -> str:
    """Of one case, in words."""
    return f"{Case(**records[0]['config']).title}, {machine(records[0])}"


def table(records: list[Record]) -> str:
    """All variants of one case."""
    stock = records[0]
    rows = [
        [
            r["variant"],
            f"{r['forward_median_us'] / 1e3:.2f}",
            f"{stock['forward_median_us'] / r['forward_median_us']:.2f}×",
            f"{r['both_median_us'] / 1e3:.2f}",
            f"{r['both_p10_us'] / 1e3:.2f}–{r['both_p90_us'] / 1e3:.2f}",
            f"{stock['both_median_us'] / r['both_median_us']:.2f}×",
            f"{r['both_host_median_us'] / r['both_median_us']:.0%}",
            f"{r['memory_bytes'] / 1e6:,.0f}" + (f" + {r['heap_bytes'] / 1e6:,.0f}" if "heap_bytes" in r else ""),
            f"{r['relative_error']:.4f}",
        ]
        for r in records
    ]
    header = ["layer", "forward ms", "faster", "+ backward ms", "p10–p90", "faster", "host"]
    return markdown_table([*header, "memory MB", "difference"], rows)


def is_headline(record: Record) -> bool:
    """The case that stands for the others, over a wire."""
    return has_own_gpus(record) and SHAPES[0].items() <= record["config"].items()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--profile", action="store_true", help="kernel times of each variant too")
    parser.add_argument("--out", type=Path, default=RESULTS_PATH, help="results file to append to")
    args = parser.parse_args(argv)
    # Ranks of other benchmarks are CPUs.
    os.environ["DS_ACCELERATOR"] = "cuda"
    facts = {**run_facts(), "benchmark": NAME, "gpu": torch.cuda.get_device_name(), "gpus": torch.cuda.device_count()}
    for shape in SHAPES:
        case = Case(num_ranks=args.ranks, **shape)
        # Stock's all-to-all is NCCL's, which refuses ranks that share a GPU.
        backend = "cpu:gloo,cuda:nccl"
        found = run_ranks(run_case, args.ranks, dataclasses.asdict(case), args.rounds, args.profile, backend=backend)
        records = [facts | record for record in found]
        append(args.out, records)
        print(f"\n{title(records)}\n\n{table(records)}\n", flush=True)


if __name__ == "__main__":
    main()
