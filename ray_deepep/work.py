"""``Work``: an operation that may still run on the communication stream when its call has returned."""

from __future__ import annotations

import dataclasses
from typing import Generic, TypeVar

import torch

R = TypeVar("R")


@dataclasses.dataclass(frozen=True, eq=False)
class Work(Generic[R]):
    """What ``async_op=True`` returns. On CPUs the operation has ended by then, and :meth:`wait` only hands it over."""

    result: R = dataclasses.field(repr=False)
    event: torch.cuda.Event | None = None
    """Recorded behind the operation on the communication stream; None if it has ended. An ``after=`` for others."""
    outputs: tuple[torch.Tensor, ...] = dataclasses.field(default=(), repr=False)
    """Tensors of the result, whose memory must not be given out again while the waiting stream uses them."""

    def wait(self) -> R:
        """The result, for use on the current stream from now on: the stream waits for the operation, the host does not.

        May be called again, from any stream that uses the result.
        """
        if self.event is not None:
            stream = torch.cuda.current_stream(self.outputs[0].device if self.outputs else None)
            stream.wait_event(self.event)
            for tensor in self.outputs:
                tensor.record_stream(stream)
        return self.result

    def done(self) -> bool:
        """Whether the operation has ended. Never waits."""
        return self.event is None or self.event.query()
