"""Bar charts of results as PNG, drawn without a display."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .cuda_summary import COMPARED_SMS, chief_rows
from .records import Record, by_case, machine

_KIND_COLORS = {
    "core": "tab:green",
    "reference": "tab:olive",
    "gloo": "tab:red",
    "gloo_wire": "tab:pink",
    "memcpy_ready": "tab:gray",
    "memcpy_fresh": "tab:gray",
}
_PART_COLORS = {"experts": "tab:blue", "gate": "tab:cyan", "waiting": "lightgray", "communication": "tab:red"}


def plot_dispatch_combine(records: list[Record], path: Path) -> None:
    """Median ms of each variant with its 10th to 90th percentile, a panel per rank count."""
    figure, panels = _panels(records, height=4.6)
    for axes, (num_ranks, found) in zip(panels, _by_ranks(records).items()):
        times = [record["median_ms"] for record in found]
        spread = [
            [record["median_ms"] - record["p10_ms"] for record in found],
            [record["p90_ms"] - record["median_ms"] for record in found],
        ]
        colors = [_KIND_COLORS[record["kind"]] for record in found]
        bars = axes.barh([record["variant"] for record in found], times, color=colors, xerr=spread, capsize=2)
        axes.bar_label(bars, fmt="%.1f", padding=4, fontsize=8)
        axes.set(title=f"{num_ranks} ranks", xlabel="dispatch + combine, ms (median, p10 to p90)")
        axes.margins(x=0.15)
    config = records[0]["config"]
    sizes = f"{config['num_tokens']} tokens × {config['hidden']} {config['dtype']}"
    figure.suptitle(f"{sizes}, top-{config['num_topk']} of {config['num_experts']} experts, {machine(records[0])}")
    _save(figure, path)


def plot_deepspeed_layer(records: list[Record], path: Path) -> None:
    """Median ms of forward + backward, split into experts, gate, communication and waiting, a panel per case."""
    cases = by_case(records)
    figure = Figure(figsize=(11, 3.2 * -(-len(cases) // 2)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(-(-len(cases) // 2), min(len(cases), 2), sharey=True, squeeze=False).flat)
    panels[0].invert_yaxis()  # the first variant on top, in all panels: they share the axis
    for axes, found in zip(panels, cases):
        names, left = [record["variant"] for record in found], [0.0] * len(found)
        for part, color in _PART_COLORS.items():
            values = [_split(record)[part] for record in found]
            axes.barh(names, values, left=left, color=color, label=part)
            left = [a + b for a, b in zip(left, values)]
        for row, (record, end) in enumerate(zip(found, left)):
            axes.text(end, row, f" {record['median_ms']:.0f}", va="center", fontsize=8)
        config = found[0]["config"]
        sizes = f"{config['num_tokens']} × {config['hidden']}, top-{config['k']} of {config['num_experts']}"
        axes.set(title=f"{sizes}, {config['num_ranks']} ranks", xlabel="forward + backward, ms (median)")
        axes.margins(x=0.15)
    panels[0].legend(fontsize=8, loc="lower right")
    capacity = records[0]["config"]["capacity_factor"]
    figure.suptitle(f"deepspeed.moe.layer.MoE, capacity {capacity}, {machine(records[0])}")
    _save(figure, path)


def plot_cuda_dispatch_combine(records: list[Record], path: Path) -> None:
    """Ours beside NCCL and the floor, a panel per case."""
    cases = by_case(records)
    figure = Figure(figsize=(9.5, 5.2 * len(cases)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, found in zip(figure.subplots(len(cases), 1, squeeze=False)[:, 0], cases):
        rows = [row for row in chief_rows(found) if COMPARED_SMS in row.times]
        places = range(len(rows))
        ours = axes.barh([p - 0.2 for p in places], [row.times[COMPARED_SMS] for row in rows], 0.38, color="tab:green")
        compared = [(place + 0.2, row.nccl) for place, row in zip(places, rows) if row.nccl is not None]
        nccl = axes.barh([place for place, _ in compared], [us for _, us in compared], 0.38, color="tab:red")
        floors = axes.vlines(
            [row.floor for row in rows], [p - 0.4 for p in places], [p + 0.02 for p in places], "black"
        )
        for bars in (ours, nccl):
            axes.bar_label(bars, fmt="%.0f", padding=6, fontsize=8)
        axes.set_yticks(list(places), [row.name for row in rows], fontsize=8)
        axes.invert_yaxis()
        axes.margins(x=0.08, y=0.01)
        axes.legend([ours, nccl, floors], [f"ours, {COMPARED_SMS} SMs", "NCCL", "floor: the wire alone"], fontsize=8)
        config = found[0]["config"]
        sizes = f"{config['num_tokens']} tokens × {config['hidden']}, top-{config['num_topk']}"
        title = f"{sizes} of {config['num_experts']}, {config['num_ranks']} ranks, {machine(found[0])}"
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("us, GPU busy until the call is launched (median of the slowest rank)")
    _save(figure, path)


def plot_cuda_overlap(records: list[Record], path: Path) -> None:
    """One after the other against together, per number of SMs, a panel per operation."""
    names = list(dict.fromkeys(record["operation"] for record in records))
    figure = Figure(figsize=(4.8 * len(names), 4.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(1, len(names), sharey=True, squeeze=False)[0])
    for axes, name in zip(panels, names):
        found = [record for record in records if record["operation"] == name]
        places = range(len(found))
        products, alone = ([r[key] for r in found] for key in ("product_alone_us", "operation_alone_us"))
        left, middle, right = ([place + shift for place in places] for shift in (-0.27, 0.0, 0.27))
        axes.bar(left, products, 0.25, color="tab:blue", label="product alone")
        axes.bar(left, alone, 0.25, bottom=products, color="tab:red", label=f"{name} alone")
        ways = {"together_us": (middle, "tab:gray", "together"), "told_together_us": (right, "tab:green", "SMs left")}
        for key, (where, color, label) in ways.items():
            if all(key in r for r in found):
                times = [r[key] for r in found]
                covered = [(sum(each) - us) / min(each) for each, us in zip(zip(products, alone), times)]
                bars = axes.bar(where, times, 0.25, color=color, label=label)
                axes.bar_label(bars, [f"{us:.0f}\n{share:.0%}" for us, share in zip(times, covered)], fontsize=7)
        axes.set_xticks(list(places), [str(r["num_sms"]) for r in found])
        axes.set(title=name, xlabel=f"SMs of {name}")
        axes.margins(y=0.2)
        axes.legend(fontsize=8, loc="upper right")
    panels[0].set_ylabel("us (median of the slowest rank)")
    config = records[0]["config"]
    m, n, k = config["product"]
    sizes = f"{config['num_tokens']} tokens × {config['hidden']}, top-{config['num_topk']} of {config['num_experts']}"
    figure.suptitle(f"{sizes}, {config['num_ranks']} ranks; [{m}, {k}] @ [{k}, {n}]; {records[0]['gpu']}", fontsize=10)
    _save(figure, path)


def _split(record: Record) -> dict[str, float]:
    """Parts that add up to the whole. Waiting is what is left: for ranks that compute longer, and for the processor."""
    parts, communication = record["parts"], record["aligned_parts"]["communication"]
    split = {"experts": parts["experts"], "gate": parts["gate"], "communication": communication}
    return split | {"waiting": max(record["median_ms"] - sum(split.values()), 0.0)}


def _by_ranks(records: list[Record]) -> dict[int, list[Record]]:
    groups: dict[int, list[Record]] = {}
    for record in records:
        groups.setdefault(record["config"]["num_ranks"], []).append(record)
    return groups


def _panels(records: list[Record], *, height: float) -> tuple[Figure, list[Axes]]:
    groups = _by_ranks(records)
    figure = Figure(figsize=(4.8 * len(groups) + 2, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(1, len(groups), sharey=True, squeeze=False)[0])
    panels[0].invert_yaxis()  # the first variant on top, in all panels: they share the axis
    return figure, panels


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
