"""What a job runs: a command, or a Python module that may describe itself before anything is sent.

A module that has a function ``describe_job(argv: list[str]) -> dict[str, str]`` at its top level is asked for the
metadata of a job with these arguments. It may raise ``ValueError`` for arguments that it would refuse; the job is then
not submitted. ``preset``, ``backend``, ``ep_size`` and ``out_dir`` are the words that others look for. Only a module
that has the function is imported: others may do their work on import.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import InvalidArgumentError

_HOOK = "describe_job"
_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_PYTHON = re.compile(r"(.*/)?python[\d.]*")


@dataclass(frozen=True, kw_only=True)
class Entrypoint:
    """What was asked for, taken apart."""

    words: tuple[str, ...]
    """The command. Of a module without the interpreter in front: its name and its arguments."""
    module: str
    """The Python module that it runs, if it runs one."""
    root: str
    """Folder that holds the module's package; empty where it was not found."""
    is_command: bool
    """Whether ``words`` begin with a program."""

    def command(self, python: str) -> str:
        """For a shell. python: the interpreter for a module that was given by its name."""
        return shlex.join(self.words if self.is_command else [python, "-m", *self.words])

    @property
    def arguments(self) -> list[str]:
        """Of the module."""
        start = self.words.index(self.module) + 1 if self.module else 0
        return list(self.words[start:])


def parse(words: Sequence[str], folder: str) -> Entrypoint:
    """A module's name and its arguments, or a command. folder: where modules are looked for first.

    Raises:
        InvalidArgumentError: there is nothing to run.
    """
    words = tuple(words[1:] if words[:1] == ["--"] else words)
    if not words:
        raise InvalidArgumentError("entrypoint", "", "must be a command, or a Python module and its arguments")
    if _PYTHON.fullmatch(words[0]):
        module = words[2] if len(words) > 2 and words[1] == "-m" else ""
        return Entrypoint(words=words, module=module, root=_root(module, folder), is_command=True)
    root = _root(words[0], folder)
    return Entrypoint(words=words, module=words[0] if root else "", root=root, is_command=not root)


def describe(entrypoint: Entrypoint) -> dict[str, str]:
    """What the module says about a job with these arguments; empty where it says nothing.

    Raises:
        InvalidArgumentError: the module refuses them.
    """
    if not entrypoint.root or not _has_hook(entrypoint):
        return {}
    with _importable(entrypoint.root):
        module = importlib.import_module(entrypoint.module)
    try:
        found: Mapping[str, str] = getattr(module, _HOOK)(entrypoint.arguments)
    except ValueError as error:
        raise InvalidArgumentError("entrypoint", shlex.join(entrypoint.words), str(error)) from error
    except SystemExit as error:  # argparse, which has printed what is wrong
        raise InvalidArgumentError("entrypoint", shlex.join(entrypoint.words), "has arguments it refuses") from error
    return {str(key): str(value) for key, value in found.items()}


def _root(module: str, folder: str) -> str:
    """The folder on whose account ``module`` can be imported, empty if it cannot."""
    if not _MODULE.fullmatch(module) or not _spec_origin(module, folder):
        return ""
    return str(Path(_spec_origin(module, folder)).resolve().parents[module.count(".")])


def _spec_origin(module: str, folder: str) -> str:
    """The file of a module that lies in a file of its own."""
    with _importable(folder), contextlib.suppress(ImportError, ValueError, AttributeError):
        spec = importlib.util.find_spec(module)
        # A package is run by its __main__, which describes nothing.
        if spec is not None and spec.origin and spec.submodule_search_locations is None and spec.has_location:
            return spec.origin
    return ""


def _has_hook(entrypoint: Entrypoint) -> bool:
    try:
        tree = ast.parse(Path(_spec_origin(entrypoint.module, entrypoint.root)).read_bytes())
    except (OSError, SyntaxError, ValueError):
        return False
    return any(isinstance(node, ast.FunctionDef) and node.name == _HOOK for node in tree.body)


@contextlib.contextmanager
def _importable(folder: str) -> Iterator[None]:
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)
