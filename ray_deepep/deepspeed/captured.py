"""One MoE layer's forward and backward as two CUDA graphs.

The graphs hold the gate as DeepSpeed wrote it, dispatch, the grouped experts and combine, and the gradients of all of
them but for the experts' parameters: those are few large products, which are launched into new memory each time, so
that they can be accumulated, reduced and freed as ever. Outputs are copied out of the graphs' memory for that, too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import operator
import weakref
from collections.abc import Callable, Iterator, Sequence

import torch
from deepspeed.moe.sharded_moe import MOELayer
from torch import nn
from torch.autograd.function import once_differentiable

from ..captured_graph import CapturedGraph
from ..errors import ReceiveOverflowError
from ..handle import NUM_PLAN_COUNTS, DispatchHandle
from .grouped import LinearGradients
from .module_tree import ModuleTree

_PLAIN = (bool, int, float, str, type(None))
_NO_BACKWARD = -1
_DATA_PTR, _NEEDS_GRAD = torch.Tensor.data_ptr, operator.attrgetter("requires_grad")


class Condition:
    """What a graph was captured under: it stands for calls under the same alone."""

    def __init__(self, layer: MOELayer, tokens: torch.Tensor) -> None:
        self._tree = ModuleTree(layer.gate, layer.experts)
        self._tokens = _of_tokens(tokens)
        self._settings = _settings(layer.gate)
        self.parameters = self._tree.parameters()
        """Of the gate and the experts."""
        self._of_parameters = _of_parameters(self.parameters)

    def holds(self, layer: MOELayer, tokens: torch.Tensor) -> bool:
        """Whether a call with these tokens, to which nothing is in the way, is under it."""
        return (
            _of_tokens(tokens) == self._tokens
            and _settings(layer.gate) == self._settings
            and self._tree.is_current()
            and _of_parameters(self._tree.parameters()) == self._of_parameters
        )

    def problem(self, layer: MOELayer, tokens: torch.Tensor) -> str:
        """Why no graph can stand for a call with these tokens, now; empty if one can."""
        if not tokens.requires_grad:
            return "its input needs no gradient"
        if layer.wall_clock_breakdown or layer.gate.wall_clock_breakdown:
            return "its parts are timed"
        if torch.is_autocast_enabled(tokens.device.type):
            return "autocast is on"
        if self._tree.has_hooks() or torch.nn.modules.module._has_any_global_hook():
            return "a module of it has hooks"
        if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
            return "what it saves is hooked, as by activation checkpointing"
        if torch._C._current_graph_task_id() != _NO_BACKWARD:
            # Whoever computes again wants its memory in between.
            return "it is computed again in a backward (activation checkpointing)"
        if torch._C._len_torch_dispatch_stack():
            return "torch's operations are watched"
        capturing = tokens.is_cuda and torch.cuda.is_current_stream_capturing()
        return "a graph is being captured" if capturing else ""


def _settings(gate: nn.Module) -> dict[str, object]:
    """What a gate's forward may depend on, beside its parameters."""
    return {name: value for name, value in vars(gate).items() if isinstance(value, _PLAIN)}


def _of_tokens(tokens: torch.Tensor) -> tuple[object, ...]:
    return tokens.shape, tokens.dtype, tokens.device


def _of_parameters(parameters: Sequence[torch.Tensor]) -> tuple[tuple[object, ...], ...]:
    """Which they are, where they lie, and whether they are trained."""
    return tuple(map(id, parameters)), tuple(map(_DATA_PTR, parameters)), tuple(map(_NEEDS_GRAD, parameters))


class _Turn:
    """From a forward to its backward, or to when nobody can ask for that any more."""

    def __init__(self) -> None:
        self.done = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Static:
    """Tensors in the graphs' memory."""

    x: torch.Tensor
    out: torch.Tensor
    l_aux: torch.Tensor
    exp_counts: torch.Tensor
    grad_out: torch.Tensor
    grad_l_aux: torch.Tensor
    gradients: tuple[torch.Tensor | None, ...]
    """Of ``x`` and, in order, of the parameters that are not the experts'."""
    overflow: torch.Tensor
    """``[2]`` int32 of the host: as in ``DispatchHandle.counts``, from the last replay that has ended."""


