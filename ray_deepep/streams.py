"""Streams of one GPU buffer: its communication stream, and the order of operations that run on different streams.

A buffer's operations must run one after the other, in the order of their calls, on every rank. On one stream they do;
an operation on another stream than the last one's first waits for that one.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
from collections.abc import Callable
from typing import TypeVar

import torch

from .handle import DispatchResult
from .work import Work

R = TypeVar("R")

_HIGH_PRIORITY = -1


class Streams:
    """One buffer's. Calls come under the buffer's lock, but for :meth:`start` and :meth:`release_inputs`."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._index = device, device.index
        # A number: torch's stream objects cost the host microseconds.
        self._current = torch._C._cuda_getCurrentRawStream
        self._last: torch.cuda.Stream | None = None
        self._last_number = -1
        self._last_done: torch.cuda.Event | None = None
        self._communication: torch.cuda.Stream | None = None
        # Operations start on the autograd engine's threads too, and a tensor must not go before its own event.
        self._held_lock = threading.Lock()
        self._held: collections.deque[tuple[torch.cuda.Event, list[torch.Tensor]]] = collections.deque()

    def enter(self) -> int:
        """Before an operation on the current stream; the stream as a number."""
        number = self._current(self._index)
        if number != self._last_number:
            self._switch(number)
        return number

    def current_number(self) -> int:
        """The current stream as a number."""
        return self._current(self._index)

    def leave(self) -> None:
        """After an operation, on its stream."""
        # Without a communication stream nothing overlaps, and a change of streams may wait for all of the last one.
        if self._communication is not None:
            self._last_done = None if torch.cuda.is_current_stream_capturing() else self._current_event()

    def start(
        self,
        run: Callable[[], R],
        inputs: tuple[torch.Tensor | None, ...],
        after: torch.cuda.Event | None,
        in_heap: Callable[[torch.Tensor], bool],
    ) -> Work[R]:
        """As ``Transport.start``; ``in_heap`` tells tensors that torch's allocator does not know."""
        stream = self._communication_stream()
        if after is None:
            stream.wait_stream(torch.cuda.current_stream(self._device))
        else:
            stream.wait_event(after)
        with torch.cuda.stream(stream):
            result = run()
            event = self._current_event()
            capturing = torch.cuda.is_current_stream_capturing()
        given = [tensor for tensor in inputs if tensor is not None]
        for tensor in given:
            tensor.record_stream(stream)
        # What a graph reads must stay alive as long as the graph, whoever made it.
        if not capturing:
            self.release_inputs()
            held = [tensor for tensor in given if in_heap(tensor)]
            if held:
                self._held.append((event, held))
        return Work(result, event, _tensors(result))

    def wait_for(self, after: torch.cuda.Event) -> None:
        """Let the current stream wait for an event."""
        torch.cuda.current_stream(self._device).wait_event(after)

    def release_inputs(self) -> None:
        """Let go of heap tensors whose operations have ended."""
        with self._held_lock:
            while self._held and self._held[0][0].query():
                self._held.popleft()

    def _communication_stream(self) -> torch.cuda.Stream:
        if self._communication is None:
            self._communication = torch.cuda.Stream(self._device, priority=_HIGH_PRIORITY)
        return self._communication

    def _current_event(self) -> torch.cuda.Event:
        return torch.cuda.current_stream(self._device).record_event()

    def _switch(self, number: int) -> None:
        current, last = torch.cuda.current_stream(self._device), self._last
        capturing = torch.cuda.is_current_stream_capturing()
        # A stream under capture cannot wait for work outside of it; what it replays is ordered by whoever replays it.
        if last is not None and _is_capturing(last) == capturing:
            if capturing or self._last_done is None:
                current.wait_stream(last)
            else:
                current.wait_event(self._last_done)
        self._last, self._last_number, self._last_done = current, number, None


def _is_capturing(stream: torch.cuda.Stream) -> bool:
    with torch.cuda.stream(stream):
        return torch.cuda.is_current_stream_capturing()


def _tensors(result: object) -> tuple[torch.Tensor, ...]:
    """All tensors of a result, the plan's memory included."""
    if isinstance(result, torch.Tensor):
        return (result,)
    values = [getattr(result, field.name) for field in dataclasses.fields(result)]
    if isinstance(result, DispatchResult):
        values.append(result.handle.counts)
    return tuple(value for value in values if isinstance(value, torch.Tensor))
