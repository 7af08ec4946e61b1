"""Swaps DeepSpeed's MoE layers the moment a program imports DeepSpeed, so that the program needs no edit.

A hook rather than an import of our own: what a script sets before it imports DeepSpeed (``DS_ACCELERATOR``, visible
devices) must still count, and a script that never imports it must not pay for it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import SwapConfig
    from .swap import Swap

_PACKAGE = "deepspeed"


class AutoSwap(importlib.abc.MetaPathFinder):
    """Calls ``enable(config)`` once ``deepspeed`` is imported. A context manager: leaving it closes the swap."""

    def __init__(self, config: SwapConfig | None = None) -> None:
        self._config = config
        self.swap: Swap | None = None
        """The swap, once DeepSpeed is imported."""

    def __enter__(self) -> AutoSwap:
        if _PACKAGE in sys.modules:
            self.enable()
        else:
            sys.meta_path.insert(0, self)
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        if self.swap is not None:
            self.swap.close()

    def enable(self) -> None:
        """Swap now."""
        from .swap import enable

        self.swap = enable(self._config)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The spec that the other finders give, with a loader that swaps when the package is complete."""
        if fullname != _PACKAGE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _SwapAfterwards(spec.loader, self)
        return spec


class _SwapAfterwards(importlib.abc.Loader):
    """The package's own loader, then the swap."""

    def __init__(self, loader: importlib.abc.Loader, autoswap: AutoSwap) -> None:
        self._loader, self._autoswap = loader, autoswap

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # The module must not remember us as its loader: resources are read through it.
        module.__loader__ = module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._autoswap.enable()
