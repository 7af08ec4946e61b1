"""A DeepSpeed MoE layer, stock and swapped: forward and backward as a whole, and the share of communication.

    python -m benchmarks.deepspeed_layer             # all cases
    python -m benchmarks.deepspeed_layer --first     # the cases of README.md alone
    python -m benchmarks.deepspeed_layer --hidden 1024 --rounds 20

The layer is ``deepspeed.moe.layer.MoE`` alone (no engine): float32, experts hidden → hidden → hidden with a GELU
between, capacity factor 1.25, the same weights and inputs in all variants. What counts as communication is in
``layer_clock.py``; it is the same for stock and swapped.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .records import RESULTS, Record, markdown_table, summarise
from .run import RunOptions, add_options, run_on_ranks
from .timing import Variant, measure

if TYPE_CHECKING:
    from deepspeed.moe.layer import MoE

    from ray_deepep.deepspeed import Swap

RESULTS_PATH = RESULTS / "deepspeed_layer.jsonl"
NAME = "deepspeed_layer"
EXPLANATION = (
    "`deepspeed.moe.layer.MoE`, float32, experts hidden → hidden → hidden, capacity factor 1.25; "
    "stock, and swapped with `attach(model, SwapConfig(layout=..., combine=...))`, in turns. *Communication* is all of "
    "the layer's time, forward and backward, outside its gate and its experts: encoding, all-to-all, decoding. It is "
    "measured by the same hooks on either, in runs in which ranks meet before each exchange, so that waiting for a "
    "rank that computes longer is not in it. *Share* is this time in the whole; *CPU ms* is its processor time, mean "
    "of the ranks."
)
_LARGE_TOKENS = 2048
SWAPS = (("padded", "exact"), ("padded", "fast"), ("compact", "exact"), ("compact", "fast"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes; tokens per rank."""

    num_ranks: int
    k: int = 2
    num_experts: int = 8
    num_tokens: int = 1024
    hidden: int = 512
    capacity_factor: float = 1.25

    @property
    def title(self) -> str:
        """In words."""
        sizes = f"{self.num_tokens} tokens × {self.hidden}, top-{self.k} of {self.num_experts}"
        return f"{sizes}, capacity {self.capacity_factor}, {self.num_ranks} ranks"


def cases(hidden: int) -> tuple[Case, ...]:
    """What is measured when nothing else is asked for; the last two move the rows of ``dispatch_combine``."""
    small = [
        Case(num_ranks=num_ranks, k=k, num_experts=num_experts, hidden=hidden)
        for num_experts in (8, 16)
        for k in (2, 1)
        for num_ranks in (2, 4)
    ]
    large = [Case(num_ranks=num_ranks, num_experts=16, num_tokens=_LARGE_TOKENS, hidden=1024) for num_ranks in (2, 4)]
    return (*small, *large)


class LayerVariant:
    """One copy of the layer, with its own swap if it has one."""

    def __init__(self, name: str, layer: MoE, x: Tensor, grad: Tensor) -> None:
        from .layer_clock import LayerClock

        self.name, self.layer = name, layer
        self._x, self._grad = x.clone().requires_grad_(), grad
        self._clock = LayerClock(layer.deepspeed_moe, each_expert=name != "stock")
        self.out: Tensor | None = None

    def variants(self) -> list[Variant]:
        """For ``measure``: one for the whole, one for its parts."""
        return [
            Variant(name=name, run=self.run, prepare=lambda aligned=aligned: self._prepare(aligned), parts=self._parts)
            for name, aligned in ((self.name, False), (f"{self.name}, aligned", True))
        ]

    def run(self) -> None:
        """Forward and backward."""
        self.out, _, _ = self.layer(self._x)
        self.out.backward(self._grad)
        self._clock.end_backward()

    def results(self) -> list[Tensor]:
        """Output, gradient of the input, gradients of the parameters, of one run."""
        self._prepare()
        self.run()
        return [self.out.detach(), self._x.grad, *(p.grad for p in self.layer.parameters())]

    def _parts(self) -> dict[str, float]:
        return self._clock.parts()

    def _prepare(self, aligned: bool = False) -> None:
        self._clock.aligned = aligned
        self.out = self._x.grad = None
        for parameter in self.layer.parameters():
            parameter.grad = None
        # Gates draw random numbers; all variants draw the same.
        torch.manual_seed(1234 + dist.get_rank())


def run_case(case_fields: dict[str, object], num_rounds: int, nice: int) -> list[Record]:
    """One case; called on every rank."""
    from ray_deepep.deepspeed import SwapConfig, attach

    case = Case(**case_fields)
    torch.manual_seed(dist.get_rank())
    x, grad = torch.randn(case.num_tokens, case.hidden), torch.randn(case.num_tokens, case.hidden)
    weights = _new_layer(case).state_dict()
    layers, swaps = [], []
    for settings in (None, *SWAPS):
        layer = _new_layer(case)
        layer.load_state_dict(weights)
        if settings is not None:
            swaps.append(attach(layer, SwapConfig(layout=settings[0], combine=settings[1])))
        name = "stock" if settings is None else f"{settings[0]}, {settings[1]}"
        layers.append(LayerVariant(name, layer, x, grad))
    expected = layers[0].results()
    errors = [_difference(layer.results(), expected) for layer in layers]
    timings = measure(
        [v for layer in layers for v in layer.variants()], num_rounds=num_rounds, nice=nice, title=case.title
    )
    num_bytes = [0, *(_bytes_per_run(swap, layer) for swap, layer in zip(swaps, layers[1:], strict=True))]
    for swap in swaps:
        swap.close()
    return [
        {
            "config": case_fields,
            "bytes": size,
            "max_difference": error,
            **summarise(whole),
            "aligned_parts": summarise(aligned)["parts"],
        }
        for whole, aligned, size, error in zip(timings[::2], timings[1::2], num_bytes, errors, strict=True)
    ]


