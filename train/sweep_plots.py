"""Pictures of a sweep as PNG, drawn without a display."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from train.metrics import read_metrics
from train.sweep_results import DONE, Efficiency, Row, columns, ranked

_MOST_CURVES = 12


def plot_sweep(rows: list[Row], metric: str, path: Path) -> bool:
    """The metric over each parameter, a dot per trial, the best in colour. False, and no file, if none is done."""
    done = [row for row in ranked(rows, metric) if row.status == DONE and metric in row.metrics]
    if not done:
        return False
    names = columns(rows) or ["trial"]
    figure = _figure(width=4.2 * len(names))
    for index, name in enumerate(names):
        axes = figure.add_subplot(1, len(names), index + 1)
        values = [row.trial.values.get(name, row.trial.index) for row in done]
        named = any(isinstance(value, str) for value in values)
        xs = [str(value) for value in values] if named else values
        ys = [row.metrics[metric] for row in done]
        axes.scatter(xs, ys, color="C0", alpha=0.6)
        axes.scatter(xs[:1], ys[:1], color="C3", zorder=3, label=f"best: trial {done[0].trial.name}")
        axes.set(xlabel=name, ylabel=metric if index == 0 else "")
        if name == "lr":
            axes.set_xscale("log")
        axes.grid(alpha=0.3)
        if index == 0:
            axes.legend()
    figure.savefig(path)
    return True


def plot_curves(rows: list[Row], metric: str, path: Path) -> bool:
    """Training loss over steps of the best trials. False, and no file, if no trial has metrics."""
    figure = _figure(width=8)
    axes, drawn = figure.add_subplot(), 0
    for row in ranked(rows, metric)[:_MOST_CURVES]:
        metrics = Path(row.folder) / "metrics.jsonl"
        if not metrics.is_file():
            continue
        steps = read_metrics(metrics)
        label = ", ".join(f"{name} {value}" for name, value in row.trial.values.items()) or row.trial.name
        axes.plot([m.step for m in steps], [m.loss for m in steps], lw=1.2, label=f"{row.trial.name}: {label}")
        drawn += 1
    if not drawn:
        return False
    axes.set(xlabel="step", ylabel="cross-entropy per token (nats)", title=f"best {drawn} by {metric}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(path)
    return True


def plot_scaling(found: list[Efficiency], path: Path) -> bool:
    """Speed-up and efficiency over workers, beside the ideal. False, and no file, without a study."""
    if not found:
        return False
    figure = _figure(width=9)
    left, right = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
    workers = sorted({entry.num_workers for entry in found})
    left.plot(workers, [n / workers[0] for n in workers], "k:", label="ideal")
    right.axhline(1.0, color="k", ls=":")
    for index, mode in enumerate(dict.fromkeys(entry.mode for entry in found)):
        chosen = [entry for entry in found if entry.mode == mode]
        xs = [entry.num_workers for entry in chosen]
        left.plot(xs, [entry.speedup for entry in chosen], "o-", color=f"C{index}", label=mode)
        right.plot(xs, [entry.efficiency for entry in chosen], "o-", color=f"C{index}", label=mode)
    left.set(xlabel="workers", ylabel="speed-up")
    right.set(xlabel="workers", ylabel="efficiency", ylim=(0, 1.15))
    for axes in (left, right):
        axes.set_xticks(workers)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path)
    return True


def _figure(*, width: float) -> Figure:
    figure = Figure(figsize=(max(width, 5), 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure
