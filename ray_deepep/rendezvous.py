"""Exchange functions for bootstrap: all-gather of short byte strings with a deadline that names who is missing."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable

import torch.distributed as dist
from torch.distributed import distributed_c10d

from .errors import BootstrapError


def store_exchange(
    group: dist.ProcessGroup, rank: int, num_ranks: int, deadline_s: float
) -> Callable[[str, bytes], list[bytes]]:
    """Exchange through the key-value store behind a torch process group.

    A store has what a collective lacks: per-key waits with a deadline, so a missing rank can be named, and it works
    alike for gloo and NCCL. Each rank counts its own attempts in the store, so that repeated bootstraps of one group
    do not read each other's keys.
    """
    ranks = "-".join(map(str, dist.get_process_group_ranks(group)))
    # The default store, not the group's own: destroying and re-making a group must not meet stale keys either.
    store = dist.PrefixStore(f"ray_deepep/{ranks}", distributed_c10d._get_default_store())
    attempt = store.add(f"attempt/{rank}", 1)

    def exchange(phase: str, payload: bytes) -> list[bytes]:
        store.set(f"{attempt}/{phase}/{rank}", payload)
        end = time.monotonic() + deadline_s
        found: list[bytes | None] = [None] * num_ranks
        for peer in range(num_ranks):
            key = f"{attempt}/{phase}/{peer}"
            remaining = max(end - time.monotonic(), 0.001)
            try:
                store.wait([key], datetime.timedelta(seconds=remaining))
            except (dist.DistStoreError, RuntimeError):
                missing = [p for p in range(peer, num_ranks) if not store.check([f"{attempt}/{phase}/{p}"])]
                if missing:
                    raise BootstrapError(phase, missing, deadline_s) from None
            found[peer] = store.get(key)
        return [value for value in found if value is not None]

    return exchange
