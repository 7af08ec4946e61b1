"""Communicators and buffers of one swap: one communicator per EP group, one buffer per EP group and geometry.

When a buffer is made or freed must not differ between ranks, or one would wait for ranks that still use the old one. So
buffers are made at a layer's first forward and freed by calls that every rank makes (``Swap.close``,
``engine.destroy``), never because Python happened to collect a layer.

On GPUs a buffer has room for what its first forward needed on any rank. When a forward of some rank needs more, all
ranks of the group go over to a larger one in the same call, and the old one stays open for backwards that are to come.
A rank that lacks nothing learns of it by its own dispatch, which meets another call than its own (a mismatch, found on
every rank before a row moves), or by what it is told; then all of them say what they need. See ``with_room``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import logging
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from deepspeed.moe.sharded_moe import MOELayer

from ..buffer import Buffer
from ..communicator import Communicator
from ..config import CommConfig
from ..errors import InvalidArgumentError, InvalidTypeError, MismatchError
from ..rendezvous import store_exchange
from ..telemetry import CommStats
from ..transport import BufferGeometry
from .agree import MORE_ROOM, MoreRoomAskedError, tell
from .graphed import GRAPHS_FIELD, GraphPlans
from .grouped import GroupedPlans
from .room import Need, fits, geometry_for, geometry_of_need, grown

R = TypeVar("R")

logger = logging.getLogger("ray_deepep")

ROOM_PHASE = "buffer_room"
"""What it is called when ranks tell each other the room that they need."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerShape:
    """What layers must have in common to share a buffer."""

    ranks: tuple[int, ...]
    """Global ranks of the EP group."""
    num_experts: int
    """Of all ranks."""
    hidden: int
    num_topk: int
    padded: bool

    def sizes(self) -> dict[str, int | bool]:
        """As `room` takes them."""
        fields = {name: getattr(self, name) for name in ("num_experts", "hidden", "num_topk", "padded")}
        return {"num_ranks": len(self.ranks), **fields}


@dataclasses.dataclass(kw_only=True, eq=False)
class SharedBuffer:
    """A buffer and what its layers share."""

    buffer: Buffer
    shape: LayerShape
    grows: bool
    """Whether it has room for what was needed so far, and no more."""
    fitting: Need | None = None
    """The last need that was found to fit."""
    outgrown: list[Buffer] = dataclasses.field(default_factory=list)
    """Smaller ones of before, open for the backwards of their forwards."""
    users: set[int] = dataclasses.field(default_factory=set)
    """Numbers of the layers that use it."""
    capacities_differ: bool = False
    """Whether ranks have come with different capacities, so that they must agree on one first."""


