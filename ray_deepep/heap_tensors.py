"""``Buffer.symm_empty``: tensors in the heap, which peers read where they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from . import checks

if TYPE_CHECKING:
    from .transport import Transport


class HeapTensorCalls:
    """Mixed into :class:`~ray_deepep.Buffer`."""

    _transport: Transport
    _check_open: Callable[[str], None]

    def symm_empty(self, num_rows: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """A tensor for rows that dispatch (``x``) or combine (``rows``) will send. Local.

        It lies in this rank's part of the heap, where peers read it: the call then needs no staging copy, and returns
        when peers have read it. It is contiguous, not initialised, and takes room of the buffer's ``symm_bytes``, in
        blocks of 512 bytes, until the last reference to it goes. On GPUs, as with torch's allocator, the room may be
        given out again at once, which is right on one stream: keep the tensor until every other stream that uses it is
        done. Operations with ``async_op`` see to that themselves. Transport ``reference``, and ``shm`` with
        ``symm_bytes=0``, give a plain tensor.

        Args:
            num_rows: at least 0.
            dtype: float32, bfloat16, float16 or float8_e4m3fn.

        Returns:
            ``[num_rows, H]``; not to be used after ``close()``.

        Raises:
            HeapFullError: there is no room left.
        """
        self._check_open("symm_empty")
        checks.symm_rows(num_rows, dtype)
        return self._transport.symm_empty(num_rows, dtype)
