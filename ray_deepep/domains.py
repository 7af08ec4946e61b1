"""Ranks in equal domains, one after the other: which node a rank is on, and who stands where it does on the others."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Domains:
    """Where one rank stands: ``rank = node_rank * domain_size + local_rank``."""

    rank: int
    num_ranks: int
    domain_size: int
    """Ranks of a node, which read each other's memory; divides ``num_ranks``."""

    @property
    def num_nodes(self) -> int:
        """Domains in all; 1: there is nothing to hop over."""
        return self.num_ranks // self.domain_size

    @property
    def node_rank(self) -> int:
        """Which domain the rank is in."""
        return self.rank // self.domain_size

    @property
    def local_rank(self) -> int:
        """Index of the rank in its domain."""
        return self.rank % self.domain_size

    @property
    def domain_ranks(self) -> range:
        """Ranks of the own domain."""
        first = self.rank - self.local_rank
        return range(first, first + self.domain_size)

    @property
    def hop_ranks(self) -> range:
        """Ranks with the same local rank, by node: those with which rows are exchanged between nodes."""
        return range(self.local_rank, self.num_ranks, self.domain_size)
