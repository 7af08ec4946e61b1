"""The actor in which other actors meet. Imports nothing but asyncio: it is shipped by value and starts quickly."""

import asyncio


class Meeting:
    """One phase of one group."""

    def __init__(self, ranks: tuple) -> None:
        self.ranks = ranks
        self.payloads: dict[int, bytes] = {}
        self.complete = asyncio.Event()
        self.num_replies = 0
        self.failed = False

    def missing(self) -> tuple:
        """World ranks that have not come."""
        return tuple(rank for rank in self.ranks if rank not in self.payloads)


class Rendezvous:
    """An async actor: every waiting rank is one pending call. Started by ``exchange.make_rendezvous``."""

    def __init__(self) -> None:
        self._meetings: dict[str, Meeting] = {}

    async def exchange(self, key: str, ranks: tuple, rank: int, payload: bytes, deadline_s: float) -> tuple:
        """Bring ``payload`` of world rank ``rank`` to the meeting ``key`` of ``ranks`` and wait for the others.

        Returns:
            The payloads in the order of ``ranks``, and the world ranks that did not come (then there are no payloads).
            Who comes after a meeting failed is alone to blame.
        """
        meeting = self._meetings.setdefault(key, Meeting(ranks))
        if meeting.failed:
            return (), (rank,)
        meeting.payloads[rank] = payload
        if not meeting.missing():
            meeting.complete.set()
        try:
            await asyncio.wait_for(meeting.complete.wait(), deadline_s)
        except TimeoutError:
            meeting.failed = True
        if meeting.failed:
            return (), meeting.missing()
        meeting.num_replies += 1
        if meeting.num_replies == len(ranks):
            del self._meetings[key]
        return tuple(meeting.payloads[r] for r in ranks), ()

    async def waiting_for(self) -> dict:
        """World ranks that each open or failed meeting lacks, by its key."""
        return {key: meeting.missing() for key, meeting in self._meetings.items() if meeting.missing()}
