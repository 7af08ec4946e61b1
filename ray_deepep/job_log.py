"""The log of a training job: the lines that programs print into it, and what they say about the run when read again.

| line | says |
|---|---|
| ``attempt 2 begins`` | the workers were started, for the second time |
| ``attempt 3 begins with 2 workers`` | the same, where their number may change |
| ``step 4/200 loss 3.2100 tokens/s 12345 validation 3.1000`` | optimizer steps done; validation where there was one |
| ``checkpoint after step 40: FOLDER`` | a complete checkpoint |
| ``stopping: ...`` | somebody asked the run to stop |
| ``RAY_DEEPEP_FAULT {json}`` | a fault was found; see ``Culprit.to_json`` |
| ``error: ...`` | why the run ended |

Other lines, such as ``elastic: ...``, are left alone, and so is what Ray writes before the lines of its workers.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable

from .errors import FAULT_LOG_PREFIX

# "(RayTrainWorker pid=123) " and, on clusters, "(... pid=123, ip=1.2.3.4) ", with or without colours.
_WORKER_PREFIX = re.compile(r"^(\x1b\[\d+m)*\(.*?pid=.*?\)(\x1b\[0m)? ")
_ATTEMPT = re.compile(r"attempt (\d+) begins(?: with (\d+) workers?)?")
_STEP = re.compile(r"step (\d+)/(\d+) loss (\S+)(?: tokens/s (\S+))?(?: validation (\S+))?")
_CHECKPOINT = re.compile(r"checkpoint after step (\d+): (.+)")
_STOPPING, _ERROR = "stopping: ", "error:"


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepLine:
    """What a line about a step says."""

    step: int
    num_steps: int
    loss: float
    tokens_per_s: float | None = None
    val_loss: float | None = None

    def __str__(self) -> str:
        text = f"step {self.step}/{self.num_steps} loss {self.loss:.4f}"
        text += "" if self.tokens_per_s is None else f" tokens/s {self.tokens_per_s:.0f}"
        return text if self.val_loss is None else f"{text} validation {self.val_loss:.4f}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogState:
    """What a log has said so far."""

    num_attempts: int = 0
    """Starts of the workers."""
    num_workers: int | None = None
    """Workers of the last start, where their number may change."""
    last_step: StepLine | None = None
    val_loss: float | None = None
    """The last one."""
    fault: dict[str, object] | None = None
    """The last one, as in its line."""
    num_faults: int = 0
    checkpoint: str = ""
    """Folder of the last complete one."""
    is_stopping: bool = False
    is_training: bool = False
    """Whether a step was done since the workers were started, and no fault has been found since."""
    error: str = ""
    """The last line that says why the run ended."""


def attempt_line(number: int, num_workers: int | None = None) -> str:
    """number: counts from 1. num_workers: where their number may change from one attempt to the next."""
    if num_workers is None:
        return f"attempt {number} begins"
    return f"attempt {number} begins with {num_workers} worker{'s' * (num_workers != 1)}"


def checkpoint_line(step: int, folder: object) -> str:
    """step: optimizer steps that it holds."""
    return f"checkpoint after step {step}: {folder}"


def stopping_line(why: str) -> str:
    """why: who asked, or what will happen."""
    return f"{_STOPPING}{why}"


def bare(line: str) -> str:
    """A line without what Ray writes before those of its workers."""
    return _WORKER_PREFIX.sub("", line)


def parse_step(line: str) -> StepLine | None:
    """None if the line is about something else."""
    match = _STEP.fullmatch(line.strip())
    if match is None:
        return None
    loss, tokens_per_s, val_loss = (None if text is None else _number(text) for text in match.group(3, 4, 5))
    if loss is None:
        return None
    step, num_steps = int(match[1]), int(match[2])
    return StepLine(step=step, num_steps=num_steps, loss=loss, tokens_per_s=tokens_per_s, val_loss=val_loss)


def read(lines: Iterable[str]) -> LogState:
    """What all lines of a log say together."""
    state = LogState()
    for line in lines:
        state = _after(state, bare(line.rstrip("\n")))
    return state


def _after(state: LogState, line: str) -> LogState:
    if step := parse_step(line):
        val_loss = state.val_loss if step.val_loss is None else step.val_loss
        return dataclasses.replace(state, last_step=step, val_loss=val_loss, is_training=True)
    if match := _ATTEMPT.fullmatch(line):
        num_workers = None if match[2] is None else int(match[2])
        return dataclasses.replace(state, num_attempts=int(match[1]), num_workers=num_workers, is_training=False)
    if match := _CHECKPOINT.fullmatch(line):
        return dataclasses.replace(state, checkpoint=match[2])
    if line.startswith(_STOPPING):
        return dataclasses.replace(state, is_stopping=True)
    if line.startswith(_ERROR):
        return dataclasses.replace(state, error=line.removeprefix(_ERROR).strip())
    if fault := _fault(line):
        return dataclasses.replace(state, fault=fault, num_faults=state.num_faults + 1, is_training=False)
    return state


def _fault(line: str) -> dict[str, object] | None:
    if not line.startswith(f"{FAULT_LOG_PREFIX} "):
        return None
    try:
        fields = json.loads(line.removeprefix(FAULT_LOG_PREFIX))
    except ValueError:
        return None
    return fields if isinstance(fields, dict) else None


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