class CapturedLayer:
    """The graphs of one layer, from :func:`capture`; calls are collective, and so are their backwards.

    One forward at a time: until its backward has run, or cannot any more, the layer is ``busy``.
    """

    def __init__(
        self,
        parameters: Sequence[torch.Tensor],
        static: _Static,
        later: Sequence[LinearGradients],
        graphs: tuple[CapturedGraph, CapturedGraph],
        handle: DispatchHandle,
    ) -> None:
        self.parameters = parameters
        """Of the gate and the experts."""
        self._static, self._later, self._handle = static, later, handle
        self._forward, self._backward = graphs
        self._turn: weakref.ref[_Turn] | None = None
        place = {id(parameter): index for index, parameter in enumerate(self.parameters)}
        self._places = [[place[id(parameter)] for parameter in of.parameters] for of in later]

    @property
    def busy(self) -> bool:
        """Whether a backward may still need what the last forward left."""
        turn = None if self._turn is None else self._turn()
        return turn is not None and not turn.done

    def __call__(self, layer: MOELayer, tokens: torch.Tensor) -> torch.Tensor:
        """The layer's output ``[T, M]`` for ``tokens`` ``[T, M]``; sets its ``l_aux`` and ``exp_counts``."""
        out, layer.l_aux = _Replay.apply(self, tokens, *self.parameters)
        layer.exp_counts = self._static.exp_counts.clone()
        return out

    def replay_forward(self, tokens: torch.Tensor) -> _Turn:
        """Run the forward; the turn is for its backward."""
        self._check_overflow()
        turn = _Turn()
        self._turn = weakref.ref(turn)
        self._static.x.copy_(tokens)
        self._forward.replay()
        return turn

    def outputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of output and ``l_aux``."""
        return self._static.out.clone(), self._static.l_aux.clone()

    def replay_backward(
        self, turn: _Turn, grad_out: torch.Tensor | None, grad_l_aux: torch.Tensor | None, needed: Sequence[bool]
    ) -> list[torch.Tensor | None]:
        """Gradients of tokens and parameters.

        Raises:
            RuntimeError: it is the second backward of this forward.
        """
        if turn.done:
            # The first one has used the memory of what it needs; its retain_graph cannot be seen from here.
            rule = "only one backward per forward; SwapConfig(graphs='off') runs without them"
            raise RuntimeError(f"an MoE layer that runs as CUDA graphs has {rule}")
        self._check_overflow()
        for static, grad in ((self._static.grad_out, grad_out), (self._static.grad_l_aux, grad_l_aux)):
            static.zero_() if grad is None else static.copy_(grad)
        self._backward.replay()
        turn.done = True
        gradients: list[torch.Tensor | None] = [None] * (1 + len(self.parameters))
        for index, grad in enumerate(self._static.gradients):
            gradients[index] = None if grad is None else grad.clone()
        for of, places in zip(self._later, self._places):
            found = of.of_parameters([needed[1 + place] for place in places])
            for place, grad in zip(places, found):
                # A layer that an expert uses twice has two.
                gradients[1 + place] = grad if gradients[1 + place] is None else gradients[1 + place] + grad
        return gradients

    def close(self) -> None:
        """Free the graphs."""
        self._forward.close()
        self._backward.close()

    def _check_overflow(self) -> None:
        rank, needed = self._static.overflow.tolist()
        if rank:
            raise ReceiveOverflowError(self._handle.first_rank + rank - 1, needed, self._handle.max_recv_tokens)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, captured, tokens, *parameters):
        ctx.captured, ctx.turn = captured, captured.replay_forward(tokens)
        ctx.set_materialize_grads(False)
        return captured.outputs()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, grad_l_aux):
        return None, *ctx.captured.replay_backward(ctx.turn, grad_out, grad_l_aux, ctx.needs_input_grad[1:])


@contextlib.contextmanager
def _aliases(module: nn.Module) -> Iterator[tuple[nn.Parameter, ...]]:
    """Other parameters over the same memory while inside, in the order of ``module.parameters()``.

    Autograd may hold the node of a parameter's gradient, with the stream of its first use, which a gradient that is
    captured into a graph would wait for.
    """
    found = [(m._parameters, name, p) for m in module.modules() for name, p in m._parameters.items() if p is not None]
    alias = {id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for _, _, p in found}
    try:
        for owner, name, parameter in found:
            owner[name] = alias[id(parameter)]
        yield tuple(module.parameters())
    finally:
        for owner, name, parameter in found:
            owner[name] = parameter


def capture(
    layer: MOELayer,
    tokens: torch.Tensor,
    parameters: Sequence[torch.Tensor],
    new_graph: Callable[[], CapturedGraph],
    forward: Callable[[torch.Tensor, list[LinearGradients]], tuple[torch.Tensor, DispatchHandle]],
) -> CapturedLayer:
    """Capture ``layer`` for tokens like these. Local: nothing is sent.

    Args:
        layer: its ``forward`` and a backward have run before, outside of a graph.
        tokens: ``[T, M]``.
        parameters: of its gate and its experts.
        new_graph: of the layer's buffer.
        forward: what the layer does, of tokens and of a list for what the experts' gradients are made of; its output
            ``[T, M]`` and the handle of its dispatch.
    """
    graphs, pool = (new_graph(), new_graph()), torch.cuda.graph_pool_handle()
    x = torch.empty_like(tokens, requires_grad=True)
    overflow = torch.zeros(2, dtype=torch.int32, pin_memory=True)
    later: list[LinearGradients] = []
    stream = torch.cuda.Stream()
    with _aliases(layer.gate) as others, graphs[0].capture(pool, stream):
        out, handle = forward(x, later)
        l_aux, exp_counts = layer.l_aux, layer.exp_counts
        overflow.copy_(handle.counts[2:NUM_PLAN_COUNTS], non_blocking=True)
    grad_out, grad_l_aux = torch.empty_like(out), torch.empty_like(l_aux)
    with graphs[1].capture(pool, stream):
        wanted = [x, *(p for p in others if p.requires_grad)]
        found = torch.autograd.grad((out, l_aux), wanted, (grad_out, grad_l_aux), allow_unused=True)
    by_id = {id(tensor): grad for tensor, grad in zip(wanted, found)}
    static = _Static(
        x=x.detach(),
        out=out.detach(),
        l_aux=l_aux.detach(),
        exp_counts=exp_counts,
        grad_out=grad_out.detach(),
        grad_l_aux=grad_l_aux.detach(),
        gradients=tuple(by_id.get(id(tensor)) for tensor in (x, *others)),
        overflow=overflow,
    )
    return CapturedLayer(parameters, static, later, graphs, handle)
