"""Heap tensors that an operation reads are kept until it has ended, whichever thread looks. Needs no GPU."""

from __future__ import annotations

import collections
import threading

from ray_deepep.streams import Streams


class Event:
    """As a CUDA event; ``while_asked`` runs inside the first ``query()``."""

    def __init__(self, done: bool, while_asked=lambda: None) -> None:
        self.done, self._while_asked = done, while_asked

    def query(self) -> bool:
        run, self._while_asked = self._while_asked, lambda: None
        run()
        return self.done


def test_two_threads_do_not_let_go_of_what_is_still_read() -> None:
    streams = object.__new__(Streams)  # the rest of it needs a GPU
    other = threading.Thread(target=streams.release_inputs, daemon=True)

    def let_the_other_look() -> None:
        other.start()
        other.join(0.2)

    running = Event(False)
    streams._held_lock = threading.Lock()
    streams._held = collections.deque([(Event(True, let_the_other_look), ["ended"]), (running, ["read"])])
    streams.release_inputs()
    other.join(10.0)
    assert [held for _, held in streams._held] == [["read"]]
    running.done = True
    streams.release_inputs()
    assert not streams._held
