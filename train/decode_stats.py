"""How fast a decode was: the steps of all ranks, put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """One step of one rank. On GPUs each time is taken when the device has finished, which costs some overlap."""

    num_rows: int
    """T: ids that this rank put into the step."""
    num_drawn: int
    """Ids that it drew from the scores."""
    prefill: bool
    """Whether some sequence of the rank was still reading its prompt."""
    step_us: float
    """The whole step."""
    dispatch_us: float
    """Of it, in dispatches of all layers, waiting for other ranks included."""
    combine_us: float
    """The same for combines."""


@dataclass(frozen=True, kw_only=True)
class DecodeStats:
    """Of decode steps: those in which no rank read a piece of a prompt. Ranks go in step, so the slowest one counts."""

    num_drawn: int
    """Ids drawn, on all ranks and in all steps."""
    num_prefill_steps: int
    """Steps in which some rank read a piece of a prompt."""
    num_decode_steps: int
    """Steps in which some rank had a sequence, and none read a prompt. The other numbers are of these."""
    tokens_per_s: float
    """Ids drawn on all ranks by the time of the steps."""
    step_us_p50: float
    """Median step."""
    step_us_p99: float
    """99th percentile."""
    dispatch_us_p50: float
    """Median time in dispatches of a step, mean of the ranks; waiting for each other included."""
    combine_us_p50: float
    """The same for combines."""
    comm_share: float
    """Share of dispatch and combine in the time of all decode steps, 0 to 1."""


def summarize(by_rank: Sequence[Sequence[StepTime]]) -> DecodeStats:
    """Numbers of a decode from every rank's steps, as many on each. All 0 but counts if there was no decode step."""
    steps = [step for step in zip(*by_rank, strict=True) if any(t.num_rows for t in step)]
    decode = [step for step in steps if not any(t.prefill for t in step)]
    step_us = np.array([max(t.step_us for t in step) for step in decode] or [0.0])
    dispatch_us = np.array([np.mean([t.dispatch_us for t in step]) for step in decode] or [0.0])
    combine_us = np.array([np.mean([t.combine_us for t in step]) for step in decode] or [0.0])
    total_us = max(float(step_us.sum()), 1e-9)
    return DecodeStats(
        num_drawn=sum(t.num_drawn for step in steps for t in step),
        num_prefill_steps=len(steps) - len(decode),
        num_decode_steps=len(decode),
        tokens_per_s=sum(t.num_drawn for step in decode for t in step) / total_us * 1e6,
        step_us_p50=float(np.percentile(step_us, 50)),
        step_us_p99=float(np.percentile(step_us, 99)),
        dispatch_us_p50=float(np.percentile(dispatch_us, 50)),
        combine_us_p50=float(np.percentile(combine_us, 50)),
        comm_share=float(dispatch_us.sum() + combine_us.sum()) / total_us,
    )
