"""Local experts of one shape as one grouped product for each of their linear layers, instead of a loop of small ones.

Experts qualify if each works on rows one by one, by linear layers and elementwise functions alone, and all are built
alike. What they do is read off by tracing one of them (``torch.fx``); each linear layer of it then takes all experts'
rows at once (``torch.nn.functional.grouped_mm``). Parameters stay where and what they are, gradients too. Sums inside a
product may be taken in another order than by the loop's products.
"""

from __future__ import annotations

import dataclasses
import operator
import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.autograd.function import once_differentiable

from ..expert_bias import ExpertRows, add_expert_bias
from .module_tree import ModuleTree

_ELEMENTWISE_MODULES = (
    nn.GELU,
    nn.Identity,
    nn.LeakyReLU,
    nn.ReLU,
    nn.SiLU,
    nn.Sigmoid,
    nn.Softplus,
    nn.Tanh,
)
_ELEMENTWISE_FUNCTIONS = frozenset(
    (F.gelu, F.leaky_relu, F.relu, F.sigmoid, F.silu, F.softplus, F.tanh, torch.mul, torch.add, torch.relu)
    + (torch.sigmoid, torch.tanh, operator.mul, operator.add)
)
_ELEMENTWISE_METHODS = frozenset(("add", "mul", "relu", "sigmoid", "tanh"))
_FIRST_PARAMETER = 3
"""Place of the first weight among the arguments of ``_GroupedLinear``."""
# Halves of a row, as gated units take them.
_CHUNKS = (torch.chunk, "chunk")
# Faster than attributes of modules, which are looked for in Python.
_PARAMETERS = operator.attrgetter("_parameters")
_WEIGHT, _BIAS = operator.itemgetter("weight"), operator.itemgetter("bias")
_ALIGNMENT = 16
"""Bytes of which the products want rows of weights and of tokens to be multiples, on GPUs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearGradients:
    """What the gradients of one grouped linear layer are made of; the next replay of a graph may overwrite it."""

    parameters: tuple[torch.Tensor, ...]
    """L weights ``[O, I]``, and L biases ``[O]`` or none."""
    num_experts: int
    """L."""
    x: torch.Tensor
    """``[S, I]``: rows that went in."""
    grad: torch.Tensor
    """``[S, O]``: gradient of those that came out."""
    ends: torch.Tensor
    """``[L]`` int32: where the experts' rows end."""

    def weights(self) -> Sequence[torch.Tensor]:
        """L of ``[O, I]``, views of one tensor."""
        return _products_by_expert(self.grad.t(), self.x, self.ends).unbind()

    def biases(self) -> Sequence[torch.Tensor]:
        """L of ``[O]``, views of one tensor."""
        # Sums of rows are a product with ones; eight columns, for alignment.
        ones = self.grad.new_ones(self.grad.shape[0], 8)
        return _products_by_expert(self.grad.t(), ones, self.ends)[..., 0].contiguous().unbind()

    def of_parameters(self, needed: Sequence[bool]) -> list[torch.Tensor | None]:
        """A gradient for each parameter; None where no one ``needed`` any of its kind."""
        count = self.num_experts
        found: list[torch.Tensor | None] = []
        for kind, compute in ((needed[:count], self.weights), (needed[count:], self.biases)):
            found += compute() if any(kind) else [None] * len(kind)
        return found


class GroupedExperts:
    """The experts of one container as grouped products; from :class:`GroupedPlans`."""

    def __init__(self, experts: nn.ModuleList, graph: fx.Graph) -> None:
        self._first = experts[0]
        self._interpreter = _Interpreter([dict(expert.named_modules()) for expert in experts], graph)
        self._tree = ModuleTree(experts)

    def __call__(
        self, rows: torch.Tensor, ends: torch.Tensor, later: list[LinearGradients] | None = None
    ) -> torch.Tensor:
        """Outputs ``[S, M']`` of ``rows`` ``[S, M]``, grouped by expert.

        Args:
            rows: rows after the last expert's belong to nobody; what becomes of them has no meaning.
            ends: ``[L]`` int32: where groups end.
            later: if given, the backward computes no gradients of parameters, but appends what they are made of.
        """
        return self._interpreter.apply(rows, ends, later)

    def is_current(self) -> bool:
        """Whether the experts are those that they were, made of the same modules."""
        return self._tree.is_current()

    def problem(self, rows: torch.Tensor) -> str:
        """Why these rows must go through the experts one by one, now; empty if they need not."""
        if torch.is_autocast_enabled(rows.device.type):
            return "autocast is on"
        if self._tree.has_hooks():
            return "an expert has hooks"
        parameters = tuple(self._first.parameters())
        dtypes = {p.dtype for p in parameters} | {rows.dtype}
        if len(dtypes) > 1:
            return f"rows are {rows.dtype}, parameters are not all"
        if rows.device.type == "cuda":
            if rows.dtype != torch.bfloat16:
                return f"rows are {rows.dtype}; GPUs have grouped products of bfloat16"
            weights = [p.shape for p in parameters if p.dim() == 2]
            odd = [shape for shape in weights if any(size * 2 % _ALIGNMENT for size in shape)]
            if odd:
                return f"a weight of shape {tuple(odd[0])} has rows or columns of no multiple of {_ALIGNMENT} bytes"
        return ""


