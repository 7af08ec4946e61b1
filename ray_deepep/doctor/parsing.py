"""From the texts that the driver's tools print to numbers; pure, and patient with fields that a GPU does not have."""

from __future__ import annotations

import csv
import dataclasses
import re

from .readings import GPU_COLUMNS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """One line of the driver's list."""

    index: int
    name: str
    uuid: str
    memory_mib: int
    driver: str
    compute_mode: str
    mig: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Links:
    """NVLinks of one GPU."""

    index: int
    num_active: int
    num_inactive: int
    gb_per_s: float
    """Of one active link and one direction; 0 if none is active."""


def rows(text: str, num_columns: int) -> list[list[str]]:
    """CSV lines with so many columns; others (warnings, torn lines) are left out."""
    lines = csv.reader(text.splitlines(), skipinitialspace=True)
    return [[cell.strip() for cell in line] for line in lines if len(line) == num_columns]


def gpus(text: str) -> list[Gpu]:
    """The driver's list of GPUs."""
    return [
        Gpu(
            index=int(index),
            name=name,
            uuid=uuid,
            memory_mib=number(memory) or 0,
            driver=driver,
            compute_mode=compute_mode,
            mig=mig == "Enabled",
        )
        for index, name, uuid, memory, driver, compute_mode, mig in rows(text, len(GPU_COLUMNS))
        if index.isdigit()
    ]


def number(text: str) -> int | None:
    """A decimal or hexadecimal number; None for ``[N/A]``, ``[Not Supported]`` and the like."""
    try:
        return int(text, 0)
    except ValueError:
        return None


def numbers_by_gpu(text: str) -> dict[str, int]:
    """Two columns: GPU and a number, GPUs without one left out."""
    values = {gpu: number(value) for gpu, value in rows(text, 2)}
    return {gpu: value for gpu, value in values.items() if value is not None}


def nvlinks(text: str) -> list[Links]:
    """Links of each GPU in ``nvidia-smi nvlink --status``; GPUs without NVLink are left out or have none."""
    found = []
    for block in re.split(r"^(?=GPU \d+:)", text, flags=re.MULTILINE):
        head = re.match(r"GPU (\d+):", block)
        if head is None:
            continue
        rates = [float(rate) for rate in re.findall(r"Link \d+: ([\d.]+) GB/s", block)]
        found.append(
            Links(
                index=int(head.group(1)),
                num_active=len(rates),
                num_inactive=len(re.findall(r"Link \d+: <?inactive", block, re.IGNORECASE)),
                gb_per_s=max(rates, default=0.0),
            )
        )
    return found


def peer_matrix(text: str) -> dict[tuple[int, int], str]:
    """Code (``OK``, ``CNS``, ...) by pair of GPUs, from ``nvidia-smi topo -p2p``."""
    codes: dict[tuple[int, int], str] = {}
    for line in text.splitlines():
        cells = line.split()
        # The heading begins with GPU0 too, but then more names follow.
        if len(cells) < 2 or not re.fullmatch(r"GPU\d+", cells[0]) or cells[1].startswith("GPU"):
            continue
        reader = int(cells[0][3:])
        codes |= {(reader, peer): code for peer, code in enumerate(cells[1:]) if code != "X"}
    return codes


def xids(text: str) -> list[str]:
    """Numbers of the Xid events in a kernel log, in its order."""
    return re.findall(r"NVRM: Xid \([^)]*\): (\d+)", text)
