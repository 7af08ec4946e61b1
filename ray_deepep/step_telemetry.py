"""Numbers of each training step on their way out, at next to no cost to the step.

The training loop hands over what it has anyway: plain numbers and counters. A thread makes records of them, once a
second, and gives them to *sinks*: a file of JSON lines, TensorBoard, or (``ray_deepep.cluster.metrics``) Ray's metrics.

| field | unit, shape | what |
|---|---|---|
| ``step``, ``time_s`` | | optimizer step; seconds since the epoch |
| the loop's own | | ``loss``, ``tokens_per_s``, ``step_ms``, ``forward_ms``, ``backward_ms``, ``optimizer_ms``, ... |
| ``num_dispatch``, ``num_combine`` | | calls of this rank, forward and backward |
| ``dispatch_us``, ``combine_us`` | µs | mean of a call, waits for peers included |
| ``dispatch_gb_per_s``, ``combine_gb_per_s`` | 1e9 B/s | rows received (given) over the same time |
| ``recv_bytes`` | [N] | bytes of rows read from each rank |
| ``wait_us`` | [N] µs | time waited for each rank |
| ``num_tokens_per_expert`` | [L] | routes that reached each local expert |
| ``imbalance`` | | fullest local expert over the mean of the local ones |
| ``num_dropped`` | | routes of this rank that the gate dropped |
| ``heap_bytes`` | B | this rank's heap: its largest operations so far, and what lies in it now |

A field that was not measured is not there.
"""

from __future__ import annotations

import importlib
import json
import logging
import queue
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from .errors import InvalidArgumentError, MissingPackageError
from .telemetry import CommStats

logger = logging.getLogger("ray_deepep")

FLUSH_EVERY_S = 1.0
_CLOSE_S = 10.0
_MAX_WAITING = 10_000
"""Records that wait for a sink that hangs; those that come after are dropped, and counted."""

Record = Mapping[str, Any]


class Sink(Protocol):
    """Where records go. Called on the flushing thread alone."""

    def write(self, records: Sequence[Record]) -> None: ...

    def close(self) -> None: ...


class StepTelemetry:
    """Takes the numbers of steps and gives them to sinks, on a thread. A context manager.

    Args:
        sinks: closed with it. One that raises is left out from then on, with a warning; training goes on.
        always: fields of every record, such as ``rank``.
        flush_every_s: how often records are given out.
    """

    def __init__(
        self, sinks: Iterable[Sink], *, always: Record | None = None, flush_every_s: float = FLUSH_EVERY_S
    ) -> None:
        if not flush_every_s > 0:
            raise InvalidArgumentError("flush_every_s", flush_every_s, "must be > 0")
        self._sinks = list(sinks)
        self._always = dict(always or {})
        self._flush_every_s = flush_every_s
        self._waiting: queue.SimpleQueue[tuple[int, float, Record, CommStats | None]] = queue.SimpleQueue()
        self._ended = threading.Event()
        self.num_lost = 0
        """Steps that were dropped because sinks did not keep up."""
        self.busy_s = 0.0
        """Processor time of the thread so far."""
        self._thread = threading.Thread(target=self._run, daemon=True, name="ray_deepep telemetry")
        self._thread.start()

    def record(self, step: int, numbers: Record, comm: CommStats | None = None) -> None:
        """Hand over a step. Never waits.

        Args:
            step: optimizer step.
            numbers: what the loop measured; names as in the module's table, values plain numbers.
            comm: counters of this step alone.
        """
        if self._waiting.qsize() >= _MAX_WAITING:
            self.num_lost += 1
            return
        self._waiting.put((step, time.time(), numbers, comm))

    def close(self) -> None:
        """Give out what is left and close the sinks; returns within a deadline even if a sink hangs."""
        self._ended.set()
        self._thread.join(_CLOSE_S)
        if self._thread.is_alive():
            logger.warning("telemetry: a sink did not end within %.0f s; its last records are lost", _CLOSE_S)

    def __enter__(self) -> StepTelemetry:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _run(self) -> None:
        while not self._ended.wait(self._flush_every_s):
            self._flush()
        self._flush()
        for sink in self._sinks:
            self._call(sink, sink.close)

    def _flush(self) -> None:
        records = []
        while not self._waiting.empty():
            step, time_s, numbers, comm = self._waiting.get()
            records.append({"step": step, "time_s": time_s} | self._always | dict(numbers) | comm_fields(comm))
        for sink in list(self._sinks) if records else ():
            self._call(sink, lambda sink=sink: sink.write(records))
        self.busy_s = time.thread_time()

    def _call(self, sink: Sink, call: Any) -> None:
        try:
            call()
        except Exception as error:  # a full disk must not end a training run
            self._sinks = [other for other in self._sinks if other is not sink]
            name = type(sink).__name__
            logger.warning("telemetry: %s is left out from now on: %s: %s", name, type(error).__name__, error)