class GroupedPlans:
    """Which expert containers are grouped, found out once for each, and again where modules were replaced."""

    def __init__(self) -> None:
        self._found: weakref.WeakKeyDictionary[nn.Module, tuple[GroupedExperts | None, str]] = (
            weakref.WeakKeyDictionary()
        )

    def of(self, container: nn.Module) -> tuple[GroupedExperts | None, str]:
        """The container's experts grouped, or None and the reason."""
        found, _ = self._found.get(container, (None, ""))
        if container not in self._found or (found is not None and not found.is_current()):
            experts = container.deepspeed_experts
            graph, reason = rowwise_graph(list(experts))
            self._found[container] = (None if graph is None else GroupedExperts(experts, graph), reason)
        return self._found[container]


def rowwise_graph(experts: Sequence[nn.Module]) -> tuple[fx.Graph | None, str]:
    """What each of these experts does to a row, or None and why there is no such thing."""
    if not hasattr(F, "grouped_mm"):
        return None, f"torch {torch.__version__} has no grouped product"
    first = experts[0]
    for expert in experts[1:]:
        # The text has sizes and options of all modules inside.
        if type(expert) is not type(first) or repr(expert) != repr(first) or _shapes(expert) != _shapes(first):
            return None, "experts are not built alike"
    if any(True for _ in first.buffers()):
        return None, "experts have buffers"
    try:
        graph = _Tracer().trace(first)
    except Exception as error:  # whatever a forward does with what is no tensor
        return None, f"an expert cannot be traced ({type(error).__name__})"
    named = dict(first.named_modules())
    for node in graph.nodes:
        if problem := _node_problem(node, named):
            return None, problem
    return graph, ""


def _node_problem(node: fx.Node, named: dict[str, nn.Module]) -> str:
    if node.op == "call_module":
        module = named[node.target]
        plain = type(module) is nn.Linear or isinstance(module, _ELEMENTWISE_MODULES)
        return "" if plain else f"an expert contains {type(module).__name__}"
    if node.op == "call_function":
        if node.target is operator.getitem and node.args[0].target in _CHUNKS and type(node.args[1]) is int:
            return ""
        if node.target in _CHUNKS:
            return _chunk_problem(node)
        return "" if node.target in _ELEMENTWISE_FUNCTIONS else f"an expert calls {node.target}"
    if node.op == "call_method":
        if node.target in _CHUNKS:
            return _chunk_problem(node)
        return "" if node.target in _ELEMENTWISE_METHODS else f"an expert calls {node.target}"
    if node.op == "output":
        return "" if isinstance(node.args[0], fx.Node) else "an expert returns more than one tensor"
    if node.op == "placeholder":
        is_first = node.prev.op == "root"
        return "" if is_first or node.args else "an expert has more than one input"
    return f"an expert uses {node.target}"


def _chunk_problem(node: fx.Node) -> str:
    dim = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else 0)
    return "" if dim == -1 else "an expert cuts rows apart"


def _shapes(expert: nn.Module) -> list[tuple[str, torch.Size, torch.dtype]]:
    return [(name, p.shape, p.dtype) for name, p in expert.named_parameters()]


