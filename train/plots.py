"""Loss curves as PNG, drawn without a display."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from train.metrics import StepMetrics


def plot_losses(runs: dict[str, list[StepMetrics]], path: Path, *, title: str) -> None:
    """Draw training (lines) and validation (dots) loss of each labelled run over its steps."""
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for index, (label, steps) in enumerate(runs.items()):
        color = f"C{index}"
        style = "-" if index == 0 else "--"
        axes.plot(
            [m.step for m in steps], [m.loss for m in steps], style, color=color, lw=1.2, label=f"{label}: training"
        )
        validated = [m for m in steps if m.val_loss is not None]
        if validated:
            xs, ys = [m.step for m in validated], [m.val_loss for m in validated]
            axes.plot(xs, ys, "o", color=color, mec="black", ms=6, label=f"{label}: validation")
    axes.set(xlabel="step", ylabel="cross-entropy per token (nats)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
