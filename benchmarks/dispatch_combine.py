"""Dispatch and combine against gloo and memcpy: how long rows take to their experts and back.

    python -m benchmarks.dispatch_combine            # all cases
    python -m benchmarks.dispatch_combine --first    # the first case of each rank count alone
    python -m benchmarks.dispatch_combine --rounds 50 --ranks 2

Experts are the identity and weights are left out, so that nothing but moving and adding is timed. *Same rows*: what is
compared moves equally many rows. Token-major sends one row per (token, rank), expert-major one per (token, expert).
*memcpy* copies as many bytes on each rank as dispatch delivers there and combine takes from there, all ranks at once,
with libc's memcpy, into memory that is ready (written before) or fresh (just allocated, as outputs of operations are).
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from ray_deepep import Buffer, CommConfig, Communicator, ExpertMajor, TokenMajor
from ray_deepep.handle import Layout

from .gloo_dispatcher import GlooDispatcher, exchange
from .records import RESULTS, Record, markdown_table, summarise
from .run import RunOptions, add_options, run_on_ranks
from .timing import Variant, measure

RESULTS_PATH = RESULTS / "dispatch_combine.jsonl"
NAME = "dispatch_combine"
EXPLANATION = (
    "Dispatch and combine with identity experts: time from the first rank's start to the last rank's end, median of "
    "rounds in which all ways take turns. *gloo* is a dispatcher over `all_to_all_single` (sort, gather, exchange of "
    "counts, all-to-all-v there and back, `index_add_`): one that moves the same rows as ours, and the plain one that "
    "moves a row per route (token, expert); *all-to-all alone* is the two row exchanges without the rest, same rows. "
    "*Rows in the heap*: tokens and expert outputs were made in tensors of `symm_empty`; elsewhere they are plain. "
    "*memcpy* copies as many bytes as dispatch delivers and combine takes, into memory that is ready or just allocated."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes; T and H per rank."""

    num_ranks: int
    num_tokens: int = 2048
    hidden: int = 1024
    num_topk: int = 2
    num_experts: int = 16
    dtype: str = "float32"

    @property
    def title(self) -> str:
        """In words."""
        sizes = f"{self.num_tokens} tokens × {self.hidden}, {self.dtype}, top-{self.num_topk} of {self.num_experts}"
        return f"{sizes}, {self.num_ranks} ranks"