class _Tracer(fx.Tracer):
    """Looks into modules that are made of others."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return type(module).__module__.startswith("torch.nn.") and not isinstance(module, nn.Sequential)


class _Interpreter:
    """Runs a traced expert for all experts at once."""

    def __init__(self, modules: Sequence[dict[str, nn.Module]], graph: fx.Graph) -> None:
        self._graph = graph
        calls = [node.target for node in graph.nodes if node.op == "call_module"]
        self._modules = {name: tuple(of_expert[name] for of_expert in modules) for name in calls}

    def apply(self, rows: torch.Tensor, ends: torch.Tensor, later: list[LinearGradients] | None) -> torch.Tensor:
        values: dict[fx.Node, Any] = {}

        def value(argument: Any) -> Any:
            return fx.node.map_arg(argument, lambda node: values[node])

        whose, given = ExpertRows(ends, rows.shape[0]), False
        for node in self._graph.nodes:
            if node.op == "placeholder":
                values[node] = node.args[0] if given else rows
                given = True
            elif node.op == "call_module":
                values[node] = self._call(node.target, value(node.args)[0], whose, later)
            elif node.op == "call_function":
                values[node] = node.target(*value(node.args), **value(node.kwargs))
            elif node.op == "call_method":
                target, *rest = value(node.args)
                values[node] = getattr(target, node.target)(*rest, **value(node.kwargs))
        return values[self._graph.output_node().args[0]]

    def _call(self, name: str, x: torch.Tensor, whose: ExpertRows, later: list[LinearGradients] | None) -> torch.Tensor:
        modules = self._modules[name]
        if type(modules[0]) is not nn.Linear:
            return modules[0](x)
        parameters = tuple(map(_PARAMETERS, modules))
        biases = () if modules[0].bias is None else map(_BIAS, parameters)
        return _GroupedLinear.apply(x, whose, later, *map(_WEIGHT, parameters), *biases)


class _GroupedLinear(torch.autograd.Function):
    """``x`` ``[S, I]`` to ``[S, O]``; L weights ``[O, I]``, L biases ``[O]`` or none."""

    @staticmethod
    def forward(ctx, x, whose, later, *parameters):
        ends = whose.ends
        count = ends.shape[0]
        weights, biases = parameters[:count], parameters[count:]
        ctx.save_for_backward(x, ends, *parameters)
        ctx.later = later
        out = x.new_empty(x.shape[0], weights[0].shape[0])
        if x.shape[0]:
            out = F.grouped_mm(x, stacked(weights).transpose(1, 2), offs=ends)
            if biases:
                add_expert_bias(out, biases, whose)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, ends, *parameters = ctx.saved_tensors
        count = ends.shape[0]
        if x.shape[0] == 0:
            return torch.zeros_like(x), None, None, *map(torch.zeros_like, parameters)
        grad = grad.contiguous()
        # Detached: whoever keeps it for later shall not keep autograd's graph.
        rows = x.detach()
        of = LinearGradients(parameters=tuple(parameters), num_experts=count, x=rows, grad=grad, ends=ends)
        if ctx.later is None:
            gradients = of.of_parameters(ctx.needs_input_grad[_FIRST_PARAMETER:])
        else:
            ctx.later.append(of)
            gradients = [None] * len(parameters)
        grad_x = F.grouped_mm(grad, stacked(parameters[:count]), offs=ends) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, *gradients


def _products_by_expert(columns: torch.Tensor, rows: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """``[L, O, I]`` from ``[O, S]`` and ``[S, I]``: a product for each expert, over its own rows."""
    products = F.grouped_mm(columns, rows, offs=ends)
    if products.is_cuda and torch.cuda.get_device_capability(products.device)[0] >= 10:
        # There the product of no rows is left as the memory was (pytorch/pytorch#172439).
        products.masked_fill_((ends.diff(prepend=ends.new_zeros(1)) == 0)[:, None, None], 0)
    return products


def stacked(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """``[L, O, I]`` from L weights: a view where they lie at equal distances in one memory, as where DeepSpeed's ZeRO
    keeps the parameters of equal experts; else a copy."""
    first = weights[0]
    begins = [weight.data_ptr() for weight in weights]
    step = begins[1] - begins[0] if len(begins) > 1 else first.nbytes
    in_a_row = step >= first.nbytes and step % _ALIGNMENT == 0 and begins[0] % _ALIGNMENT == 0
    if in_a_row and begins == list(range(begins[0], begins[-1] + 1, step)) and _share_memory(weights):
        strides = (step // first.element_size(), first.shape[1], 1)
        return first.detach().as_strided((len(weights), *first.shape), strides, first.storage_offset())
    with torch.no_grad():
        return torch.stack(tuple(weights))


def _share_memory(weights: Sequence[torch.Tensor]) -> bool:
    storage = weights[0].untyped_storage().data_ptr()
    return all(w.is_contiguous() and w.untyped_storage().data_ptr() == storage for w in weights)
