"""Asking a run on Ray to stop, with a checkpoint: from SIGTERM in its driver to the training loop of its workers.

Ray stops a job by SIGTERM to the job's entry point, and by SIGKILL some seconds later (``RAY_JOB_STOP_WAIT_TIME_S`` of
the job's environment; 3 by default). The driver notes the wish in the cluster's key-value store, where rank 0 looks
twice a second; the trainer sees to it that all ranks stop after the same step. There is no actor in between: it would
take a process and seconds of every start.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator

from ray.experimental import internal_kv

from .. import job_log

logger = logging.getLogger("ray_deepep")

STOP_WAIT_VARIABLE = "RAY_JOB_STOP_WAIT_TIME_S"
_NAMESPACE = b"ray_deepep"
_LOOK_EVERY_S = 0.5


def request_stop(run: str) -> None:
    """Ask the run to stop. run: the name that its workers watch. Needs a connection to Ray."""
    internal_kv._internal_kv_put(_key(run), b"1", namespace=_NAMESPACE)


def stop_requested(run: str) -> bool:
    """Whether somebody did."""
    return internal_kv._internal_kv_get(_key(run), namespace=_NAMESPACE) is not None


def forget_stop(run: str) -> None:
    """Leave nothing in the store."""
    internal_kv._internal_kv_del(_key(run), namespace=_NAMESPACE)


def _key(run: str) -> bytes:
    return f"stop/{run}".encode()


class StopWatch(threading.Thread):
    """Looks whether a run is to stop, so that the training loop need not ask the network. A context manager.

    asked: what it looks at, another wish for the run than to stop.
    """

    def __init__(self, run: str, asked: Callable[[str], bool] = stop_requested) -> None:
        super().__init__(daemon=True, name="ray_deepep stop watch")
        self._run, self._asked = run, asked
        self._requested, self._ended = threading.Event(), threading.Event()

    def __call__(self) -> bool:
        """Whether it was asked. Never waits."""
        return self._requested.is_set()

    def run(self) -> None:
        """Until it is asked, or until the watch is left."""
        while not self._ended.wait(_LOOK_EVERY_S):
            try:
                if self._asked(self._run):
                    self._requested.set()
                    return
            except Exception as error:  # a lost control service ends the run by other ways
                logger.debug("cannot see what is asked of the run: %s", error)

    def __enter__(self) -> StopWatch:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._ended.set()


@contextlib.contextmanager
def stop_on_sigterm(run: str) -> Iterator[threading.Event]:
    """Inside, SIGTERM asks the run to stop instead of ending this process. Yields an event that is then set.

    For the main thread of a driver, which is connected to Ray; in another thread it does nothing, since only the main
    one may handle signals. The process ends by the next SIGTERM.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    # While the main thread waits in Ray's code, Python's own handlers run late: a thread hears of it at once.
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    before_fd = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    listener = threading.Thread(target=_listen, args=(ours, run, asked), daemon=True, name="ray_deepep SIGTERM")
    listener.start()
    try:
        yield asked
    finally:
        signal.set_wakeup_fd(before_fd)
        signal.signal(signal.SIGTERM, before)
        theirs.close()
        listener.join(_LOOK_EVERY_S)
        ours.close()
        with contextlib.suppress(Exception):
            forget_stop(run)


def _listen(wakeups: socket.socket, run: str, asked: threading.Event) -> None:
    """Until the other end is closed."""
    while received := wakeups.recv(64):
        if signal.SIGTERM not in received:
            continue
        if asked.is_set():
            os._exit(128 + signal.SIGTERM)
        asked.set()
        print(job_log.stopping_line("after the step that is being done, with a checkpoint"), flush=True)
        request_stop(run)
