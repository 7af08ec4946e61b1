"""What telemetry costs a training step: the time that it takes from the training thread, and from its own.

    python -m benchmarks.telemetry                            # preset demo, 2 ranks, files only
    python -m benchmarks.telemetry --ray --rounds 4           # Ray's metrics too; starts a Ray for each rank
    python -m benchmarks.telemetry --preset tiny --steps 20

Runs with and without telemetry take turns. Two figures: the clock around everything that a step does for telemetry,
with the processor time of its thread, over the time of a step, as if nothing of it ran beside the step; and the
medians of steps with and without, whose difference is smaller than their noise.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from .records import RESULTS, Record, markdown_table
from .run import RunOptions, add_options, run_on_ranks

RESULTS_PATH = RESULTS / "telemetry.jsonl"
NAME = "telemetry"
_WARM_UP_STEPS = 5
_ROUTES_ROUNDS = 200


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A training run."""

    num_ranks: int
    preset: str
    steps: int
    ray: bool
    """Whether Ray's metrics are a sink too."""


class _ThreadProbe:
    """A sink that asks the flushing thread for its processor time, after all others."""

    def __init__(self) -> None:
        self.busy_s = 0.0

    def write(self, records: Any) -> None:
        """Nothing."""

    def close(self) -> None:
        """On the thread itself."""
        self.busy_s = time.thread_time()


class _Stopwatch:
    """Adds up the time inside the functions that it wraps."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start

        return timed


def main(argv: list[str] | None = None) -> None:
    """Run the case, append its lines, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="demo", help="size of the run (demo)")
    parser.add_argument("--ranks", type=int, default=2, metavar="N", help="processes (2)")
    parser.add_argument("--steps", type=int, default=60, metavar="N", help="steps of each run (60)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="runs with, and as many without (3)")
    parser.add_argument("--ray", action="store_true", help="Ray's metrics too")
    add_options(parser, RESULTS_PATH)
    args = parser.parse_args(argv)
    case = Case(num_ranks=args.ranks, preset=args.preset, steps=args.steps, ray=args.ray)
    print(table(run_case(case, num_rounds=args.rounds, options=RunOptions.of(args))))


def run_case(case: Case, *, num_rounds: int, options: RunOptions) -> list[Record]:
    """Append the lines of one case and return them."""
    return run_on_ranks(NAME, _on_rank, dataclasses.asdict(case), num_rounds=num_rounds, options=options)


def table(records: list[Record]) -> str:
    """One row per variant, and what the parts cost."""
    header = ["variant", "ms per step", "µs of the step", "µs of the thread", "share of a step"]
    rows = [
        [
            record["variant"],
            f"{record['step_ms']:.2f}",
            f"{record['step_us']:.1f}",
            f"{record['thread_us']:.1f}",
            f"{record['share']:.3%}",
        ]
        for record in records
    ]
    return markdown_table(header, rows)


def _on_rank(case: Record, num_rounds: int, nice: int) -> list[Record]:
    """All runs, on one rank; figures are this rank's."""
    from train.trainer import quiet_deepspeed

    quiet_deepspeed()
    found: dict[bool, list[Record]] = {False: [], True: []}
    with _ray(case["ray"]), tempfile.TemporaryDirectory(prefix="ray_deepep_telemetry_") as own:
        folders = [own]
        dist.broadcast_object_list(folders, src=0)
        for number in range(num_rounds):
            for with_telemetry in (False, True):
                out = Path(folders[0], f"{number}-{with_telemetry}")
                found[with_telemetry].append(_run(case, out, with_telemetry))
        dist.barrier()
    return [_record(case, name, found[on]) for name, on in (("without", False), ("with", True))]


def _run(case: Record, out: Path, with_telemetry: bool) -> Record:
    """One training run: median ms of a step, µs per step on the training thread and on the other."""
    from train import trainer
    from train.metrics import read_metrics
    from train.presets import get_preset
    from train.telemetry import TelemetryOptions

    fields = {"out_dir": str(out), "steps": case["steps"], "telemetry": with_telemetry, "backend": "ray_deepep"}
    fields |= {"eval_every": 0, "checkpoint_every": 0, "sample_tokens": 0, "device": "cpu", "progress": False}
    config = get_preset(case["preset"]).replace(**{f"run.{name}": value for name, value in fields.items()})
    watch, probe = _Stopwatch(), _ThreadProbe()
    sinks = (*_sinks(case["ray"]), probe) if with_telemetry else ()
    # Counters are taken without telemetry too, for the metrics file; what it adds to them is counted below.
    with mock.patch.object(trainer, "record_step", watch.wrap(trainer.record_step)):
        trainer.run(config, telemetry=TelemetryOptions(sinks=sinks))
    steps = [m.step_ms for m in read_metrics(out / "metrics.jsonl")][_WARM_UP_STEPS:]
    added_us = watch.seconds * 1e6 / case["steps"] + _count_us(config) if with_telemetry else 0.0
    return {
        "step_ms": statistics.median(steps),
        "step_us": added_us,
        "thread_us": probe.busy_s * 1e6 / case["steps"],
    }


def _count_us(config: Any) -> float:
    """µs that a step counts: drops and tokens per expert of each dispatch, the core's counters twice."""
    from ray_deepep.telemetry import CommRecorder, TransportCounters

    model, optim = config.model, config.optim
    tokens, world = optim.micro_batch * config.data.seq_len, dist.get_world_size()
    topk_idx = torch.randint(model.num_experts, (tokens, model.num_topk))
    counts = (tokens,) * (model.num_experts // model.resolve_ep_size(world))
    counters = TransportCounters(wait_ns=(1,) * world, recv_bytes=(1,) * world, heap_bytes=1)
    recorder, dispatches = CommRecorder(), model.num_layers * optim.grad_accum
    start = time.perf_counter()
    for _ in range(_ROUTES_ROUNDS):
        for _ in range(dispatches):
            recorder.add_routes(counts, int((topk_idx < 0).sum()))
        recorder.stats(counters, reset=True)
        recorder.stats(counters, reset=True)
    return (time.perf_counter() - start) * 1e6 / _ROUTES_ROUNDS


def _record(case: Record, variant: str, runs: list[Record]) -> Record:
    medians = {name: round(statistics.median(run[name] for run in runs), 4) for name in runs[0]}
    share = (medians["step_us"] + medians["thread_us"]) / (medians["step_ms"] * 1e3)
    return {"config": case, "variant": variant, "num_rounds": len(runs), **medians, "share": round(share, 6)}


def _sinks(with_ray: bool) -> tuple[Any, ...]:
    if not with_ray:
        return ()
    from ray_deepep.cluster.metrics import RayMetricsSink

    return (RayMetricsSink(run="benchmark", rank=dist.get_rank(), ranks=range(dist.get_world_size())),)


@contextlib.contextmanager
def _ray(wanted: bool) -> Iterator[None]:
    """A Ray of this rank's own."""
    if not wanted:
        yield
        return
    import ray

    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
