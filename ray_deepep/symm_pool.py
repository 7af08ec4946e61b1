"""Memory of ``Buffer.symm_empty``: blocks of a region that this rank's peers can read, given out first fit.

Plain arithmetic on addresses; nothing here touches the memory.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import threading

from .errors import HeapFullError

BLOCK_BYTES = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Piece:
    """Free bytes, as offsets into the region."""

    begin: int
    end: int


class Block:
    """A piece of the region; it goes back when its last reference goes. Tensors over it hold one."""

    def __init__(self, pool: SymmPool, address: int, num_bytes: int, piece: _Piece) -> None:
        self.address, self.num_bytes = address, num_bytes
        self._pool, self._piece = pool, piece

    @property
    def __cuda_array_interface__(self) -> dict[str, object]:
        """The block as bytes, by which torch makes a tensor of it without a copy."""
        return {"shape": (self.num_bytes,), "typestr": "|u1", "data": (self.address, False), "version": 3}

    def __del__(self) -> None:
        self._pool.give_back(self._piece)


class SymmPool:
    """Blocks of ``[address, address + num_bytes)``, in multiples of 512 bytes.

    Room that was given back is given out at once, as torch's allocator does on one stream: whoever uses blocks on
    several streams keeps a block until all of them are done with it. Threads may share a pool.
    """

    def __init__(self, address: int, num_bytes: int) -> None:
        self._address, self.num_bytes = address, num_bytes
        usable = num_bytes // BLOCK_BYTES * BLOCK_BYTES
        self._free = [_Piece(begin=0, end=usable)] if usable else []
        self._lock = threading.Lock()
        # Not under the lock: a block may die in a garbage collection that runs while this very thread holds it.
        self._returned: collections.deque[_Piece] = collections.deque()

    def take(self, num_bytes: int) -> Block:
        """A block of at least one byte.

        Raises:
            HeapFullError: no free piece is large enough.
        """
        rounded = (num_bytes + BLOCK_BYTES - 1) // BLOCK_BYTES * BLOCK_BYTES
        with self._lock:
            self._collect()
            for position, piece in enumerate(self._free):
                if piece.end - piece.begin < rounded:
                    continue
                taken = _Piece(begin=piece.begin, end=piece.begin + rounded)
                rest = _Piece(begin=taken.end, end=piece.end)
                self._free[position : position + 1] = [rest] if rest.end > rest.begin else []
                return Block(self, self._address + taken.begin, num_bytes, taken)
            sizes = [piece.end - piece.begin for piece in self._free]
        raise HeapFullError(rounded, sum(sizes), max(sizes, default=0), self.num_bytes)

    def give_back(self, piece: _Piece) -> None:
        """Called by a block that dies."""
        self._returned.append(piece)

    def free_bytes(self) -> int:
        """Bytes that are not given out."""
        with self._lock:
            self._collect()
            return sum(piece.end - piece.begin for piece in self._free)

    def holds(self, address: int, num_bytes: int = 1) -> bool:
        """Whether these bytes lie in the region."""
        return self._address <= address and address + num_bytes <= self._address + self.num_bytes

    def _collect(self) -> None:
        """Put returned pieces among the free ones, joined with their neighbours."""
        while self._returned:
            piece = self._returned.popleft()
            at = bisect.bisect(self._free, piece.begin, key=lambda free: free.begin)
            begin, end = piece.begin, piece.end
            first, last = at, at
            if at > 0 and self._free[at - 1].end == begin:
                first, begin = at - 1, self._free[at - 1].begin
            if at < len(self._free) and self._free[at].begin == end:
                last, end = at + 1, self._free[at].end
            self._free[first:last] = [_Piece(begin=begin, end=end)]
