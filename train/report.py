"""Tables and plots of finished runs.

python -m train.report runs/demo-stock runs/demo-ray_deepep --plot compare.png
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from train.api import CheckpointInfo, TrainSummary
from train.config import TrainConfig
from train.errors import ConfigError, DataError
from train.metrics import RunStats, StepMetrics, read_metrics, run_stats

_OPTIONAL = ("attention_ms", "gate_ms", "experts_ms", "memory_bytes")
"""What only runs with `run.split` know, and those of before memory was told."""


def format_summary(summary: TrainSummary) -> str:
    """The table printed at the end of a run."""
    stats = summary.stats
    resumed = f" (resumed from step {summary.resumed_from_step})" if summary.resumed_from_step else ""
    rows = [
        ("run", f"{summary.preset}, {summary.num_params / 1e6:.2f} M parameters, {stats.num_steps} steps{resumed}"),
        ("ranks", f"{summary.world_size} on {summary.device}, expert parallel {summary.ep_size}"),
        ("backend", summary.backend),
        ("loss, first → last", f"{stats.first_loss:.3f} → {stats.last_loss:.3f}"),
        ("validation loss", f"{stats.val_loss:.3f}"),
        ("tokens/s", f"{stats.tokens_per_s:,.0f}"),
        ("time per step", f"{stats.step_ms:.1f} ms (median)"),
        ("of it", _split_text(stats)),
        ("dispatch + combine", _comm_text(stats)),
        ("memory", _memory_text(summary)),
        ("checkpoint", str(summary.checkpoint_path or "none")),
        ("metrics", str(summary.metrics_path)),
        ("loss plot", str(summary.plot_path)),
    ]
    if summary.sample:
        rows.append(("sample text", str(summary.out_dir / "sample.txt")))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


class SummaryPrinter:
    """Callback that prints the summary table on rank 0 when a run ends."""

    def on_step(self, metrics: StepMetrics) -> None:
        """Nothing: the progress bar shows steps."""

    def on_checkpoint(self, info: CheckpointInfo) -> None:
        """Nothing: the summary names the newest."""

    def on_end(self, summary: TrainSummary) -> None:
        """Print the table once."""
        import torch.distributed as dist  # here alone: who prints a table of runs that have ended needs no torch

        if dist.get_rank() == 0:
            print(format_summary(summary), flush=True)


def _split_text(stats: RunStats) -> str:
    names = ("forward", "backward", "optimizer", "attention", "gate", "experts")
    times = {name: getattr(stats, f"{name}_ms") for name in names}
    return ", ".join(f"{name} {ms:.1f}" for name, ms in times.items() if not math.isnan(ms))


def _memory_text(summary: TrainSummary) -> str:
    if math.isnan(summary.stats.memory_bytes):
        return "not looked at"
    where = "GPU" if summary.device == "cuda" else "process"
    return f"{summary.stats.memory_bytes / 1e9:.2f} GB of rank 0's {where}"


def _comm_text(stats: RunStats) -> str:
    total = stats.dispatch_ms + stats.combine_ms
    return f"{total:.1f} ms, {stats.comm_share:.1%} of a step ({stats.dispatch_ms:.1f} + {stats.combine_ms:.1f})"


def format_comparison(runs: dict[str, RunStats]) -> str:
    """A table with one column for each run and, for two runs, the ratio first / second of each time."""
    rows: list[tuple[str, str, bool]] = [
        ("steps", "num_steps", False),
        ("first loss", "first_loss", False),
        ("last loss", "last_loss", False),
        ("validation loss", "val_loss", False),
        ("tokens/s", "tokens_per_s", True),
        ("ms per step", "step_ms", True),
        ("forward ms", "forward_ms", True),
        ("backward ms", "backward_ms", True),
        ("optimizer ms", "optimizer_ms", True),
        ("attention ms", "attention_ms", True),
        ("gate ms", "gate_ms", True),
        ("dispatch ms", "dispatch_ms", True),
        ("experts ms", "experts_ms", True),
        ("combine ms", "combine_ms", True),
        ("share of dispatch + combine", "comm_share", True),
        ("memory of rank 0, GB", "memory_bytes", True),
    ]
    labels = list(runs)
    with_ratio = len(labels) == 2
    table = [["", *labels, *(["ratio"] if with_ratio else [])]]
    for title, name, is_cost in rows:
        values = [getattr(stats, name) for stats in runs.values()]
        if name in _OPTIONAL and all(math.isnan(value) for value in values):
            continue
        cells = [_cell(name, value) for value in values]
        if with_ratio:
            cells.append(f"{values[0] / values[1]:.2f}" if is_cost and values[1] else "")
        table.append([title, *cells])
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in table
    )


def _cell(name: str, value: float) -> str:
    if name == "comm_share":
        return f"{value:.1%}"
    if name == "num_steps":
        return str(value)
    if name == "memory_bytes":
        return f"{value / 1e9:.2f}"
    return f"{value:,.0f}" if name == "tokens_per_s" else f"{value:.4f}" if "loss" in name else f"{value:.2f}"


def load_run(path: Path) -> tuple[str, list[StepMetrics]]:
    """Label and steps of a run's folder, or of a metrics file. Raises DataError if there are none."""
    metrics_path = path / "metrics.jsonl" if path.is_dir() else path
    steps = read_metrics(metrics_path) if metrics_path.is_file() else []
    if not steps:
        raise DataError(str(metrics_path), "holds no steps", "Give the folder of a run, or its metrics.jsonl")
    config_path = metrics_path.parent / "config.json"
    label = TrainConfig.from_file(config_path).run.backend if config_path.is_file() else metrics_path.parent.name
    return label, steps


def compare_runs(paths: list[Path], *, plot: Path | None = None) -> str:
    """The comparison table of several runs; draws their curves to `plot` if given.

    Runs are labelled by backend; a label that is taken gets the folder added.
    """
    runs: dict[str, list[StepMetrics]] = {}
    for path in paths:
        label, steps = load_run(path)
        if label in runs:
            label = f"{label} ({path})"
        runs[label] = steps
    if plot is not None:
        from train.plots import plot_losses  # matplotlib takes most of a second: not of those who only print

        plot_losses(runs, plot, title=" against ".join(runs))
    return format_comparison({label: run_stats(steps) for label, steps in runs.items()})


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs, or metrics files")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the loss curves of all runs")
    args = parser.parse_args(argv)
    try:
        print(compare_runs(args.runs, plot=args.plot))
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
