"""A large matrix product beside dispatch and combine (``async_op``): both alone, and together.

    python -m benchmarks.cuda_overlap                        # 2 ranks, 4, 8, 16 and 24 SMs; table, lines and plot
    python -m benchmarks.cuda_overlap --product 8192 7168 8192
    python -m benchmarks.cuda_overlap --draw                 # the plot again, from the newest lines

The operation is launched first, on its buffer's own stream, the product right after it on the current one. *together*
is from the start of both to the end of both; *told*: the same, where the product leaves the operation its SMs
(``ray_deepep.leave_sms``); *hidden* is how much of the shorter of the two the longer one covers, together / told.
Times are medians of the slowest rank. Before each round the L2 is flushed, the GPU is busy until all is launched, and
ranks begin together. Plans are cached and rows lie in the heap.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from ray_deepep import Buffer, CommConfig, Communicator, TokenMajor, Work, leave_sms

from .cuda_timing import NUM_WARMUP, Stopwatch
from .cuda_traffic import Case, Inputs, Traffic
from .plots import plot_cuda_overlap
from .ranks import run_ranks
from .records import RESULTS, ROOT, Record, append, latest, markdown_table, run_facts

NAME = "cuda_overlap"
RESULTS_PATH = RESULTS / f"{NAME}.jsonl"
IMAGE_PATH = ROOT / "docs" / "images" / f"{NAME}.png"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What is timed, and how often."""

    num_sms: tuple[int, ...]
    product: tuple[int, int, int]
    """M, N and K of the bfloat16 product ``[M, K] @ [K, N]``."""
    num_rounds: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """One round, us since both were started."""

    whole: float
    product: float | None = None
    operation: float | None = None


class OverlapRun:
    """All pairs on one rank."""

    def __init__(self, case: Case, options: Options) -> None:
        self.case, self.options = case, options
        self.rank = dist.get_rank()
        torch.cuda.set_device(self.rank % torch.cuda.device_count())
        self.inputs = Inputs.make(case, self.rank)
        self.clock, self.side = Stopwatch(options.num_rounds), torch.cuda.Stream()
        m, n, k = options.product
        self.factors = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in ((m, k), (k, n))]
        self.out = torch.empty(m, n, device="cuda", dtype=torch.bfloat16)

    def run(self) -> list[Record]:
        """A record per operation and number of SMs; the same on every rank."""
        case, inputs, records = self.case, self.inputs, []
        traffic = Traffic.of(case, inputs.topk_idx)
        rows = case.num_tokens + max(traffic.num_rows(None))
        with Communicator.from_process_group(config=CommConfig(transport="cuda")) as comm:
            buffer = Buffer(
                comm,
                num_experts=case.num_experts,
                hidden=case.hidden,
                num_topk=case.num_topk,
                max_tokens=case.num_tokens,
                symm_bytes=rows * case.hidden * inputs.x.element_size() + (1 << 20),
            )
            operations = self._operations(buffer)
            turns = [(name, num_sms) for name in operations for num_sms in self.options.num_sms]
            for name, num_sms in tqdm(turns, desc=case.title, unit="pair", disable=self.rank != 0):
                records.append(self._pair(name, num_sms, operations[name]))
            buffer.check()
        return records

    def _operations(self, buffer: Buffer) -> dict[str, Callable[[int], Work]]:
        inputs = self.inputs
        x = buffer.symm_empty(self.case.num_tokens, inputs.x.dtype)
        x.copy_(inputs.x)
        arrived = buffer.dispatch(x, inputs.topk_idx, inputs.topk_weights, layout=TokenMajor())
        rows = buffer.symm_empty(arrived.x.shape[0], arrived.x.dtype)
        rows.copy_(arrived.x)
        return {
            "dispatch": lambda num_sms: buffer.dispatch(x, handle=arrived.handle, num_sms=num_sms, async_op=True),
            "combine": lambda num_sms: buffer.combine(rows, arrived.handle, num_sms=num_sms, async_op=True),
        }

    def _pair(self, name: str, num_sms: int, operation: Callable[[int], Work]) -> Record:
        alone = self._median(lambda: self._round(lambda: operation(num_sms), product=False))
        product = self._median(lambda: self._round(None, product=True))
        both = self._median(lambda: self._round(lambda: operation(num_sms), product=True))
        with leave_sms(num_sms):
            told = self._median(lambda: self._round(lambda: operation(num_sms), product=True))
        saved = alone["whole"] + product["whole"] - both["whole"]
        return {
            "config": {**dataclasses.asdict(self.case), "product": list(self.options.product)},
            "operation": name,
            "num_sms": num_sms,
            "operation_alone_us": alone["whole"],
            "product_alone_us": product["whole"],
            "together_us": both["whole"],
            "operation_together_us": both["operation"],
            "product_together_us": both["product"],
            "told_together_us": told["whole"],
            "hidden": round(saved / min(alone["whole"], product["whole"]), 4),
        }

    def _median(self, sample: Callable[[], Sample]) -> dict[str, float]:
        """Medians of this rank's rounds, then the largest of all ranks."""
        samples = [sample() for _ in range(self.options.num_rounds + NUM_WARMUP)][NUM_WARMUP:]
        columns = {name: [getattr(s, name) for s in samples] for name in ("whole", "product", "operation")}
        own = {name: statistics.median(values) for name, values in columns.items() if None not in values}
        everyone: list[dict[str, float]] = [own] * dist.get_world_size()
        dist.all_gather_object(everyone, own)
        return {name: round(max(each[name] for each in everyone), 2) for name in own}

    def _round(self, operation: Callable[[], Work] | None, *, product: bool) -> Sample:
        start, product_end, operation_end, end = (torch.cuda.Event(enable_timing=True) for _ in range(4))
        self.clock.prepare(idle=False)
        start.record()
        work = None if operation is None else operation()
        if product:
            torch.mm(*self.factors, out=self.out)
            product_end.record()
        if work is not None:
            with torch.cuda.stream(self.side):
                self.side.wait_event(work.event)
                operation_end.record()
            work.wait()
        end.record()
        torch.cuda.synchronize()
        return Sample(
            whole=start.elapsed_time(end) * 1e3,
            product=start.elapsed_time(product_end) * 1e3 if product else None,
            operation=None if work is None else start.elapsed_time(operation_end) * 1e3,
        )


