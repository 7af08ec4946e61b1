"""What stands in for ``MOELayer.forward`` while a swap is open, and picks the swap of each layer.

Installed with the first swap and removed with the last. Its state hangs on the replaced method, so there is none in
modules: ``ForwardSwitch.current()`` finds it there.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from deepspeed.moe import sharded_moe
from deepspeed.moe.sharded_moe import MOELayer
from deepspeed.runtime.engine import DeepSpeedEngine

from .gate_sums import with_sums

if TYPE_CHECKING:
    from .swap import Swap

_ATTRIBUTE = "ray_deepep_switch"
_GATINGS = ("top1gating", "top2gating", "topkgating")


class ForwardSwitch:
    """The open swaps of this process."""

    def __init__(self) -> None:
        self.whole: Swap | None = None
        """The swap of ``enable()``."""
        self.attached: list[Swap] = []
        self.stock_forward = MOELayer.forward
        self._stock_destroy = DeepSpeedEngine.destroy
        self._stock_del = DeepSpeedEngine.__del__
        self._collecting: set[int] = set()

    @classmethod
    def current(cls) -> ForwardSwitch | None:
        """The installed switch."""
        return getattr(MOELayer.forward, _ATTRIBUTE, None)

    def add(self, swap: Swap) -> None:
        """Open ``swap``."""
        if self.whole is None and not self.attached:
            self._install()
        if swap.process_wide:
            self.whole = swap
        else:
            self.attached.append(swap)

    def remove(self, swap: Swap) -> None:
        """Forget ``swap``; restore DeepSpeed when it was the last."""
        if self.whole is swap:
            self.whole = None
        elif swap in self.attached:
            self.attached.remove(swap)
        if self.whole is None and not self.attached:
            self._restore()

    def swap_of(self, layer: MOELayer) -> Swap | None:
        """The swap that runs ``layer``: one attached to it, else the process's."""
        for swap in self.attached:
            if swap.covers(layer):
                return swap
        return self.whole

    def _install(self) -> None:
        switch = self

        @functools.wraps(self.stock_forward)
        def forward(layer, *inputs, **kwargs):
            swap = switch.swap_of(layer)
            if swap is None:
                return switch.stock_forward(layer, *inputs, **kwargs)
            return swap.forward(layer, *inputs, **kwargs)

        @functools.wraps(self._stock_destroy)
        def destroy(engine, *args, **kwargs):
            try:
                return switch._stock_destroy(engine, *args, **kwargs)
            finally:
                switch._engine_destroyed(engine)

        @functools.wraps(self._stock_del)
        def __del__(engine):
            # Calls destroy at a moment that differs between ranks; buffers are freed by explicit calls alone.
            switch._collecting.add(id(engine))
            try:
                switch._stock_del(engine)
            finally:
                switch._collecting.discard(id(engine))

        setattr(forward, _ATTRIBUTE, self)
        self._ours = {
            (MOELayer, "forward"): (self.stock_forward, forward),
            (DeepSpeedEngine, "destroy"): (self._stock_destroy, destroy),
            (DeepSpeedEngine, "__del__"): (self._stock_del, __del__),
        }
        for name in _GATINGS:
            stock = getattr(sharded_moe, name)
            self._ours[sharded_moe, name] = (stock, with_sums(stock))
        for (owner, name), (_, ours) in self._ours.items():
            setattr(owner, name, ours)

    def _restore(self) -> None:
        for (owner, name), (stock, ours) in self._ours.items():
            # Someone may have replaced it again on top; ours passes through by itself then.
            if getattr(owner, name) is ours:
                setattr(owner, name, stock)

    def _engine_destroyed(self, engine: DeepSpeedEngine) -> None:
        module = getattr(engine, "module", None)
        if id(engine) in self._collecting or module is None:
            return
        layers = [layer for layer in module.modules() if isinstance(layer, MOELayer)]
        for swap in [*self.attached, *([self.whole] if self.whole is not None else [])]:
            swap.release(layers)
