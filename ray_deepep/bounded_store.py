"""The key-value store behind torch.distributed, with a deadline for every question.

torch's client waits for an answer without one: if the process that hosts the store is stopped, or its machine is gone
without a word, a call never returns. So questions are asked on a thread of their own.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist
from torch.distributed import distributed_c10d

from .bounded import BoundedCalls, NoReturnError

R = TypeVar("R")


class StoreLostError(Exception):
    """The process that hosts the store is gone, or does not answer; ``silent`` tells the two apart."""

    def __init__(self, *, silent: bool, detail: str) -> None:
        self.silent = silent
        super().__init__(detail)


class BoundedStore:
    """Keys below ``prefix`` of torch's default store."""

    def __init__(self, prefix: str) -> None:
        default = distributed_c10d._get_default_store()
        self._store = dist.PrefixStore(prefix, default)
        self._where = _address(default)
        self._ask = BoundedCalls("ray_deepep store")

    def ask(self, seconds: float, question: Callable[[dist.Store], R]) -> R:
        """What ``question`` makes of the store. It must not wait for a key to come.

        Raises:
            StoreLostError: there was no answer within ``seconds``.
        """
        try:
            return self._ask(lambda: question(self._store), seconds)
        except NoReturnError:
            detail = f"the process that hosts torch's store{self._where} does not answer"
            raise StoreLostError(silent=True, detail=detail) from None
        except RuntimeError as error:
            detail = f"the process that hosts torch's store{self._where} is gone: {error}"
            raise StoreLostError(silent=False, detail=detail) from None


def hosts_default_store() -> bool:
    """Whether this process hosts torch's default store: whether it listens on the store's port."""
    store = _bare(distributed_c10d._get_default_store())
    if not isinstance(store, dist.TCPStore):
        return False
    return any(_listens(int(name), store.port) for name in os.listdir("/proc/self/fd"))


def _listens(descriptor: int, port: int) -> bool:
    try:
        found = socket.socket(fileno=descriptor)
    except OSError:
        # No socket, or closed since.
        return False
    try:
        listens = found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) != 0
        return listens and found.family in (socket.AF_INET, socket.AF_INET6) and found.getsockname()[1] == port
    except OSError:
        return False
    finally:
        # It is not ours to close.
        found.detach()


def _bare(store: dist.Store) -> dist.Store:
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return store


def _address(store: dist.Store) -> str:
    bare = _bare(store)
    return f", {bare.host}:{bare.port}," if isinstance(bare, dist.TCPStore) else ""
