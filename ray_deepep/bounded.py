"""A deadline for calls that have none of their own, such as torch's on a process that is stopped."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

R = TypeVar("R")


class NoReturnError(Exception):
    """A call did not return in time. It may do so later; nobody hears of it then."""


class BoundedCalls:
    """Makes calls on a thread of its own, one after the other.

    A call that does not return in time keeps the thread, for nothing can end it from outside; all further ones are then
    refused at once. The thread is a daemon: a process that ends does not wait for it.
    """

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._stuck = False
        threading.Thread(target=_work, args=(self._calls,), name=name, daemon=True).start()
        weakref.finalize(self, self._calls.put, None)

    def __call__(self, call: Callable[[], R], seconds: float) -> R:
        """What ``call`` returns or raises.

        Raises:
            NoReturnError: it did not return within ``seconds``, or an earlier one has not.
        """
        if self._stuck:
            raise NoReturnError
        pending = _Call(call)
        self._calls.put(pending)
        if not pending.done.wait(seconds):
            self._stuck = True
            raise NoReturnError
        if pending.error is not None:
            raise pending.error
        return pending.value


def call_within(seconds: float, call: Callable[[], R], *, if_late: Callable[[], object]) -> R:
    """One call on a thread of its own; ``if_late`` runs there after a call that returned too late for its caller.

    Raises:
        NoReturnError: it did not return within ``seconds``.
    """
    lock, gave_up = threading.Lock(), threading.Event()
    pending = _Call(call)

    def run() -> None:
        pending.run(lock)
        if gave_up.is_set() and pending.error is None:
            if_late()

    threading.Thread(target=run, name="ray_deepep bounded call", daemon=True).start()
    pending.done.wait(seconds)
    with lock:
        if not pending.done.is_set():
            gave_up.set()
            raise NoReturnError
    if pending.error is not None:
        raise pending.error
    return pending.value


class _Call:
    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call
        self.done = threading.Event()
        self.value: Any = None
        self.error: BaseException | None = None

    def run(self, lock: threading.Lock | None = None) -> None:
        """Make the call; ``done`` is set under ``lock``, so that a caller either sees it or has given up before."""
        try:
            self.value = self._call()
        except BaseException as error:
            self.error = error
        if lock is None:
            self.done.set()
            return
        with lock:
            self.done.set()


def _work(calls: queue.SimpleQueue[_Call | None]) -> None:
    # Holds the queue alone, so that its owner can die and end it.
    while (call := calls.get()) is not None:
        call.run()
        del call
