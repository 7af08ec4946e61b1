"""Communicators and buffers of one swap: one communicator per EP group, one buffer per EP group and geometry.

When a buffer is made or freed must not differ between ranks, or one would wait for ranks that still use the old one. So
buffers are made at a layer's first forward and freed by calls that every rank makes (``Swap.close``,
``engine.destroy``), never because Python happened to collect a layer.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import weakref
from collections.abc import Iterable, Sequence

import torch.distributed as dist
from deepspeed.moe.sharded_moe import MOELayer

from ..buffer import Buffer
from ..communicator import Communicator
from ..config import CommConfig
from ..errors import InvalidArgumentError, InvalidTypeError
from ..telemetry import CommStats
from ..transport import BufferGeometry
from .graphed import GraphPlans
from .grouped import GroupedPlans
from .room import geometry_for

logger = logging.getLogger("ray_deepep")


@dataclasses.dataclass(kw_only=True, eq=False)
class SharedBuffer:
    """A buffer and what its layers share."""

    buffer: Buffer
    users: set[int] = dataclasses.field(default_factory=set)
    """Numbers of the layers that use it."""
    capacities_differ: bool = False
    """Whether ranks have come with different capacities, so that they must agree on one first."""


class BufferRegistry:
    """See the module. All methods but ``for_layer`` are local."""

    def __init__(self, config: CommConfig) -> None:
        self._config = config
        self._communicators: dict[tuple[int, ...], Communicator] = {}
        self._buffers: dict[tuple[tuple[int, ...], BufferGeometry], SharedBuffer] = {}
        self._layers: weakref.WeakKeyDictionary[MOELayer, tuple[SharedBuffer, int]] = weakref.WeakKeyDictionary()
        self._numbers = itertools.count()
        self._logged: set[str] = set()
        self.grouped = GroupedPlans()
        """Experts as grouped products, of layers that have asked."""
        self.graphs = GraphPlans()
        """CUDA graphs of layers that have asked."""
        self._retired = CommStats()

    @property
    def buffers(self) -> tuple[Buffer, ...]:
        """Open buffers, oldest first."""
        return tuple(shared.buffer for shared in self._buffers.values())

    @property
    def communicators(self) -> tuple[Communicator, ...]:
        """Communicators made or adopted, oldest first."""
        return tuple(self._communicators.values())

    def adopt(self, communicator: Communicator, ranks: Sequence[int]) -> None:
        """Use ``communicator`` for the EP group with these global ranks, and close it with the registry."""
        if not isinstance(communicator, Communicator):
            raise InvalidTypeError("communicator", type(communicator).__name__, "must be a Communicator")
        ranks = tuple(ranks)
        if len(ranks) != communicator.num_ranks or len(set(ranks)) != len(ranks):
            rule = f"must name each of the communicator's {communicator.num_ranks} ranks once"
            raise InvalidArgumentError("ranks", ranks, rule)
        if ranks in self._communicators:
            raise InvalidArgumentError("ranks", ranks, "already have a communicator in this swap")
        self._communicators[ranks] = communicator

    def log_once(self, level: int, message: str) -> None:
        """Say something that holds for many forwards."""
        if message not in self._logged:
            self._logged.add(message)
            logger.log(level, "%s", message)

    def for_layer(self, layer: MOELayer, *, hidden: int, num_topk: int, padded: bool) -> SharedBuffer:
        """The buffer of ``layer``; collective over its EP group when the first layer of its geometry asks."""
        known = self._layers.get(layer)
        if known is not None:
            geometry = known[0].buffer.geometry
            if geometry.hidden == hidden and geometry.num_topk == num_topk and padded == bool(geometry.max_capacity):
                return known[0]
            self.release([layer])
        ranks = tuple(dist.get_process_group_ranks(layer.ep_group))
        communicator = self._communicator(layer, ranks)
        on_gpu = communicator.transport == "cuda"
        geometry = geometry_for(
            num_ranks=len(ranks),
            num_experts=layer.num_local_experts * len(ranks),
            hidden=hidden,
            num_topk=num_topk,
            padded=padded,
            heap_gib=self._config.device_heap_gib if on_gpu else self._config.heap_gib,
        )
        shared = self._buffers.get((ranks, geometry))
        if shared is None:
            shared = SharedBuffer(buffer=Buffer(communicator, **dataclasses.asdict(geometry)))
            self._buffers[ranks, geometry] = shared
        number = next(self._numbers)
        shared.users.add(number)
        self._layers[layer] = (shared, number)
        return shared

    def release(self, layers: Iterable[MOELayer]) -> None:
        """These layers are done; close buffers that no layer uses any more."""
        layers = tuple(layers)
        self.graphs.release(layers)
        for layer in layers:
            shared, number = self._layers.pop(layer, (None, 0))
            if shared is None:
                continue
            shared.users.discard(number)
            if not shared.users:
                self._retire(shared)

    def stats(self, *, reset: bool = False) -> CommStats:
        """Sum over all buffers, closed ones included."""
        total = sum((buffer.stats(reset=reset) for buffer in self.buffers), self._retired)
        if reset:
            self._retired = CommStats()
        return total

    def close(self) -> None:
        """Close buffers and communicators; never waits for a peer."""
        self.graphs.release()
        for shared in list(self._buffers.values()):
            self._retire(shared)
        self._layers.clear()
        for communicator in self._communicators.values():
            communicator.close()
        self._communicators.clear()

    def _communicator(self, layer: MOELayer, ranks: tuple[int, ...]) -> Communicator:
        if ranks not in self._communicators:
            made = Communicator.from_process_group(layer.ep_group, config=self._config)
            self._communicators[ranks] = made
        return self._communicators[ranks]

    def _retire(self, shared: SharedBuffer) -> None:
        self._retired += shared.buffer.stats()
        for key in [key for key, value in self._buffers.items() if value is shared]:
            del self._buffers[key]
        shared.buffer.close()
