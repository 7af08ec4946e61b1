"""``enable()`` and ``attach()``: DeepSpeed's MoE layers over ray_deepep, without an edit to the user's model.

    with enable():                      # every MOELayer of this process, made before or after
        engine, *_ = deepspeed.initialize(model=model, ...)
        ...

    swap = attach(engine)               # the layers of one model only
    ...
    engine.destroy()                    # frees its buffers; swap.close() does too

Only ``MOELayer.forward`` is replaced, on the class, and the gates' cumulative sums (``gate_sums.py``): modules,
``isinstance``, state_dict keys and checkpoints are stock's.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Sequence

import torch
from deepspeed.moe.sharded_moe import MOELayer

from ..buffer import Buffer
from ..communicator import Communicator
from ..errors import InvalidArgumentError, InvalidTypeError
from ..telemetry import CommStats
from .config import SwapConfig
from .forward import moe_forward, stock_reason, wants_grouped
from .registry import BufferRegistry
from .switch import ForwardSwitch

logger = logging.getLogger("ray_deepep")


def enable(config: SwapConfig | None = None) -> Swap:
    """Swap all MoE layers of this process until the returned swap is closed. Not collective; call it on every rank.

    Called again while enabled, it returns the same swap if ``config`` is None or equal (the first ``close()`` ends it
    for all).

    Raises:
        InvalidArgumentError: enabled already, with another config.
    """
    switch = ForwardSwitch.current() or ForwardSwitch()
    if switch.whole is not None:
        if config is not None and config != switch.whole.config:
            rule = f"must be that of the swap which is enabled, {switch.whole.config} (or close it first)"
            raise InvalidArgumentError("config", config, rule)
        return switch.whole
    swap = Swap(SwapConfig() if config is None else config, switch, layers=None)
    switch.add(swap)
    return swap


def attach(engine_or_model: torch.nn.Module, config: SwapConfig | None = None) -> Swap:
    """Swap the MoE layers of one model or DeepSpeed engine; an ``enable()`` of the process does not touch them then.

    The swap closes itself when the engine is destroyed, or when the last of the layers is collected. Copies of a layer
    (``copy.deepcopy``, unpickled) are not attached.

    Raises:
        InvalidTypeError: not a module.
        InvalidArgumentError: no MoE layer in it, or one is attached already.
    """
    if not isinstance(engine_or_model, torch.nn.Module):
        raise InvalidTypeError("engine_or_model", type(engine_or_model).__name__, "must be a torch.nn.Module")
    layers = moe_layers(engine_or_model)
    name = type(engine_or_model).__name__
    if not layers:
        raise InvalidArgumentError("engine_or_model", name, "must contain a deepspeed.moe layer")
    switch = ForwardSwitch.current() or ForwardSwitch()
    if any(swap.covers(layer) for swap in switch.attached for layer in layers):
        raise InvalidArgumentError("engine_or_model", name, "has an attached layer; close that swap first")
    swap = Swap(SwapConfig() if config is None else config, switch, layers=layers)
    switch.add(swap)
    return swap


def moe_layers(model: torch.nn.Module) -> list[MOELayer]:
    """All ``MOELayer`` modules of ``model``."""
    return [module for module in model.modules() if isinstance(module, MOELayer)]


class Swap:
    """Layers that run over ray_deepep, with their communicators and buffers. Made by :func:`enable` or :func:`attach`.

    Buffers are made at the first forward of a layer (collective over its EP group) and shared by all layers of one EP
    group and geometry. A context manager; ``close()`` is not collective.
    """

    def __init__(self, config: SwapConfig, switch: ForwardSwitch, *, layers: Iterable[MOELayer] | None) -> None:
        self.config = config
        self._switch = switch
        self._registry = BufferRegistry(config.comm)
        self._layers: weakref.WeakSet[MOELayer] | None = None if layers is None else weakref.WeakSet(layers)
        self._logged: set[str] = set()
        self._closed = False
        for layer in self._layers or ():
            # At exit the process frees all there is anyway.
            weakref.finalize(layer, self._layer_collected).atexit = False

    @property
    def buffers(self) -> tuple[Buffer, ...]:
        """Open buffers: one per EP group and shape of layers that ran a forward, and on GPUs smaller ones of before."""
        return self._registry.buffers

    @property
    def communicators(self) -> tuple[Communicator, ...]:
        """Communicators of this swap: one per EP group that has run a forward, and those adopted."""
        return self._registry.communicators

    @property
    def closed(self) -> bool:
        """Whether layers run as stock again."""
        return self._closed

    @property
    def process_wide(self) -> bool:
        """Whether :func:`enable` made it."""
        return self._layers is None

    def covers(self, layer: MOELayer) -> bool:
        """Whether ``layer`` runs over this swap if no other is closer to it."""
        return self._layers is None or layer in self._layers

    def adopt(self, communicator: Communicator, ranks: Sequence[int]) -> None:
        """Use ``communicator`` for the EP group of these global ranks; it is closed with the swap. Before the group's
        first forward, on all its ranks.

        Raises:
            InvalidArgumentError: another number of ranks, or ranks that have a communicator already.
        """
        self._registry.adopt(communicator, ranks)

    def stats(self, *, reset: bool = False) -> CommStats:
        """Totals over all buffers, closed ones included, since the last reset; forward and backward both count.

        Layers that share experts' places (local expert 0, 1, ...) are summed by place. With several EP groups in one
        process, so are ranks.
        """
        return self._registry.stats(reset=reset)

    def comm_stats(self, reset: bool = False) -> dict[str, float]:
        """What :meth:`stats` says of times and bytes.

        Keys: ``dispatch_ms``, ``combine_ms`` (wall time, waits for peers included), ``num_calls``, ``dispatch_bytes``
        (rows received), ``combine_bytes`` (rows given).
        """
        stats = self.stats(reset=reset)
        return {
            "dispatch_ms": stats.dispatch_ms,
            "combine_ms": stats.combine_ms,
            "num_calls": stats.num_dispatch + stats.num_combine,
            "dispatch_bytes": stats.dispatch_bytes,
            "combine_bytes": stats.combine_bytes,
        }

    def forward(self, layer: MOELayer, *inputs: torch.Tensor, **kwargs: object) -> torch.Tensor:
        """What ``MOELayer.forward`` does for a covered layer.

        Stock's own path serves what this one does not (tensor parallelism, Tutel, float64 rows, ...), logged once per
        reason, and padded layers of one rank, which have nothing to move, unless their experts may be grouped.
        """
        reason = stock_reason(layer, inputs[0])
        if reason and reason not in self._logged:
            self._logged.add(reason)
            logger.warning("MoE layers run as DeepSpeed's own: %s", reason)
        nothing_to_do = (
            layer.ep_size == 1 and self.config.layout == "padded" and not wants_grouped(self.config, inputs[0])
        )
        if reason or nothing_to_do:
            return self._switch.stock_forward(layer, *inputs, **kwargs)
        return moe_forward(self._registry, self.config, layer, inputs[0], inputs[1])

    def release(self, layers: Iterable[MOELayer]) -> None:
        """These layers will run no more (their engine was destroyed): free buffers that no other layer uses."""
        released = [layer for layer in layers if self.covers(layer)]
        self._registry.release(released)
        if self._layers is not None and released:
            for layer in released:
                self._layers.discard(layer)
            self._layer_collected()

    def close(self) -> None:
        """Layers run as stock again; buffers and communicators are closed. Closing twice is fine."""
        if not self._closed:
            self._closed = True
            self._switch.remove(self)
            self._registry.close()

    def __enter__(self) -> Swap:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _layer_collected(self) -> None:
        # By iterating: during a collection the set's length still counts the dead.
        if all(False for _ in self._layers or ()):
            self.close()
