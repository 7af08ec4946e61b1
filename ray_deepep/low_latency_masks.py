"""Who takes part in low-latency calls: ranks that are masked, and the way back."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from . import low_latency_checks as checks
from .low_latency_flight import LowLatency

if TYPE_CHECKING:
    from .communicator import Communicator


class MaskCalls:
    """Mixed into :class:`~ray_deepep.Buffer`."""

    comm: Communicator
    _engine: Callable[[str], LowLatency]

    def mask_rank(self, rank: int, masked: bool = True) -> None:
        """Go on without ``rank``, or with it again. Local: every rank has its own mask.

        A masked rank is not waited for; its tokens do not come, and what its experts would contribute is missing in
        combines. Results say so in ``absent``. May be called from another thread, and then ends its wait for ``rank``.
        Only low-latency calls know masks.

        A rank that was masked while it was stopped finds out with a ``RankMaskedError``, and calls :meth:`rejoin`; it
        stands in :attr:`returning_ranks` while it waits there. Every other rank then unmasks it, all of them before
        the same operation, also those that had not masked it.

        Raises:
            InvalidArgumentError: ``rank`` is not another rank of the communicator.
        """
        engine = self._engine("mask_rank")
        checks.peer("rank", rank, engine.rank, engine.num_ranks)
        engine.transport.mask(rank, bool(masked))

    @property
    def masked_ranks(self) -> tuple[int, ...]:
        """Ranks that this rank has masked, ascending."""
        return self._engine("masked_ranks").transport.masked()

    @property
    def returning_ranks(self) -> tuple[int, ...]:
        """Masked ranks that wait in :meth:`rejoin` to be unmasked, ascending."""
        return self._engine("returning_ranks").transport.returning()

    def rejoin(self, deadline_s: float | None = None) -> None:
        """Take part in low-latency calls again, after a ``RankMaskedError``. Operations in flight are given up.

        Waits until all ranks that this one has not masked have called ``mask_rank(this rank, False)``; the next
        operation of this rank is then the next of theirs.

        Args:
            deadline_s: seconds to wait; ``comm.config.bootstrap_deadline_s`` if None.

        Raises:
            BootstrapError: naming the ranks that did not, or that did so before another operation than the others.
        """
        deadline_s = self.comm.config.bootstrap_deadline_s if deadline_s is None else deadline_s
        self._engine("rejoin").rejoin(deadline_s)
