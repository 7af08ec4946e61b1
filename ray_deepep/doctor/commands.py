"""Runs a command or reads a file, within a time, without ever raising: the doctor must answer on a sick machine."""

from __future__ import annotations

import contextlib
import pathlib
import shutil
import subprocess
from collections.abc import Sequence

from .readings import Output

COMMAND_TIMEOUT_S = 20.0
"""Without persistence mode a driver takes seconds to answer; one that is stuck never does."""


def run(*command: str, timeout_s: float = COMMAND_TIMEOUT_S) -> Output:
    """Standard output of a command, or why there is none."""
    if shutil.which(command[0]) is None:
        return Output(problem=f"{command[0]} not found")
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    except OSError as error:
        return Output(problem=f"{command[0]}: {error}")
    try:
        text, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        # Not waited for: a process that hangs inside the driver outlives SIGKILL.
        process.kill()
        return Output(problem=f"{' '.join(command[:2])} did not answer within {timeout_s:g} s")
    except (OSError, ValueError) as error:
        return Output(problem=f"{command[0]}: {error}")
    if process.returncode:
        return Output(problem=last_line(text) or f"{command[0]} ended with status {process.returncode}")
    return Output(text=text)


def first_that_works(*commands: Sequence[str]) -> Output:
    """The first command that gives output; the last one's problem otherwise."""
    output = Output(problem="no command")
    for command in commands:
        output = run(*command)
        if not output.problem:
            return output
    return output


def read(path: str | pathlib.Path) -> str:
    """Text of a small file without its line end; empty if it cannot be read."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return pathlib.Path(path).read_text().strip()
    return ""


def entries(folder: str | pathlib.Path) -> list[pathlib.Path]:
    """What is in a folder, sorted; nothing if it cannot be read."""
    with contextlib.suppress(OSError):
        return sorted(pathlib.Path(folder).iterdir())
    return []


def last_line(text: str) -> str:
    """The last line that is not empty."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""
