"""Modules under some roots, looked through at each step without a loop in Python: a walk would cost the host more."""

from __future__ import annotations

import operator

import torch
from torch import nn

# Faster than attributes of modules, which are looked for in Python.
_CHILDREN = operator.attrgetter("_modules")
_HOOKS = operator.attrgetter("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class ModuleTree:
    """The roots and all below, as they are when it is made."""

    def __init__(self, *roots: nn.Module) -> None:
        self._modules = tuple(module for root in roots for module in root.modules())
        found = [(module, name, child) for module in self._modules for name, child in module._modules.items()]
        self._parents, self._names, self._children = zip(*found) if found else ((), (), ())
        owned = [(module._parameters, name) for module in self._modules for name in module._parameters]
        self._owners, self._parameter_names = zip(*owned) if owned else ((), ())

    def is_current(self) -> bool:
        """Whether it is made of the same modules still."""
        if sum(map(len, map(_CHILDREN, self._modules))) != len(self._children):
            return False
        now = map(dict.get, map(_CHILDREN, self._parents), self._names)
        return all(map(operator.is_, now, self._children))

    def has_hooks(self) -> bool:
        """Whether a call of one of them does more than its ``forward``."""
        return any(map(any, map(_HOOKS, self._modules)))

    def parameters(self) -> tuple[torch.Tensor, ...]:
        """Those that there are now, each as often as modules have it."""
        found = map(dict.get, self._owners, self._parameter_names)
        return tuple(parameter for parameter in found if parameter is not None)
