"""Runs a function on N ranks, each a process of its own, many times over.

Processes are forked from a server that has the large packages imported, and stay for the whole test run, so that a case
costs milliseconds. A function is given by reference (top level of a test module) and called as
``function(rank_context, *args)``; its value, or its exception with the traceback, comes back. After an error or a
missed deadline the processes of that pool are out of step: they are killed, and the next case starts new ones.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Mapping
from multiprocessing import connection
from typing import Any

import torch
import torch.distributed as dist

from ray_deepep import Buffer, CommConfig, Communicator, shm

TRANSPORTS = ("reference", "shm")
PRELOADED = ["torch", "torch.distributed", "torch._dynamo", "ray_deepep.autograd", "deepspeed", "pytest"]
PRELOADED += ["ray_deepep.deepspeed.swap", "train.trainer", "train.plots", "deepspeed.module_inject.auto_ep_layer"]
PRELOADED += ["deepspeed.ops.op_builder.all_ops", "deepspeed.runtime.zero.muon.original_muon", "functorch.compile"]
"""Imported once, for all ranks of all cases; what is not installed is left out."""


def domain_size(transport: str) -> int:
    """Ranks of a domain: 2 of ``shm/2``; 0, all ranks, where the name has no number."""
    return int(transport.partition("/")[2] or 0)


def shm_problem() -> str:
    """Why transport ``shm`` cannot be tested here; empty if it can."""
    version, problem = shm.core_version()
    return "" if version else f"the compiled core cannot be loaded: {problem}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankContext:
    """What a case gets on each rank."""

    rank: int
    num_ranks: int
    communicators: dict[str, Communicator]
    """By transport; kept between cases."""

    def new_communicator(self, transport: str, **config: Any) -> Communicator:
        """A communicator of this case alone; collective. ``transport`` may name the size of its domains."""
        return Communicator.from_process_group(config=case_config(transport, **config))

    def communicator(self, transport: str) -> Communicator:
        """The communicator that cases share; collective when first used."""
        if transport not in self.communicators:
            self.communicators[transport] = self.new_communicator(transport)
        return self.communicators[transport]

    def buffer(self, transport: str, **geometry: Any) -> Buffer:
        """A new buffer on the shared communicator; collective. Use it in a ``with``."""
        return Buffer(self.communicator(transport), **geometry)


# Short enough that a case which hangs is a fault that names a rank rather than a missed deadline of the harness.
CASE_CONFIG: Mapping[str, Any] = {
    "deadline_s": 20.0,
    "bootstrap_deadline_s": 20.0,
    "num_threads": 1,
    "heap_gib": 1.0,
    "num_sms": 8,
    "low_latency_num_sms": 8,
}


def case_config(transport: str, **config: Any) -> CommConfig:
    """Settings of a case; ``transport`` may name the size of its domains."""
    name, size = transport.partition("/")[0], domain_size(transport)
    return CommConfig(**{"transport": name, "domain_size": size, **CASE_CONFIG, **config})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a case ended on one rank: exactly one of the three."""

    value: Any = None
    error: str = ""
    """Traceback of its exception."""
    lost: str = ""
    """Why there is no answer: the process died, or the deadline passed (then with its stack)."""


class CaseFailed(AssertionError):
    """A case did not return on every rank; the message has each rank's traceback."""


class RankPool:
    """N processes with a gloo process group. Use as a context manager, or ``close()``."""

    def __init__(self, num_ranks: int, *, init_group: bool = True, env: Mapping[str, str] | None = None) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.num_ranks = num_ranks
        # Hosted here, so that the store outlives whichever rank a case kills.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._folder = tempfile.TemporaryDirectory(prefix="ray_deepep_test_")
        self.processes = []
        self._pipes: list[connection.Connection] = []
        for rank in range(num_ranks):
            ours, theirs = context.Pipe()
            settings = _WorkerSettings(
                rank=rank,
                num_ranks=num_ranks,
                store_port=self._store.port,
                init_group=init_group,
                stack_path=self._stack_path(rank),
                env={} if env is None else dict(env),
            )
            process = context.Process(target=_worker, args=(theirs, settings), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self._pipes.append(ours)
        self.usable = True

    def run(self, function: Callable[..., Any], *args: Any, deadline_s: float = 60.0) -> list[Any]:
        """Values of all ranks.

        Raises:
            CaseFailed: a rank raised, died, or did not return within ``deadline_s``.
        """
        outcomes = self.outcomes(function, *args, deadline_s=deadline_s)
        failed = {rank: o.error or o.lost for rank, o in enumerate(outcomes) if o.error or o.lost}
        if failed:
            self.close()
            text = "\n".join(f"--- rank {rank} of {self.num_ranks}:\n{why}" for rank, why in failed.items())
            raise CaseFailed(f"{function.__name__}{args}\n{text}")
        return [outcome.value for outcome in outcomes]

    def outcomes(
        self, function: Callable[..., Any], *args: Any, deadline_s: float = 60.0, doomed: Collection[int] = ()
    ) -> list[Outcome]:
        """How the case ended on every rank, for cases in which some are meant to die. Such a pool is used once.

        Ranks in ``doomed`` are killed once all others have answered.
        """
        message = pickle.dumps((function, args))
        for pipe in self._pipes:
            with contextlib.suppress(BrokenPipeError):
                pipe.send_bytes(message)
        end = time.monotonic() + deadline_s
        found: dict[int, Outcome] = {}
        while not set(range(self.num_ranks)) - set(found) <= set(doomed) and time.monotonic() < end:
            waiting = {self._pipes[rank]: rank for rank in range(self.num_ranks) if rank not in found}
            for pipe in connection.wait(list(waiting), max(end - time.monotonic(), 0)):
                rank = waiting[pipe]
                found[rank] = self._receive(rank)
            if any(outcome.error or outcome.lost for outcome in found.values()):
                # The others wait for a rank that will not come; they have their own deadlines.
                self.usable = False
        for rank in set(range(self.num_ranks)) - set(found):
            self.usable = False
            if rank in doomed:
                self.processes[rank].kill()
                found[rank] = Outcome(lost="killed by the test")
            else:
                found[rank] = Outcome(lost=f"no answer within {deadline_s:g} s\n{self._stack(rank)}")
        return [found[rank] for rank in range(self.num_ranks)]

    def close(self) -> None:
        """End the processes; those that do not listen are killed."""
        self.usable = False
        for pipe in self._pipes:
            pipe.close()
        end = time.monotonic() + 2.0
        for process in self.processes:
            process.join(max(end - time.monotonic(), 0.0))
            if process.is_alive():
                process.kill()
                process.join()
        self._folder.cleanup()

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _receive(self, rank: int) -> Outcome:
        try:
            return pickle.loads(self._pipes[rank].recv_bytes())
        except (EOFError, ConnectionResetError):
            self.processes[rank].join(5.0)
            return Outcome(lost=f"the process died with exit code {self.processes[rank].exitcode}")

    def _stack_path(self, rank: int) -> str:
        return os.path.join(self._folder.name, f"stack_{rank}.txt")

    def _stack(self, rank: int) -> str:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.processes[rank].pid, signal.SIGUSR1)
        time.sleep(0.2)
        with open(self._stack_path(rank)) as file:
            return file.read()