CASES = tuple(
    Case(num_ranks=num_ranks, **sizes)
    for sizes in ({}, {"dtype": "bfloat16"}, {"hidden": 4096})
    for num_ranks in (2, 4)
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Inputs:
    x: Tensor
    topk_idx: Tensor
    topk_weights: Tensor


class CaseRun:
    """One case on one rank: builds the variants and times them."""

    def __init__(self, case: Case) -> None:
        self.case = case
        torch.manual_seed(dist.get_rank())
        shape = (case.num_tokens, case.hidden)
        topk_idx = torch.rand(case.num_tokens, case.num_experts).topk(case.num_topk).indices
        self.inputs = _Inputs(
            x=torch.randn(shape).to(getattr(torch, case.dtype)),
            topk_idx=topk_idx,
            topk_weights=torch.ones(topk_idx.shape),
        )
        self.facts: dict[str, Record] = {}
        """What is known of each variant besides its times."""

    def run(self, num_rounds: int, nice: int) -> list[Record]:
        """Records of all variants; the same on every rank but for ``bytes``, which is this rank's."""
        with self._buffer("shm") as core, self._buffer("reference") as reference:
            variants = [
                self._ours("core, token-major", "pairs", core, TokenMajor()),
                self._cached("core, token-major, cached plan", core),
                self._in_heap("core, token-major, rows in the heap", core),
                self._ours("core, expert-major exact", "routes", core, ExpertMajor(), reduce="exact"),
                self._ours("core, expert-major fast", "routes", core, ExpertMajor(), reduce="fast"),
                self._ours("reference, token-major", "pairs", reference, TokenMajor(), kind="reference"),
            ]
            for rows in ("pairs", "routes"):
                variants += self._baselines(rows)
            timings = measure(variants, num_rounds=num_rounds, nice=nice, title=self.case.title)
        config = dataclasses.asdict(self.case)
        return [{"config": config} | summarise(timing) | self.facts[timing.name] for timing in timings]

    @contextmanager
    def _buffer(self, transport: str) -> Iterator[Buffer]:
        case = self.case
        with Communicator.from_process_group(config=CommConfig(transport=transport, num_threads=1)) as comm:
            yield Buffer(
                comm,
                num_experts=case.num_experts,
                hidden=case.hidden,
                num_topk=case.num_topk,
                max_tokens=case.num_tokens,
                # Room for the tokens, and for the rows of all ranks.
                symm_bytes=(1 + case.num_ranks) * self.inputs.x.numel() * self.inputs.x.element_size() + (1 << 20),
            )

    def _variant(self, name: str, kind: str, rows: str, num_bytes: int, call: Callable[[], Tensor | None]) -> Variant:
        self.facts[name] = {"kind": kind, "rows": rows, "bytes": num_bytes, "max_error": self._error(rows, call())}
        return Variant(name=name, run=call)

    def _error(self, rows: str, out: Tensor | None) -> float | None:
        """Largest difference from what identity experts give; None for a plain copy."""
        if out is None:
            return None
        num_ranks = self.case.num_ranks
        destination = self.inputs.topk_idx // (self.case.num_experts // num_ranks)
        hits = torch.zeros(self.case.num_tokens, num_ranks).scatter_(1, destination, 1.0).sum(1, keepdim=True)
        times = hits if rows == "pairs" else float(self.case.num_topk)
        return float((out.float() - self.inputs.x.float() * times).abs().max())

    def _ours(
        self, name: str, rows: str, buffer: Buffer, layout: Layout, *, reduce: str = "exact", kind: str = "core"
    ) -> Variant:
        inputs = self.inputs

        def call() -> Tensor:
            arrived = buffer.dispatch(inputs.x, inputs.topk_idx, inputs.topk_weights, layout=layout)
            return buffer.combine(arrived.x, arrived.handle, reduce=reduce).x

        return self._variant(name, kind, rows, self._bytes_moved(buffer, call), call)

    def _cached(self, name: str, buffer: Buffer) -> Variant:
        inputs = self.inputs
        handle = buffer.dispatch(inputs.x, inputs.topk_idx, inputs.topk_weights).handle

        def call() -> Tensor:
            return buffer.combine(buffer.dispatch(inputs.x, handle=handle).x, handle).x

        return self._variant(name, "core", "pairs", self._bytes_moved(buffer, call), call)

    def _in_heap(self, name: str, buffer: Buffer) -> Variant:
        """The layer before made the tokens in the heap, and the experts their outputs."""
        inputs = self.inputs
        x = buffer.symm_empty(inputs.x.shape[0], inputs.x.dtype).copy_(inputs.x)
        arrived = buffer.dispatch(x, inputs.topk_idx, inputs.topk_weights).x
        rows = buffer.symm_empty(arrived.shape[0], arrived.dtype).copy_(arrived)

        def call() -> Tensor:
            handle = buffer.dispatch(x, inputs.topk_idx, inputs.topk_weights).handle
            return buffer.combine(rows, handle).x

        return self._variant(name, "core", "pairs", self._bytes_moved(buffer, call), call)

    def _bytes_moved(self, buffer: Buffer, call: Callable[[], Tensor]) -> int:
        buffer.stats(reset=True)
        call()
        stats = buffer.stats(reset=True)
        return stats.dispatch_bytes + stats.combine_bytes

    def _baselines(self, rows: str) -> list[Variant]:
        x, topk_idx = self.inputs.x, self.inputs.topk_idx
        dispatcher = GlooDispatcher(num_experts=self.case.num_experts, per_route=rows == "routes")
        received, sent = dispatcher.dispatch(x, topk_idx)
        there, home = x.index_select(0, sent.token), torch.empty(len(sent.token), x.shape[1], dtype=x.dtype)
        num_bytes = 2 * received.numel() * received.element_size()
        back, arrived = torch.empty_like(received), torch.empty_like(received)

        def whole() -> Tensor:
            result, handle = dispatcher.dispatch(x, topk_idx)
            return dispatcher.combine(result, handle, x.shape[0])

        def wire() -> None:
            exchange(there, sent.num_sent, sent.num_received, out=arrived)
            exchange(received, sent.num_received, sent.num_sent, out=home)

        def copy_to_ready() -> None:
            _memcpy(arrived, received)
            _memcpy(back, received)

        def copy_to_fresh() -> None:
            # Both alive at once, as a dispatch's and a combine's are.
            first, second = torch.empty_like(received), torch.empty_like(received)
            _memcpy(first, received)
            _memcpy(second, received)

        return [
            self._variant(f"gloo dispatcher, {rows}", "gloo", rows, num_bytes, whole),
            self._variant(f"gloo all-to-all-v alone, {rows}", "gloo_wire", rows, num_bytes, wire),
            self._variant(f"memcpy to ready memory, {rows}", "memcpy_ready", rows, num_bytes, copy_to_ready),
            self._variant(f"memcpy to fresh memory, {rows}", "memcpy_fresh", rows, num_bytes, copy_to_fresh),
        ]


def _memcpy(target: Tensor, source: Tensor) -> None:
    ctypes.memmove(target.data_ptr(), source.data_ptr(), source.numel() * source.element_size())


def run_case(case: dict[str, object], num_rounds: int, nice: int) -> list[Record]:
    """One case; called on every rank."""
    return CaseRun(Case(**case)).run(num_rounds, nice)


def run_cases(cases: list[Case], *, num_rounds: int, options: RunOptions) -> list[Record]:
    """Run all cases, append their lines to ``options.out``, and return them."""
    records: list[Record] = []
    for case in cases:
        found = run_on_ranks(NAME, run_case, dataclasses.asdict(case), num_rounds=num_rounds, options=options)
        records += found
        print(f"\n{case.title}\n\n{times_table(found)}\n", flush=True)
    return records


def times_table(records: list[Record]) -> str:
    """All variants of one case."""
    rows = [
        [
            record["variant"],
            f"{record['bytes'] / 1e6:.1f}",
            f"{record['median_ms']:.2f}",
            f"{record['p10_ms']:.2f}–{record['p90_ms']:.2f}",
            f"{record['cpu_median_ms']:.2f}",
            f"{record['page_faults']:.0f}",
            f"{record['bytes'] / record['median_ms'] / 1e6:.2f}",
            "" if record["max_error"] is None else f"{record['max_error']:.1e}",
        ]
        for record in records
    ]
    return markdown_table(
        ["variant", "MB a rank", "median ms", "p10–p90", "CPU ms", "page faults", "GB/s a rank", "max error"], rows
    )


def summary_table(records: list[Record]) -> str:
    """The core's variants of all cases, each beside the baselines of the same run."""
    rows = []
    for record in records:
        if record["kind"] == "core":
            same_case = [r for r in records if r["config"] == record["config"]]
            rows.append(_summary_row(record, {(r["kind"], r["rows"]): r["median_ms"] for r in same_case}))
    header = ["dispatch + combine", "ranks", "ms", "gloo, same rows", "gloo, row per route", "all-to-all alone"]
    return markdown_table([*header, "memcpy ms, ready / fresh", "ours / memcpy"], rows)


def _summary_row(record: Record, times: dict[tuple[str, str], float]) -> list[str]:
    config, rows, ours = record["config"], record["rows"], record["median_ms"]
    gloo, per_route, wire = times["gloo", rows], times["gloo", "routes"], times["gloo_wire", rows]
    ready, fresh = times["memcpy_ready", rows], times["memcpy_fresh", rows]
    sizes = f"{config['dtype']}, {config['num_tokens']} × {config['hidden']}"
    return [
        f"{sizes}: {record['variant'].split(', ', 1)[1]}",
        str(config["num_ranks"]),
        f"{ours:.2f}",
        f"{gloo:.1f} ms, **{gloo / ours:.1f}×**",
        f"{per_route:.1f} ms, **{per_route / ours:.1f}×**",
        f"{wire:.1f} ms, {wire / ours:.1f}×",
        f"{ready:.2f} / {fresh:.2f}",
        f"**{ours / ready:.2f}** / {ours / fresh:.2f}",
    ]


def is_headline(record: Record) -> bool:
    """The case that stands for the others."""
    return record["config"]["dtype"] == "float32" and record["config"]["hidden"] == 1024


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40, help="times each variant is run (default 40)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="rank counts (default 2 4)")
    parser.add_argument("--first", action="store_true", help="float32 × 1,024 alone")
    add_options(parser, RESULTS_PATH)
    args = parser.parse_args(argv)
    cases = [case for case in CASES if case.num_ranks in args.ranks]
    if args.first:
        cases = [case for case in cases if is_headline({"config": dataclasses.asdict(case)})]
    print(summary_table(run_cases(cases, num_rounds=args.rounds, options=RunOptions.of(args))))


if __name__ == "__main__":
    main()
