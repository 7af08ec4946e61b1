"""A CUDA graph that holds calls of a buffer, which knows of its replays as it knows of calls."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch

from .errors import ClosedError, InvalidArgumentError
from .telemetry import CapturedCalls, CommRecorder

if TYPE_CHECKING:
    from .communicator import Communicator
    from .cuda import CudaTransport
    from .transport import Transport


class CapturedGraph:
    """From ``Buffer.new_graph``. Calls in it need ``max_recv_tokens``, and every rank of the buffer must make the same
    calls in the same order, by replays or one by one. Results lie where they lay when they were captured: the next
    replay overwrites them."""

    def __init__(self, transport: CudaTransport, recorder: CommRecorder, check_open: Callable[[str], None]) -> None:
        self._transport, self._recorder, self._check_open = transport, recorder, check_open
        self._graph = torch.cuda.CUDAGraph()
        self._calls: CapturedCalls | None = None

    @contextlib.contextmanager
    def capture(self, pool: tuple[int, int], stream: torch.cuda.Stream) -> Iterator[None]:
        """Around the calls, and what torch launches between them; nothing of it runs now.

        Args:
            pool: from ``torch.cuda.graph_pool_handle``; graphs that run in turns may share it.
            stream: any but the current one; of a forward and its backward the same one.
        """
        # Other threads look at the GPU too (supervision, metrics), which must not end a capture.
        graph = torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local")
        with self._recorder.capture() as self._calls, graph:
            yield

    def replay(self) -> None:
        """Launch what was captured on the current stream; returns at once.

        Raises:
            CommFaultError: an earlier operation failed because of another rank.
            MismatchError: in an earlier operation ranks asked for different things.
            ClosedError: the buffer is closed, or the graph.
        """
        self._check_open("replay")
        if self._calls is None:
            raise ClosedError("replay: the graph is closed, or was not captured")
        self._transport.check()
        with self._recorder.replay(self._calls), self._transport.launching():
            self._graph.replay()

    def close(self) -> None:
        """Free the graph and its memory."""
        if self._calls is not None:
            self._recorder.forget(self._calls)
            self._calls = None
        self._graph.reset()


class GraphCalls:
    """Mixed into :class:`~ray_deepep.Buffer`."""

    comm: Communicator
    _transport: Transport
    _recorder: CommRecorder
    _check_open: Callable[[str], None]

    @property
    def can_capture(self) -> bool:
        """Whether calls can be captured into CUDA graphs."""
        return self._transport.can_capture

    def new_graph(self) -> CapturedGraph:
        """A CUDA graph for calls of this buffer; only where ``can_capture``.

        A ``torch.cuda.CUDAGraph`` can hold them too, but then its replays are not in :meth:`stats`, and what failed in
        one is raised by the next call only.
        """
        if not self.can_capture:
            rule = "cannot be captured; cuda within one NVLink domain can"
            raise InvalidArgumentError("transport", self.comm.transport, rule)
        return CapturedGraph(self._transport, self._recorder, self._check_open)
