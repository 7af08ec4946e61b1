"""Exchanges between nodes: of a rank with those of the same local rank, over torch.distributed.

All ranks of all nodes must ask for the same, and a mismatch is raised on all of them, but nobody talks to everybody:
first the ranks of a hop group compare, then those of a domain compare what their groups found.
"""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from .domains import Domains
from .errors import BootstrapError, CommFaultError
from .store_meeting import Signature, StoreMeeting, check_signatures

if TYPE_CHECKING:
    from .communicator import Communicator


_NO_SUCH_TAG = 1
"""Rows travel with tag 0."""


def hop_process_group(token: str, domains: Domains, deadline_s: float) -> dist.ProcessGroupGloo:
    """The process group of a rank's hop group, for CPU tensors; collective over it. Ranks are node ranks.

    ``token`` is new, and the same on all ranks: the addresses of an earlier group of the same ranks must not be met.
    torch's own ``new_group`` gives one that not all ranks make together the name of the one before.

    Raises:
        BootstrapError: a rank did not come.
    """
    store = dist.PrefixStore(f"ray_deepep/hop/{token}/{domains.local_rank}", distributed_c10d._get_default_store())
    timeout = datetime.timedelta(seconds=deadline_s)
    try:
        return dist.ProcessGroupGloo(store, domains.node_rank, domains.num_nodes, timeout)
    except RuntimeError as error:
        raise BootstrapError("connect_nodes", [], deadline_s, str(error)) from None


def hang_up(group: dist.ProcessGroupGloo, domains: Domains) -> None:
    """Break the connections to the other nodes: who waits there for rows of this rank, which has failed, learns it at
    once. Local. A gloo group cannot be aborted, but one that sees a wait expire closes its connections."""
    with contextlib.suppress(RuntimeError):
        peer = (domains.node_rank + 1) % domains.num_nodes
        group.recv([torch.empty(1)], peer, _NO_SUCH_TAG).wait(datetime.timedelta(milliseconds=1))


class HopGroup(StoreMeeting):
    """The hop group of one buffer. Making one is collective over all ranks of the communicator; raises as its base."""

    def __init__(self, comm: Communicator, settings: Signature, group: dist.ProcessGroupGloo) -> None:
        super().__init__(comm, settings)
        self._group, self._ranks = group, comm.domains.hop_ranks
        self._domains, self._board = comm.domains, comm.fault_board
        self._shown = False

    def begin_counts(self, operation: str, signature: Signature, counts: Sequence[int]) -> list[int]:
        """Start an operation. ``counts[n]``: rows that this rank has for node n.

        Returns:
            Rows that each node has for this rank.

        Raises:
            MismatchError: on every rank of every node, if signatures differ.
            CommFaultError: a rank did not come within the deadline, or closed, or failed.
        """
        mine = self._open(operation, signature)
        asked = self._meet("ask", self._ranks, {"signature": mine, "counts": list(counts)})
        column = [a["signature"] for a in asked]
        agreed = all(other == column[0] for other in column)
        verdict = {"signature": mine, "column": [] if agreed else column}
        self._check_all(self._meet("verdict", self._domains.domain_ranks, verdict))
        return [a["counts"][self._domains.node_rank] for a in asked]

    def exchange(self, send: Sequence[torch.Tensor], recv: Sequence[torch.Tensor]) -> None:
        """Give ``send[n]`` to node n and fill ``recv[n]`` from there; contiguous uint8. Both know the sizes: nothing
        travels where there is nothing, nor within the own node."""
        start, own = time.monotonic(), self._domains.node_rank
        away = [(node, peer) for node, peer in enumerate(self._ranks) if node != own]
        group = self._group
        # All receives first: what comes then has a place.
        pending = [
            (peer, self._started(peer, lambda node=node: group.recv([recv[node]], node, 0)))
            for node, peer in away
            if recv[node].numel()
        ] + [
            (peer, self._started(peer, lambda node=node: group.send([send[node]], node, 0)))
            for node, peer in away
            if send[node].numel()
        ]
        for peer, work in pending:
            self._finish(peer, work, start)

    def abort(self) -> None:
        """Tell the others, on whatever node, that this rank was interrupted in an operation. Local."""
        with contextlib.suppress(CommFaultError):
            self._fail("exchange", "aborted", self._comm.rank, 0.0)

    def _started(self, peer: int, start: Callable[[], dist.Work]) -> dist.Work:
        try:
            return start()
        except RuntimeError:
            self._fail("exchange", "peer_died", peer, 0.0)

    def _finish(self, peer: int, work: dist.Work, start: float) -> None:
        left_s = max(start + self._deadline_s - time.monotonic(), 0.001)
        try:
            work.wait(datetime.timedelta(seconds=left_s))
        except RuntimeError as error:
            cause = "timeout" if "timed out" in str(error).lower() else "peer_died"
            self._fail("exchange", cause, peer, time.monotonic() - start)

    def _check_all(self, verdicts: Sequence[dict]) -> None:
        """All ranks' signatures, from what the domain's ranks found in their hop groups."""
        size, num_nodes = self._domains.domain_size, self._domains.num_nodes
        columns = [verdict["column"] or [verdict["signature"]] * num_nodes for verdict in verdicts]
        signatures = [columns[rank % size][rank // size] for rank in range(self._domains.num_ranks)]
        check_signatures(signatures[0]["operation"], signatures)

    def _wait_all_published(self, kind: str, ranks: Sequence[int]) -> None:
        super()._wait_all_published(kind, ranks)
        if self._shown:
            self._shown = False
            self._board.hide_wait()

    def _judge_late(self, kind: str, ranks: Sequence[int], elapsed_s: float) -> None:
        if (fault := self._board.found()) is not None:
            self._fail("wait_published", fault.cause, fault.peer, elapsed_s)
        missing = [p for p in ranks if not self._present([self._key(kind, p)])]
        if missing and not self._shown:
            self._shown = True
            self._board.show_wait(missing[0])
        for peer in missing:
            # As its base asks whether a peer closed: again after, for it may have come and then ended.
            gone = self._comm.peer_is_gone(peer)
            if gone and not self._present([self._key(kind, peer)]) and not self._present([f"closed/{peer}"]):
                self._fail("wait_published", "peer_died", peer, elapsed_s)
        super()._judge_late(kind, ranks, elapsed_s)
