"""Findings of many machines side by side, and where they differ. Pure: ``cluster/doctor.py`` brings the findings."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

from .findings import Finding, Status, problem, warning, worst
from .report import finding_lines, paint

_INSTALLED = ("ray_deepep", "CPU core", "torch", "ray", "deepspeed")
"""Compared between all nodes: "not installed" is a difference too."""
_WHERE_PRESENT = (
    "CUDA core",
    "NVSHMEM",
    "NVSHMEM core",
    "CUDA runtime",
    "driver",
    "GPUs",
    "compute mode",
    "NVLink",
    "IB devices",
)
"""Compared between the nodes that have it: a head node without GPUs is usual."""
_MUST_BE_EQUAL = frozenset({"ray_deepep", "CPU core", "CUDA core", "NVSHMEM", "NVSHMEM core"})
"""Ranks refuse to meet, or read each other's memory wrongly, if these differ."""
_NAMED_NODES = 8
_COLUMNS = ("GPUs", "driver", "torch", "IB devices")


@dataclasses.dataclass(frozen=True, kw_only=True)
class NodeReport:
    """Findings of one node."""

    node_id: str
    host: str
    address: str
    findings: tuple[Finding, ...]

    def finding(self, name: str) -> Finding | None:
        """The finding of that name."""
        return next((finding for finding in self.findings if finding.name == name), None)

    def __str__(self) -> str:
        return f"{self.host} ({self.address}, node {self.node_id[:8]})"


def differences(nodes: Sequence[NodeReport]) -> list[Finding]:
    """One finding per thing in which nodes differ; empty if they agree."""
    found = []
    for name in (*_INSTALLED, *_WHERE_PRESENT):
        by_value: dict[str, list[NodeReport]] = collections.defaultdict(list)
        for node in nodes:
            finding = node.finding(name)
            if finding and (name in _INSTALLED or finding.status is not Status.NOT_APPLICABLE):
                by_value[finding.value].append(node)
        if len(by_value) > 1:
            make = problem if name in _MUST_BE_EQUAL else warning
            found.append(make(f"{name} differs", _groups(by_value), f"bring all nodes to one {name}"))
    return found


def _groups(by_value: dict[str, list[NodeReport]]) -> str:
    """The largest group first, without its names: they are not the odd ones."""
    (common, most), *others = sorted(by_value.items(), key=lambda item: -len(item[1]))
    alone = len(most) == 1
    texts = [f"{common} on {_names(most) if alone else f'{len(most)} nodes'}"]
    texts += [f"{value} on {_names(nodes)}" for value, nodes in others]
    return "; ".join(texts)


def _names(nodes: Sequence[NodeReport]) -> str:
    shown = ", ".join(str(node) for node in nodes[:_NAMED_NODES])
    return shown + (f" and {len(nodes) - _NAMED_NODES} more" if len(nodes) > _NAMED_NODES else "")


def node_lines(
    nodes: Sequence[NodeReport], found: Sequence[Finding], *, coloured: bool = False, columns: int | None = None
) -> list[str]:
    """A table with a line per node, then what is wrong on each, then where they differ."""
    lines = _table(nodes, coloured=coloured)
    for node in nodes:
        wrong = [finding for finding in node.findings if finding.status in (Status.WARNING, Status.PROBLEM)]
        if wrong:
            lines += ["", f"{node}:", *finding_lines(wrong, coloured=coloured, columns=columns)]
    num_examined = sum(node.finding("ray_deepep") is not None for node in nodes)
    if num_examined > 1:
        lines += ["", "differences between nodes:" if found else f"{num_examined} nodes agree"]
        lines += finding_lines(found, coloured=coloured, columns=columns)
    return lines


def _table(nodes: Sequence[NodeReport], *, coloured: bool) -> list[str]:
    rows = [[str(node), *(_cell(node, name) for name in _COLUMNS)] for node in nodes]
    heads = ["node", *_COLUMNS]
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]

    def line(cells: Sequence[str]) -> str:
        return "  ".join(f"{cell:{width}}" for cell, width in zip(cells, widths))

    states = [worst(node.findings) for node in nodes]
    lines = [f"{'status':7}  {line(heads)}".rstrip()]
    for state, row in zip(states, rows):
        lines.append(f"{paint(f'{state:7}', state, coloured=coloured)}  {line(row)}".rstrip())
    return lines


def _cell(node: NodeReport, name: str) -> str:
    finding = node.finding(name)
    return "-" if finding is None or finding.status is Status.NOT_APPLICABLE else finding.value
