"""When a layer's forward and backward run as CUDA graphs: a launch each, instead of some hundred from Python.

A graph needs fixed shapes, so experts' rows get room for all that the gates' capacities let through, and every rank
must give it in the same calls. So ranks agree, once per layer, over the buffer itself: if all come with equally many
tokens and a gate that drops what is above its capacity, dispatches of that layer take this room from then on, in
training. Whether a rank then replays or launches call by call is its own business: the others cannot tell.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import weakref
from collections.abc import Callable, Iterable

import torch
from deepspeed.moe.sharded_moe import MOELayer

from ..buffer import Buffer
from ..handle import DispatchHandle
from .agree import tell
from .captured import CapturedLayer, Condition, capture
from .gating import bounds_routes
from .grouped import LinearGradients

logger = logging.getLogger("ray_deepep")

GRAPHS_FIELD = "max_recv_tokens"
"""What a mismatch of the room for rows is called that layers have for their graphs."""
_WARM_UP_CALLS = 2
"""Before ranks agree: what torch and the buffer make at their first calls cannot be made amid a capture."""
_MOST_CAPTURES = 3
"""Of one layer. Where parameters move at each step, or something keeps a graph from being captured, calls go on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Agreed:
    """What all ranks know of a layer's dispatches."""

    num_tokens: int
    """T of every rank, when they agreed."""
    capacity: int
    """C of every gate: routes of a rank to an expert, at most."""
    num_rows: int
    """Rows of every dispatch's output: room for what such gates let through."""


class GraphMemory:
    """What the graphs of a swap may hold: they keep theirs from step to step, also what each layer needs only while it
    runs, which without graphs all layers share. At most half of what the steps before the first graph left free.

    Args:
        left_bytes: what the process has never needed of its GPU so far.
        reserved_bytes: what torch holds of it now.
    """

    def __init__(
        self, left_bytes: Callable[[], int] | None = None, reserved_bytes: Callable[[], int] | None = None
    ) -> None:
        self._left_bytes = left_bytes or _left_bytes
        self._reserved_bytes = reserved_bytes or _reserved_bytes
        self._room: int | None = None
        self._taken = 0

    def __str__(self) -> str:
        return f"{self._taken / 2**30:.1f} of {(self._room or 0) / 2**30:.1f} GiB"

    @property
    def full(self) -> bool:
        """Whether no further graph may be captured."""
        if self._room is None:
            self._room = self._left_bytes() // 2
        return self._taken >= self._room

    def reserved_bytes(self) -> int:
        """What torch holds of the GPU now."""
        return self._reserved_bytes()

    def take(self, num_bytes: int) -> bool:
        """Count a graph that was captured, if there is room for it."""
        fits = self._taken + num_bytes <= self._room
        self._taken += num_bytes if fits else 0
        return fits

    def give_back(self, num_bytes: int) -> None:
        """A graph was freed."""
        self._taken -= num_bytes


