"""Numbers of workers that an elastic run may have, and the EP degree at each: pure functions."""

from __future__ import annotations

from train.config import TrainConfig
from train.errors import ConfigError


def parse_workers(text: str) -> tuple[int | None, int]:
    """`N` gives (None, N), a fixed number; `MIN:MAX` gives both. Raises ConfigError naming `--workers`."""
    low, colon, high = text.partition(":")
    try:
        numbers = (int(low), int(high)) if colon else (None, int(low))
    except ValueError:
        raise ConfigError("--workers", text, "must be a number, or MIN:MAX for an elastic run") from None
    least = numbers[1] if numbers[0] is None else min(numbers)
    if least < 1:
        raise ConfigError("--workers", least, "must be at least 1")
    if numbers[0] is not None and numbers[0] > numbers[1]:
        raise ConfigError("--workers", text, "MIN must be at most MAX")
    return numbers


def ep_size_by_workers(config: TrainConfig, *, min_workers: int, min_ep_size: int = 1) -> dict[int, int]:
    """The EP degree at each allowed number of workers, from `min_workers` to `run.num_shares`.

    min_ep_size: a number of workers whose degree would be smaller is left out, because each rank would hold more
    experts than the memory of one has room for.

    Raises ConfigError when a degree of the model's own fits no number of workers, or nothing is left.
    """
    wanted, most = config.model.ep_size, config.run.num_shares
    found = {workers: config.resolve_ep_size(workers) for workers in range(min_workers, most + 1)}
    if wanted and wanted not in found.values():
        raise ConfigError("model.ep_size", wanted, f"fits none of {min_workers} to {most} workers")
    allowed = {workers: ep_size for workers, ep_size in found.items() if ep_size >= min_ep_size}
    if not allowed:
        rule = f"no number of workers from {min_workers} to {most} has so large an EP degree"
        raise ConfigError("--min-ep-size", min_ep_size, f"{rule} ({config.model.num_experts} experts)")
    return allowed
