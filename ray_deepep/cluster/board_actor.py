"""The actor that keeps what workers last told. Imports nothing of this package: it is shipped by value."""

import time


class Board:
    """The newest report of every rank of one attempt. Started by ``board.make_board``.

    Not an async actor: those may take the calls of one worker in another order than they were made in.
    """

    def __init__(self) -> None:
        self._attempt = 0
        self._reports: dict[int, tuple] = {}

    def put(self, attempt: int, rank: int, report: str) -> None:
        """Keep a report; those of earlier attempts are dropped, also where they come late."""
        if attempt > self._attempt:
            self._attempt, self._reports = attempt, {}
        if attempt == self._attempt:
            self._reports[rank] = (time.monotonic(), report)

    def read(self, attempt: int) -> dict:
        """By world rank, how many seconds ago its report came, and the report; empty for another attempt."""
        if attempt != self._attempt:
            return {}
        now = time.monotonic()
        return {rank: (now - came, report) for rank, (came, report) in self._reports.items()}
