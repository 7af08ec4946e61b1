"""Faults on purpose, to see that a run survives them. For tests and measurements.

--inject kill:rank=1,step=7 stop:rank=0,step=9    the first in the first attempt, the second in the second
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from train.api import CheckpointInfo, TrainSummary
from train.errors import ConfigError
from train.files import write_text_atomic
from train.metrics import StepMetrics

KINDS = ("kill", "stop", "raise", "slow", "hang", "oom", "assert", "node")


def injected_file(out_dir: Path, attempt: int) -> Path:
    """Holds the time of the fault of an attempt (from 1), in seconds since the epoch."""
    return out_dir / f"injected-{attempt}"


class InjectedError(RuntimeError):
    """What `raise` raises."""


@dataclass(frozen=True, kw_only=True)
class Injection:
    """One fault."""

    kind: str
    """`kill` (SIGKILL), `stop` (SIGSTOP), `raise` (an exception), `slow` (a sleep), `hang` (a sleep without end), `oom`
    (an allocation that is too large), `assert` (an assertion that fails on the GPU) or `node` (SIGKILL, and for the Ray
    daemon of its node too)."""
    rank: int
    """World rank that suffers it."""
    step: int
    """After this step is done, before the next one."""
    seconds: float = 0.0
    """How long `slow` sleeps."""

    @classmethod
    def parse(cls, text: str) -> Injection:
        """From `KIND:rank=R,step=S[,seconds=T]`. Raises ConfigError."""
        rule = f"must be KIND:rank=R,step=S[,seconds=T] with KIND one of {', '.join(KINDS)}"
        kind, _, rest = text.partition(":")
        fields = dict(part.partition("=")[::2] for part in rest.split(","))
        try:
            injection = cls(
                kind=kind,
                rank=int(fields.pop("rank")),
                step=int(fields.pop("step")),
                seconds=float(fields.pop("seconds", 0)),
            )
        except (KeyError, ValueError) as error:
            raise ConfigError("--inject", text, rule) from error
        if fields or kind not in KINDS or injection.rank < 0 or injection.step < 1:
            raise ConfigError("--inject", text, rule)
        if (kind == "slow") != (injection.seconds > 0):
            raise ConfigError("--inject", text, "needs seconds=T with slow, and only with slow")
        return injection


class FaultInjector:
    """Trainer callback that carries out an injection on its rank, and leaves the time of it in a file."""

    def __init__(self, injection: Injection, *, rank: int, time_file: Path) -> None:
        self._injection = injection
        self._rank = rank
        self._time_file = time_file

    def on_step(self, metrics: StepMetrics) -> None:
        if self._rank == self._injection.rank and metrics.step == self._injection.step:
            write_text_atomic(self._time_file, repr(time.time()))
            self._strike()

    def on_checkpoint(self, info: CheckpointInfo) -> None:
        pass

    def on_end(self, summary: TrainSummary) -> None:
        pass

    def _strike(self) -> None:
        kind = self._injection.kind
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif kind == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif kind == "raise":
            raise InjectedError(f"injected on rank {self._rank} after step {self._injection.step}")
        elif kind == "oom":
            _allocate_too_much()
        elif kind == "assert":
            _fail_on_gpu()
        elif kind == "node":
            _kill_node()
        elif kind == "hang":
            _sleep_for_ever()
        else:
            time.sleep(self._injection.seconds)


def _sleep_for_ever() -> None:
    while True:
        time.sleep(3600)


def _allocate_too_much() -> None:
    import torch

    # More than any machine has: refused at once, and nobody else on this one is in danger.
    torch.empty(2**60, dtype=torch.uint8, device="cuda" if torch.cuda.is_available() else "cpu")


def _fail_on_gpu() -> None:
    """As a kernel that indexes out of range does; the CUDA context cannot be used after it."""
    import torch

    if not torch.cuda.is_available():
        raise InjectedError("assert needs a GPU")
    torch.zeros(4, device="cuda")[torch.tensor([1 << 20], device="cuda")]
    torch.cuda.synchronize()


def _kill_node() -> None:
    """End the Ray daemon of this node, with which all its workers end sooner or later, and this one at once."""
    daemon = os.getppid()
    if b"raylet" not in Path(f"/proc/{daemon}/cmdline").read_bytes():
        raise InjectedError("node needs a worker that Ray's daemon started")
    os.kill(daemon, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
