"""How many rows the next dispatch will bring, from those of the last one: outputs are made before the counts are known.

A guess too small costs a launch that does nothing and then the right one; one too large costs memory while the outputs
live.
"""

from __future__ import annotations

from .handle import Layout, Padded

_SLACK = 16
"""A guess has room for one row in so many more than came last."""
_MULTIPLE = 128


class GuessedRows:
    """Of one buffer."""

    def __init__(self) -> None:
        self._last: dict[Layout, int] = {}

    def of(self, layout: Layout, most: int) -> int:
        """Rows to make room for, ``most`` if that is the number of any dispatch; 0: wait for the counts."""
        if isinstance(layout, Padded):
            return most
        last = self._last.get(layout)
        if last is None:
            return 0
        return min(most, -(-(last + last // _SLACK + 1) // _MULTIPLE) * _MULTIPLE)

    def learn(self, layout: Layout, num_rows: int) -> None:
        """What came."""
        if not isinstance(layout, Padded):
            self._last[layout] = num_rows