class LayerGraphs:
    """One layer's way to its graphs, in training. memory: of all layers."""

    def __init__(self, memory: GraphMemory) -> None:
        self._memory, self._num_bytes = memory, 0
        self._num_calls = self._num_captures = 0
        self._agreed: Agreed | None = None
        self._fits = False
        """Whether the last call that was made one by one had the room that was agreed on."""
        self._condition: Condition | None = None
        self._captured: CapturedLayer | None = None
        self._left: list[tuple[CapturedLayer, int]] = []
        """Graphs over a buffer that was outgrown, with their bytes, until their backward is done."""

    @property
    def captured(self) -> CapturedLayer | None:
        """The graphs, if there are any."""
        return self._captured

    @property
    def agreed(self) -> bool:
        """Whether ranks have agreed on room, so that any of them may replay."""
        return self._agreed is not None

    def num_rows(self, buffer: Buffer, layer: MOELayer, tokens: torch.Tensor, capacity: torch.Tensor) -> int | None:
        """``max_recv_tokens`` of this call's dispatch; None: as many rows as come.

        Collective at one call of each layer. What is above the capacity agreed on comes as it comes: right where it is
        so on all ranks, and else a mismatch of which every rank learns before a row moves.
        """
        if not buffer.can_capture:
            return None
        if self._num_calls == _WARM_UP_CALLS:
            self._agreed = _agree(buffer, layer, tokens, capacity)
        self._num_calls += 1
        agreed = self._agreed
        self._fits = agreed is not None and layer.gate.drop_tokens and int(capacity) <= agreed.capacity
        return agreed.num_rows if self._fits else None

    def not_made(self) -> None:
        """The call that ``num_rows`` was asked for failed on every rank, and comes again."""
        self._num_calls -= 1

    def leave(self) -> None:
        """The buffer was outgrown, so the graphs over it serve no further forward. Every rank does it in the same call:
        who replayed over the old buffer would wait for those that launch over the new one."""
        if self._captured is not None:
            self._left.append((self._captured, self._num_bytes))
        self._captured, self._fits = None, False

    def ready(
        self,
        layer: MOELayer,
        tokens: torch.Tensor,
        used_token: torch.Tensor | None,
        buffer: Buffer | None,
        forward: Callable[[torch.Tensor, list[LinearGradients]], tuple[torch.Tensor, DispatchHandle]],
    ) -> CapturedLayer | None:
        """Graphs that stand for this call; None: it is to be made call by call. Local.

        Args:
            layer: the layer.
            tokens: ``[T, M]``.
            used_token: as the layer's forward takes it.
            buffer: what the call goes over; None before the first.
            forward: the call that is captured, of tokens and of a list for what experts' gradients are made of.
        """
        self._free_left()
        if self._agreed is None or used_token is not None or tokens.shape[0] != self._agreed.num_tokens:
            return None
        if self._captured is None and self._num_captures >= _MOST_CAPTURES:
            return None
        if self._captured is not None:
            # The layer's own reference, which this forward replaces, shall not keep the last one waiting.
            layer.l_aux = layer.l_aux.detach()
            if self._captured.busy:
                return None
        if self._condition is None:
            self._condition = Condition(layer, tokens)
        if self._condition.problem(layer, tokens):
            return None
        if not self._condition.holds(layer, tokens):
            self.close()
            # This call goes first: it makes what cannot be made amid a capture.
            self._condition, self._fits = Condition(layer, tokens), False
        if self._captured is None and self._fits and self._num_captures < _MOST_CAPTURES:
            self._num_captures += 1
            self._captured = self._capture(layer, tokens, buffer, forward)
        return self._captured

    def close(self) -> None:
        """Free the graphs."""
        if self._captured is not None:
            self._captured.close()
            self._captured = None
            self._memory.give_back(self._num_bytes)
        self._free_left(busy=True)

    def _free_left(self, busy: bool = False) -> None:
        """Free what was left behind; busy: also what a backward may still need."""
        still = []
        for captured, num_bytes in self._left:
            if captured.busy and not busy:
                still.append((captured, num_bytes))
                continue
            captured.close()
            self._memory.give_back(num_bytes)
        self._left = still

    def _capture(
        self, layer: MOELayer, tokens: torch.Tensor, buffer: Buffer, forward: Callable
    ) -> CapturedLayer | None:
        try:
            # A graph that nobody holds, collected amid a capture, would spoil it.
            gc.collect()
            if self._memory.full:
                return self._go_on_without(f"those of other layers hold {self._memory}")
            before = self._memory.reserved_bytes()
            captured = capture(layer, tokens, self._condition.parameters, buffer.new_graph, forward)
            self._num_bytes = max(0, self._memory.reserved_bytes() - before)
            if self._memory.take(self._num_bytes):
                return captured
            captured.close()
            return self._go_on_without(f"its own need {self._num_bytes / 2**30:.1f} GiB beside {self._memory}")
        except Exception as error:  # whatever a gate or an expert does that no graph can hold
            # The end of a capture that has failed raises too, and says less.
            first = error.__context__ or error
            return self._go_on_without(f"{type(first).__name__}: {str(first).partition(chr(10))[0]}")

    def _go_on_without(self, reason: str) -> None:
        self._num_captures = _MOST_CAPTURES
        logger.warning("an MoE layer goes on without CUDA graphs: %s", reason)


class GraphPlans:
    """Of all layers of a swap that have asked."""

    def __init__(self) -> None:
        self._of: weakref.WeakKeyDictionary[MOELayer, LayerGraphs] = weakref.WeakKeyDictionary()
        self._memory = GraphMemory()

    def of(self, layer: MOELayer) -> LayerGraphs:
        """The layer's."""
        if layer not in self._of:
            self._of[layer] = LayerGraphs(self._memory)
        return self._of[layer]

    def leave(self, layers: Iterable[MOELayer]) -> None:
        """The buffer of these layers was outgrown; see ``LayerGraphs.leave``."""
        for layer in layers:
            if (graphs := self._of.get(layer)) is not None:
                graphs.leave()

    def release(self, layers: Iterable[MOELayer] | None = None) -> None:
        """Forget these layers, or all: before their buffer is closed."""
        for layer in list(self._of) if layers is None else layers:
            if (graphs := self._of.pop(layer, None)) is not None:
                graphs.close()


def _agree(buffer: Buffer, layer: MOELayer, tokens: torch.Tensor, capacity: torch.Tensor) -> Agreed | None:
    """What all ranks can take, by telling each other; None if their tokens differ or a gate drops none."""
    num_tokens = tokens.shape[0] if bounds_routes(layer) else 0
    told = tell(buffer, num_tokens, tokens.device)
    if num_tokens == 0 or any(number != num_tokens for number in told):
        return None
    num_rows = buffer.comm.num_ranks * buffer.num_local_experts * int(capacity)
    return Agreed(num_tokens=num_tokens, capacity=int(capacity), num_rows=num_rows)


def _left_bytes() -> int:
    # torch asks for its peak again; what others have is not free.
    free, _ = torch.cuda.mem_get_info()
    return max(0, free + torch.cuda.memory_reserved() - torch.cuda.max_memory_reserved())


def _reserved_bytes() -> int:
    # Without what it only keeps: a capture gives that back first.
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()