def _new_layer(case: Case) -> MoE:
    import deepspeed
    from deepspeed.moe.layer import MoE

    # Compiling DeepSpeed's shared-memory op takes a minute, and no MoE layer uses it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.init_distributed("gloo", verbose=False)
    hidden = case.hidden
    with contextlib.redirect_stdout(None):  # DeepSpeed prints when it makes a group
        layer = MoE(
            hidden_size=hidden,
            expert=nn.Sequential(nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, hidden)),
            num_experts=case.num_experts,
            ep_size=case.num_ranks,
            k=case.k,
            capacity_factor=case.capacity_factor,
        )
        layer.set_deepspeed_parallelism()
    return layer


def _difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference of any rank, relative to the largest value of each tensor."""
    worst = max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) for a, b in zip(found, expected))
    worst_of_all = torch.tensor(worst)
    dist.all_reduce(worst_of_all, dist.ReduceOp.MAX)
    return float(worst_of_all)


def _bytes_per_run(swap: Swap, layer: LayerVariant) -> int:
    swap.comm_stats(reset=True)
    layer.results()
    stats = swap.comm_stats(reset=True)
    return int(stats["dispatch_bytes"] + stats["combine_bytes"])


def run_cases(chosen: list[Case], *, num_rounds: int, options: RunOptions) -> list[Record]:
    """Run all cases, append their lines to ``options.out``, and return them."""
    records: list[Record] = []
    for case in chosen:
        found = run_on_ranks(NAME, run_case, dataclasses.asdict(case), num_rounds=num_rounds, options=options)
        records += found
        print(f"\n{case.title}\n\n{parts_table(found)}\n", flush=True)
    return records


def parts_table(records: list[Record]) -> str:
    """All variants of one case: median ms of the whole, of its parts, and of communication alone."""
    alone = ("dispatch_forward", "combine_forward", "combine_backward", "dispatch_backward", "communication")
    rows = [
        [
            record["variant"],
            f"{record['median_ms']:.1f}",
            f"{record['p10_ms']:.1f}–{record['p90_ms']:.1f}",
            *(f"{record['parts'][name]:.1f}" for name in ("gate", "experts", "communication")),
            *(f"{record['aligned_parts'][name]:.2f}" for name in alone),
            f"{record['aligned_parts']['communication_cpu']:.2f}",
            f"{record['page_faults']:.0f}",
            f"{record['max_difference']:.0e}",
        ]
        for record in records
    ]
    header = ["variant", "ms", "p10–p90", "gate", "experts", "comm. and waiting"]
    header += ["disp. fwd", "comb. fwd", "comb. bwd", "disp. bwd", "comm.", "its CPU", "page faults", "difference"]
    return markdown_table(header, rows)


def summary_table(records: list[Record]) -> str:
    """Swapped against stock, for all cases."""
    stock = {json.dumps(r["config"]): r for r in records if r["variant"] == "stock"}
    rows = [_summary_row(r, stock[json.dumps(r["config"])]) for r in records if r["variant"] != "stock"]
    header = ["layer, forward + backward", "ranks", "ms, stock → ours", "faster", "communication ms", "less"]
    return markdown_table([*header, "share", "CPU ms"], rows)


def _summary_row(record: Record, stock: Record) -> list[str]:
    config, ms, stock_ms = record["config"], record["median_ms"], stock["median_ms"]
    ours, theirs = (r["aligned_parts"]["communication"] for r in (record, stock))
    cpu, stock_cpu = (r["aligned_parts"]["communication_cpu"] for r in (record, stock))
    sizes = f"{config['num_tokens']} × {config['hidden']}, top-{config['k']} of {config['num_experts']}"
    return [
        f"{sizes}: {record['variant']}",
        str(config["num_ranks"]),
        f"{stock_ms:.1f} → {ms:.1f}",
        f"**{stock_ms / ms:.2f}×**",
        f"{theirs:.1f} → {ours:.1f}",
        f"**{theirs / ours:.1f}×**",
        f"{theirs / stock_ms:.0%} → {ours / ms:.0%}",
        f"{stock_cpu:.1f} → {cpu:.1f}",
    ]


def is_headline(record: Record) -> bool:
    """The cases that stand for the others."""
    config = record["config"]
    return config["k"] == 2 and (config["num_experts"] == 8 or config["num_tokens"] == _LARGE_TOKENS)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30, help="times each variant is run (default 30)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="rank counts (default 2 4)")
    parser.add_argument("--hidden", type=int, default=512, help="hidden size of the small cases (default 512)")
    parser.add_argument("--first", action="store_true", help="the cases of README.md alone")
    add_options(parser, RESULTS_PATH)
    args = parser.parse_args(argv)
    chosen = [case for case in cases(args.hidden) if case.num_ranks in args.ranks]
    if args.first:
        chosen = [case for case in chosen if is_headline({"config": dataclasses.asdict(case)})]
    print(summary_table(run_cases(chosen, num_rounds=args.rounds, options=RunOptions.of(args))))


if __name__ == "__main__":
    main()