class BufferRegistry:
    """See the module. All methods but ``for_layer`` are local."""

    def __init__(self, config: CommConfig) -> None:
        self._config = config
        self._communicators: dict[tuple[int, ...], Communicator] = {}
        self._buffers: dict[LayerShape, SharedBuffer] = {}
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
        """Open buffers, oldest first of each shape of layers."""
        return tuple(buffer for shared in self._buffers.values() for buffer in (*shared.outgrown, shared.buffer))

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

    def for_layer(self, layer: MOELayer, need: Need, *, hidden: int, num_topk: int, padded: bool) -> SharedBuffer:
        """The buffer of ``layer``; collective over its EP group when the first layer of its shape asks."""
        known = self._layers.get(layer)
        if known is not None:
            shape = known[0].shape
            if (shape.hidden, shape.num_topk, shape.padded) == (hidden, num_topk, padded):
                return known[0]
            self.release([layer])
        ranks = tuple(dist.get_process_group_ranks(layer.ep_group))
        num_experts = layer.num_local_experts * len(ranks)
        shape = LayerShape(ranks=ranks, num_experts=num_experts, hidden=hidden, num_topk=num_topk, padded=padded)
        shared = self._buffers.get(shape)
        if shared is None:
            shared = self._buffers[shape] = self._make(layer.ep_group, shape, need)
        number = next(self._numbers)
        shared.users.add(number)
        self._layers[layer] = (shared, number)
        return shared

    def buffer_of(self, layer: MOELayer) -> Buffer | None:
        """What ``layer``'s next call goes over, if nobody needs more room; None before its first."""
        known = self._layers.get(layer)
        return None if known is None else known[0].buffer

    def with_room(
        self, shared: SharedBuffer, group: dist.ProcessGroup, need: Need, device: torch.device, call: Callable[[], R]
    ) -> R:
        """What ``call``, a dispatch of rows on ``device`` over ``shared.buffer``, gives, once that has room for every
        rank's need.

        Collective over ``group``, as the call is, which may be made twice: then over a larger buffer.
        """
        if not shared.grows:
            return call()
        if need != shared.fitting and not fits(self._wanted(shared.shape, need), shared.buffer.geometry):
            with contextlib.suppress(MismatchError):  # the others are in another call, and so learn of it
                tell(shared.buffer, MORE_ROOM, device)
            self._grow(shared, group, need)
            return call()
        shared.fitting = need
        try:
            return call()
        except (MismatchError, MoreRoomAskedError) as error:
            # Ranks that replay graphs do not come to say what they need.
            if getattr(error, "field", "") == GRAPHS_FIELD:
                raise
            if not self._grow(shared, group, need) and isinstance(error, MismatchError):
                raise
        return call()

    def _make(self, group: dist.ProcessGroup, shape: LayerShape, need: Need) -> SharedBuffer:
        communicator = self._communicator(group, shape.ranks)
        grows = _uses_memory_at_once(communicator)
        if grows:
            geometry = self._wanted(shape, Need.of_all(self._needs(group, communicator, need)))
        else:
            geometry = geometry_for(**shape.sizes(), heap_gib=self._config.heap_gib)
        return SharedBuffer(buffer=_buffer(communicator, geometry), shape=shape, grows=grows)

    def _wanted(self, shape: LayerShape, need: Need) -> BufferGeometry:
        return geometry_of_need(need, **shape.sizes(), heap_gib=self._config.device_heap_gib)

    def _grow(self, shared: SharedBuffer, group: dist.ProcessGroup, need: Need) -> bool:
        """Have all ranks say what they need, and make room for it; whether anything changed by that."""
        needs = self._needs(group, shared.buffer.comm, need)
        differ = shared.shape.padded and len({each.capacity for each in needs}) > 1
        changed = differ and not shared.capacities_differ
        shared.capacities_differ |= differ
        wanted, given = self._wanted(shared.shape, Need.of_all(needs)), shared.buffer.geometry
        if fits(wanted, given):
            return changed
        larger = _buffer(shared.buffer.comm, grown(given, wanted))
        shared.outgrown.append(shared.buffer)
        shared.buffer = larger
        self.graphs.leave([layer for layer, (its, _) in self._layers.items() if its is shared])
        logger.info("a layer's buffer grew from %s to %s", given, larger.geometry)
        return True

    def _needs(self, group: dist.ProcessGroup, communicator: Communicator, need: Need) -> list[Need]:
        """Every rank's need, in order; collective."""
        num_ranks, deadline_s = communicator.num_ranks, self._config.bootstrap_deadline_s
        if num_ranks == 1:
            return [need]
        exchange = store_exchange(group, communicator.rank, num_ranks, deadline_s)
        told = exchange(ROOM_PHASE, json.dumps(dataclasses.asdict(need)).encode())
        return [Need(**json.loads(each)) for each in told]

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

    def _communicator(self, group: dist.ProcessGroup, ranks: tuple[int, ...]) -> Communicator:
        if ranks not in self._communicators:
            self._communicators[ranks] = Communicator.from_process_group(group, config=self._config)
        return self._communicators[ranks]

    def _retire(self, shared: SharedBuffer) -> None:
        del self._buffers[shared.shape]
        for buffer in (*shared.outgrown, shared.buffer):
            self._retired += buffer.stats()
            buffer.close()


def _uses_memory_at_once(communicator: Communicator) -> bool:
    """Whether a buffer's heap takes its memory when it is made, so that more room than needed is a waste."""
    return communicator.transport == "cuda"


def _buffer(communicator: Communicator, geometry: BufferGeometry) -> Buffer:
    return Buffer(communicator, **dataclasses.asdict(geometry))