def run_case(case: Record, options: Record) -> list[Record]:
    """One case; called on every rank."""
    return OverlapRun(Case(**case), Options(**options)).run()


def hidden(record: Record) -> list[float]:
    """Shares of the shorter one that the longer one covers: together, and told if that was measured."""
    alone = record["operation_alone_us"], record["product_alone_us"]
    both = [record[name] for name in ("together_us", "told_together_us") if name in record]
    return [(sum(alone) - us) / min(alone) for us in both]


def table(records: list[Record]) -> str:
    """All pairs."""
    rows = [
        [
            r["operation"],
            str(r["num_sms"]),
            f"{r['operation_alone_us']:.0f}",
            f"{r['product_alone_us']:.0f}",
            f"{r['operation_alone_us'] + r['product_alone_us']:.0f}",
            f"{r['together_us']:.0f}",
            f"{r['operation_together_us']:.0f}",
            f"{r['product_together_us']:.0f}",
            f"{r['told_together_us']:.0f}" if "told_together_us" in r else "",
            " / ".join(f"{share:.0%}" for share in hidden(r)),
        ]
        for r in records
    ]
    header = ["operation", "SMs", "alone, us", "product alone", "one after the other", "together"]
    return markdown_table([*header, "operation done", "product done", "told", "hidden"], rows)


def draw(records: list[Record], image: Path) -> None:
    """Plot the records of one case."""
    plot_cuda_overlap(records, image)
    print(f"plot: {image}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=4096, help="T, per rank")
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--num-sms", type=int, nargs="+", default=[4, 8, 16, 24])
    parser.add_argument("--product", type=int, nargs=3, default=[8192, 7168, 4096], metavar=("M", "N", "K"))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, default=RESULTS_PATH, help="results file to append to, or to draw")
    parser.add_argument("--image", type=Path, default=IMAGE_PATH, help="PNG to write")
    parser.add_argument("--draw", action="store_true", help="time nothing; draw the newest lines of the results file")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.draw:
        found = latest(args.out)
        if not found:
            raise SystemExit(f"{args.out}: no results to draw")
        newest = max(record["run"] for record in found)
        draw([record for record in found if record["run"] == newest], args.image)
        return
    case = Case(
        num_ranks=args.ranks,
        num_tokens=args.tokens,
        hidden=args.hidden,
        num_topk=args.topk,
        num_experts=args.experts,
        dtype="bfloat16",
        routing="uniform",
    )
    options = Options(num_sms=tuple(args.num_sms), product=tuple(args.product), num_rounds=args.rounds)
    gpus = torch.cuda.device_count()
    facts = {**run_facts(), "benchmark": NAME, "gpu": torch.cuda.get_device_name(), "gpus": gpus}
    found = run_ranks(run_case, case.num_ranks, dataclasses.asdict(case), dataclasses.asdict(options))
    records = [facts | {"shared_gpu": gpus < case.num_ranks} | record for record in found]
    append(args.out, records)
    m, n, k = options.product
    print(f"\n{case.title}, beside [{m}, {k}] @ [{k}, {n}] bfloat16, {gpus} {facts['gpu']}\n\n{table(records)}\n")
    draw(records, args.image)


if __name__ == "__main__":
    main()
