"""DeepSpeed's MoE layers over ray_deepep: ``enable()`` swaps all of a process, ``attach(model)`` those of one model.

Names are loaded when first used: the launcher imports this package before the user's script, and importing deepspeed
reads settings (such as ``DS_ACCELERATOR``) that the script may still make.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import SwapConfig
    from .swap import Swap, attach, enable

__all__ = ["Swap", "SwapConfig", "attach", "enable"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "SwapConfig":
        from .config import SwapConfig

        return SwapConfig
    from . import swap

    return getattr(swap, name)