def comm_fields(comm: CommStats | None) -> dict[str, Any]:
    """Fields of a record; see the module. Only what was measured."""
    if comm is None:
        return {}
    found: dict[str, Any] = {"num_dispatch": comm.num_dispatch, "num_combine": comm.num_combine}
    for name in ("dispatch", "combine") if comm.timed else ():
        calls, ms = getattr(comm, f"num_{name}"), getattr(comm, f"{name}_ms")
        if calls and ms > 0:
            found[f"{name}_us"] = ms * 1e3 / calls
            if num_bytes := getattr(comm, f"{name}_bytes"):
                found[f"{name}_gb_per_s"] = num_bytes / (ms * 1e6)
    if comm.recv_bytes is not None:
        found["recv_bytes"] = list(comm.recv_bytes)
    if comm.wait_ns is not None:
        found["wait_us"] = [ns / 1e3 for ns in comm.wait_ns]
    if comm.num_tokens_per_expert:
        tokens = list(comm.num_tokens_per_expert)
        found["num_tokens_per_expert"] = tokens
        if sum(tokens):
            found["imbalance"] = max(tokens) * len(tokens) / sum(tokens)
    for name in ("num_dropped", "heap_bytes"):
        if getattr(comm, name) is not None:
            found[name] = getattr(comm, name)
    return found


class JsonLinesSink:
    """Appends a line for each record to a file; whole batches are with the operating system when ``write`` returns.

    Raises OSError if the file cannot be opened.
    """

    def __init__(self, path: str | Path) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()

    def write(self, records: Sequence[Record]) -> None:
        """One line of JSON each."""
        self._file.write("".join(json.dumps(_rounded(record)) + "\n" for record in records))
        self._file.flush()

    def close(self) -> None:
        """No line is lost: each was flushed."""
        self._file.close()


class TensorBoardSink:
    """Writes every number as a scalar of TensorBoard's, lists as one scalar per index.

    Raises:
        MissingPackageError: the package ``tensorboard`` is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            module = importlib.import_module("torch.utils.tensorboard")
        except ImportError as error:
            raise MissingPackageError("tensorboard", "TensorBoard files", str(error)) from error
        self._writer = module.SummaryWriter(str(folder))

    def write(self, records: Sequence[Record]) -> None:
        """At the record's step and time."""
        for record in records:
            for name, value in record.items():
                if name not in ("step", "time_s"):
                    for label, number in _scalars(name, value):
                        self._writer.add_scalar(label, number, record["step"], walltime=record["time_s"])
        self._writer.flush()

    def close(self) -> None:
        """Files are complete."""
        self._writer.close()


def _scalars(name: str, value: Any) -> list[tuple[str, float]]:
    if isinstance(value, list | tuple):
        return [(f"{name}/{index}", float(number)) for index, number in enumerate(value)]
    return [(name, float(value))] if isinstance(value, int | float) else []


def _rounded(record: Record) -> dict[str, Any]:
    """Six digits say all there is to a measured number; losses and times keep theirs."""
    return {name: _short(value) if name != "time_s" and name != "loss" else value for name, value in record.items()}


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    return [_short(item) for item in value] if isinstance(value, list | tuple) else value
