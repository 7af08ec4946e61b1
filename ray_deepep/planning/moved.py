"""Bytes that one rank moves in an operation, from expected rows. Pure."""

from __future__ import annotations

import dataclasses

from .traffic import Traffic, expected_traffic
from .workload import Workload


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moved:
    """Bytes of one operation on one rank; sent and received are equal."""

    link: float
    """Over NVLink, or from another rank's part of the heap on CPUs."""
    rdma: float
    """To other nodes."""
    copied: float
    """Written to their final place (dispatch), or read to be added up and written as sums (combine)."""
    staged: float
    """Copied into the heap before."""
    staged_rows: float
    """Rows that these are."""


def dispatch_bytes(workload: Workload) -> Moved:
    """A normal dispatch: each (token, rank) row is read once, and written once or for every route."""
    rows = expected_traffic(workload, workload.num_tokens)
    return _dispatch(workload, rows, staged=0.0 if workload.rows_in_heap else rows.staged_tokens)


def combine_bytes(workload: Workload) -> Moved:
    """A normal combine. ``fast`` adds up local experts first (those rows are read and staged), then per rank."""
    rows = expected_traffic(workload, workload.num_tokens)
    if workload.sends_routes:
        read, link = rows.routes, rows.link_pairs * _routes_per_pair(rows)
        staged = 0.0 if workload.rows_in_heap else rows.remote_routes
    else:
        read, link, staged = rows.pairs, rows.link_pairs, 0.0 if workload.rows_in_heap else rows.remote_pairs
        if workload.layout == "expert_major":
            read, staged = rows.pairs + rows.routes, 0.0
    return _combine(workload, rows, read=read + workload.num_tokens, link=link, staged=staged)


def low_latency_bytes(workload: Workload, side: str) -> Moved:
    """A low-latency dispatch (rows land once per route, grouped by expert) or combine."""
    rows = expected_traffic(workload, workload.low_latency_tokens)
    if side == "dispatch":
        grouped = dataclasses.replace(workload, layout="expert_major")
        return _dispatch(grouped, rows, staged=0.0)
    read, link = rows.routes + workload.low_latency_tokens, rows.link_pairs
    if workload.reduce == "exact":
        return _combine(workload, rows, read=read, link=link * _routes_per_pair(rows), staged=0.0)
    return _combine(workload, rows, read=read + rows.pairs, link=link, staged=0.0)


def _routes_per_pair(rows: Traffic) -> float:
    return rows.routes / rows.pairs if rows.pairs else 0.0


def _dispatch(workload: Workload, rows: Traffic, *, staged: float) -> Moved:
    written = rows.pairs if workload.layout == "token_major" else rows.routes
    size = workload.row_bytes
    return _moved(size, link=rows.link_pairs, rdma=rows.rdma_rows, copied=written, staged=staged)


def _combine(workload: Workload, rows: Traffic, *, read: float, link: float, staged: float) -> Moved:
    size = workload.combine_row_bytes
    return _moved(size, link=link, rdma=rows.rdma_rows, copied=read, staged=staged)


def _moved(size: int, *, link: float, rdma: float, copied: float, staged: float) -> Moved:
    """From rows of ``size`` bytes."""
    return Moved(link=link * size, rdma=rdma * size, copied=copied * size, staged=staged * size, staged_rows=staged)
