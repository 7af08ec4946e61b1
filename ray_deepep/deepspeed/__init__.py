"""DeepSpeed's MoE layers over ray_deepep: ``enable()`` swaps all of a process, ``attach(model)`` those of one model.

Names are loaded when first used: the launcher imports this package before the user's script, and importing deepspeed
reads settings (such as ``DS_ACCELERATOR``) that the script may still make.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy_names import lazy_getattr

if TYPE_CHECKING:
    from .config import SwapConfig
    from .swap import Swap, attach, enable

__all__ = ["Swap", "SwapConfig", "attach", "enable"]


__getattr__ = lazy_getattr(__name__, {"config": ("SwapConfig",), "swap": ("Swap", "attach", "enable")})
