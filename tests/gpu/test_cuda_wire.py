"""What crosses NVLink, by the GPUs' own counters: a row once per (token, rank), however many of its experts are there.

Every token of two ranks, one GPU each, goes to all of its K experts on the other rank.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from device_cases import use_gpu
from harness import RankContext, Ranks

from ray_deepep import Buffer, Float8Cast
from ray_deepep.cuda import cuda_problem

NUM_TOKENS, HIDDEN, NUM_TOPK, NUM_EXPERTS = 128, 7168, 8, 32
NUM_CALLS = 200
SETTLED_S = 0.3
"""After which the counters have what was moved."""
ROW, ROW_FLOAT8 = HIDDEN * 2, HIDDEN + HIDDEN // 128 * 4
EXPECTED = {
    "dispatch": ROW,
    "dispatch float8": ROW_FLOAT8,
    "low-latency dispatch": ROW,
    "low-latency dispatch float8": ROW_FLOAT8,
    "low-latency combine fast": ROW,
    "low-latency combine exact": ROW * NUM_TOPK,
    "low-latency combine zero copy": ROW * NUM_TOPK,
}
"""Bytes that a token brings over the wire."""


def received_bytes(uuid: str) -> int:
    """Data that came over all links of a GPU so far; -1 where its driver does not tell."""
    command = ["nvidia-smi", "nvlink", "-gt", "d", "-i", f"GPU-{uuid}"]
    text = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout
    found = re.findall(r"Data Rx: (\d+) KiB", text)
    return sum(map(int, found)) * 1024 if found else -1


def problem() -> str:
    """Why bytes cannot be counted here."""
    if cuda_problem():
        return f"transport cuda: {cuda_problem()}"
    if torch.cuda.device_count() < 2:
        return "needs two GPUs"
    if received_bytes(str(torch.cuda.get_device_properties(0).uuid)) < 0:
        return "the driver does not count bytes of NVLink links"
    return ""


pytestmark = pytest.mark.skipif(bool(problem()), reason=problem())


def calls_of(buffer: Buffer, other: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """All that is counted, with inputs made."""
    x = torch.randn(NUM_TOKENS, HIDDEN, device=device).to(torch.bfloat16)
    first = other * (NUM_EXPERTS // 2)
    idx = torch.stack([torch.randperm(NUM_EXPERTS // 2)[:NUM_TOPK] for _ in range(NUM_TOKENS)]).to(device) + first
    handle = buffer.dispatch(x, idx).handle
    got = buffer.low_latency_dispatch(x, idx)
    rows = torch.ones_like(got.x)
    held = buffer.symm_empty(rows.shape[:-1].numel()).view(rows.shape).fill_(1.0)
    return {
        "dispatch": lambda: buffer.dispatch(x, handle=handle),
        "dispatch float8": lambda: buffer.dispatch(x, handle=handle, cast=Float8Cast()),
        "low-latency dispatch": lambda: buffer.low_latency_dispatch(x, idx),
        "low-latency dispatch float8": lambda: buffer.low_latency_dispatch(x, idx, cast=Float8Cast()),
        "low-latency combine fast": lambda: buffer.low_latency_combine(rows, got.handle),
        "low-latency combine exact": lambda: buffer.low_latency_combine(rows, got.handle, reduce="exact"),
        "low-latency combine zero copy": lambda: buffer.low_latency_combine(
            held, got.handle, reduce="exact", zero_copy=True
        ),
    }


def counts(context: RankContext) -> dict[str, float]:
    """Bytes a token, by call."""
    device = use_gpu(context.rank)
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    room = NUM_EXPERTS // 2 * 2 * NUM_TOKENS * ROW
    sizes = {"num_experts": NUM_EXPERTS, "hidden": HIDDEN, "num_topk": NUM_TOPK, "max_tokens": NUM_TOKENS}
    found = {}
    with context.buffer("cuda", **sizes, low_latency_max_tokens=NUM_TOKENS, symm_bytes=room + 4096) as buffer:
        for name, call in calls_of(buffer, 1 - context.rank, device).items():
            torch.cuda.synchronize()
            dist.barrier()
            time.sleep(SETTLED_S)
            before = received_bytes(uuid)
            dist.barrier()
            for _ in range(NUM_CALLS):
                call()
            torch.cuda.synchronize()
            time.sleep(SETTLED_S)
            found[name] = (received_bytes(uuid) - before) / NUM_CALLS / NUM_TOKENS
            buffer.check()
    return found


def test_rows_cross_once(ranks: Ranks) -> None:
    for found in ranks.run(2, counts):
        print({name: round(value) for name, value in found.items()})
        assert found.keys() == EXPECTED.keys()
        for name, expected in EXPECTED.items():
            # Routing, signals and headers come beside the rows.
            assert 0.98 * expected < found[name] < 1.1 * expected + 400, f"{name}: {found[name]} of {expected}"