class Ranks:
    """Pools by world size, made when first asked for; the ``ranks`` fixture."""

    def __init__(self) -> None:
        self._pools: dict[int, RankPool] = {}

    def run(self, num_ranks: int, function: Callable[..., Any], *args: Any, deadline_s: float = 60.0) -> list[Any]:
        """As :meth:`RankPool.run`."""
        pool = self._pools.get(num_ranks)
        if pool is None or not pool.usable:
            pool = self._pools[num_ranks] = RankPool(num_ranks)
        return pool.run(function, *args, deadline_s=deadline_s)

    def close(self) -> None:
        """End all pools."""
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()


def store_of_rank_0(context: RankContext, port_path: str) -> dist.Store:
    """A process group whose store rank 0 hosts, as under plain ``init_method``; for pools without ``init_group``."""
    if context.rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        with open(port_path + ".part", "w") as file:
            file.write(str(store.port))
        os.rename(port_path + ".part", port_path)
    else:
        while not os.path.exists(port_path):
            time.sleep(0.01)
        with open(port_path) as file:
            store = dist.TCPStore("127.0.0.1", int(file.read()), is_master=False, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=context.rank, world_size=context.num_ranks)
    return store


def error_of(expected: type[BaseException], call: Callable[[], Any]) -> BaseException:
    """The error that ``call`` raises; an ``AssertionError`` if it raises none. Others pass through."""
    try:
        value = call()
    except expected as error:
        return error
    raise AssertionError(f"no {expected.__name__} was raised; the call returned {value!r}")


def in_time(attempt: Callable[[], float], longest_s: float) -> None:
    """One of three tries of ``attempt``, which returns seconds, takes less than ``longest_s``.

    Other work on the machine can make any of them late; a wait that is too long makes all.
    """
    tried: list[float] = []
    while len(tried) < 3:
        tried.append(attempt())
        if tried[-1] < longest_s:
            return
    raise AssertionError(f"less than {longest_s:g} s is allowed, and it took {', '.join(f'{s:.2f}' for s in tried)} s")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _WorkerSettings:
    rank: int
    num_ranks: int
    store_port: int
    init_group: bool
    stack_path: str
    env: dict[str, str]


def _worker(pipe: connection.Connection, settings: _WorkerSettings) -> None:
    os.environ.update(settings.env)
    torch.set_num_threads(1)
    with open(settings.stack_path, "w") as stack_file:
        faulthandler.register(signal.SIGUSR1, file=stack_file, all_threads=True)
        store = dist.TCPStore("127.0.0.1", settings.store_port, is_master=False, wait_for_workers=False)
        if settings.init_group:
            dist.init_process_group("gloo", store=store, rank=settings.rank, world_size=settings.num_ranks)
        context = RankContext(rank=settings.rank, num_ranks=settings.num_ranks, communicators={})
        with contextlib.suppress(EOFError, BrokenPipeError):
            while True:
                pipe.send_bytes(_call(context, pipe.recv_bytes()))
        for communicator in context.communicators.values():
            communicator.close()
    # Skips torch's teardown, which may wait for ranks that are gone.
    os._exit(0)


def _call(context: RankContext, message: bytes) -> bytes:
    try:
        function, args = pickle.loads(message)
        return pickle.dumps(Outcome(value=function(context, *args)))
    except BaseException:
        return pickle.dumps(Outcome(error=traceback.format_exc()))
