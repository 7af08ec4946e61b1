"""When an MoE layer may run as CUDA graphs, and what its graphs stand for: decisions, which need no GPU.

What graphs compute is compared in tests/gpu/test_cuda_layer_graphs.py.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence

import pytest
import torch
from harness import RankContext, Ranks, error_of
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ray_deepep import ReceiveOverflowError, TokenMajor

NUM_TOKENS = 64


def tree_of(module: nn.Module) -> object:
    from ray_deepep.deepspeed.module_tree import ModuleTree

    return ModuleTree(module)


def test_a_module_tree_sees_replaced_modules_and_hooks() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.GELU(), nn.Linear(3, 2, bias=False)))
    tree = tree_of(model)
    assert tree.is_current() and not tree.has_hooks()
    assert [tuple(p.shape) for p in tree.parameters()] == [(3, 2), (3,), (2, 3)]
    hook = model[1][0].register_full_backward_hook(lambda *_: None)
    assert tree.has_hooks()
    hook.remove()
    model[0].weight = nn.Parameter(torch.ones(3, 2))
    assert tree.is_current() and tree.parameters()[0] is model[0].weight
    model[1][0] = nn.ReLU()
    assert not tree.is_current() and tree_of(model).is_current()
    tree = tree_of(model)
    model[1].append(nn.ReLU())
    assert not tree.is_current()
    empty = tree_of(nn.GELU())
    assert empty.is_current() and empty.parameters() == ()


class Peers:
    """A buffer of two ranks whose other one comes with ``num_tokens``."""

    num_local_experts = 4
    can_capture = True
    comm = types.SimpleNamespace(num_ranks=2)
    geometry = types.SimpleNamespace(hidden=8)

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens, self.num_agreements = num_tokens, 0

    def dispatch(self, x: torch.Tensor, topk_idx: torch.Tensor, *, layout: object) -> object:
        assert layout == TokenMajor() and topk_idx.tolist() == [[0], [4]]
        self.num_agreements += 1
        return types.SimpleNamespace(x=torch.stack([x[0], torch.full_like(x[0], float(self.num_tokens))]))


def make_gate(drop_tokens: bool = True) -> nn.Module:
    from deepspeed.moe.sharded_moe import TopKGate

    return TopKGate(8, 8, k=2, drop_tokens=drop_tokens)


def rows_of_calls(peers: Peers, layer: object, capacities: Sequence[int]) -> list[int | None]:
    from ray_deepep.deepspeed.graphed import GraphMemory, LayerGraphs

    graphs, tokens = LayerGraphs(GraphMemory()), torch.zeros(NUM_TOKENS, 8)
    return [graphs.num_rows(peers, layer, tokens, torch.tensor(capacity)) for capacity in capacities]


def test_ranks_agree_once_on_room_for_what_their_gates_let_through() -> None:
    peers, layer = Peers(NUM_TOKENS), types.SimpleNamespace(gate=make_gate())
    # Two calls first; then two ranks, four experts each, 20 routes at most; less fits, more does not.
    assert rows_of_calls(peers, layer, [20, 20, 20, 20, 10, 21, 20]) == [None, None, 160, 160, 160, None, 160]
    assert peers.num_agreements == 1


@pytest.mark.parametrize("why", ("other tokens", "nothing dropped", "another gate"))
def test_what_ranks_do_not_agree_on_comes_as_it_comes(why: str) -> None:
    peers, layer = Peers(NUM_TOKENS), types.SimpleNamespace(gate=make_gate())
    if why == "other tokens":
        peers.num_tokens = NUM_TOKENS - 1
    elif why == "nothing dropped":
        layer.gate.drop_tokens = False
    else:
        layer.gate = type("Gate", (type(layer.gate),), {})(8, 8, k=2)
    assert rows_of_calls(peers, layer, [20] * 5) == [None] * 5
    assert peers.num_agreements == 1, "a rank that cannot must tell the others"


def test_a_call_that_comes_again_is_counted_once() -> None:
    """Another rank wants a larger buffer where ranks would agree on room, or while a dispatch fails on all."""
    from ray_deepep.deepspeed.agree import MORE_ROOM, MoreRoomAskedError
    from ray_deepep.deepspeed.graphed import GraphMemory, LayerGraphs

    peers, layer = Peers(NUM_TOKENS), types.SimpleNamespace(gate=make_gate())
    graphs, tokens = LayerGraphs(GraphMemory()), torch.zeros(NUM_TOKENS, 8)

    def ask() -> int | None:
        return graphs.num_rows(peers, layer, tokens, torch.tensor(20))

    assert ask() is None
    graphs.not_made()
    assert ask() is ask() is None and peers.num_agreements == 0
    peers.num_tokens = MORE_ROOM
    error_of(MoreRoomAskedError, ask)
    peers.num_tokens = NUM_TOKENS
    assert ask() == ask() == 160 and peers.num_agreements == 2


def test_graphs_over_an_outgrown_buffer_serve_until_their_backward() -> None:
    from ray_deepep.deepspeed.graphed import GraphMemory, GraphPlans

    closed: list[str] = []
    memory, layer = GraphMemory(left_bytes=lambda: 100, reserved_bytes=lambda: 0), nn.Linear(1, 1)
    plans = GraphPlans()
    graphs = plans.of(layer)
    captured = types.SimpleNamespace(busy=True, close=lambda: closed.append("graph"))
    assert not memory.full and memory.take(30)
    graphs._memory, graphs._captured, graphs._num_bytes, graphs._fits = memory, captured, 30, True
    plans.leave([layer, nn.Linear(1, 1)])
    assert graphs.captured is None and not graphs._fits, "the next call is made one by one"
    assert graphs.ready(layer, torch.zeros(1, 1), None, None, None) is None and not closed
    captured.busy = False
    assert graphs.ready(layer, torch.zeros(1, 1), None, None, None) is None and closed == ["graph"]
    assert memory.take(50), "its memory is given back"
    graphs._captured = types.SimpleNamespace(busy=True, close=lambda: closed.append("busy"))
    graphs.leave()
    plans.release([layer])
    assert closed == ["graph", "busy"]


def test_transports_that_cannot_be_captured_are_not_asked() -> None:
    peers, layer = Peers(NUM_TOKENS), types.SimpleNamespace(gate=make_gate())
    peers.can_capture = False
    assert rows_of_calls(peers, layer, [20] * 5) == [None] * 5
    assert peers.num_agreements == 0


def test_graphs_take_half_of_what_was_free_and_no_more() -> None:
    from ray_deepep.deepspeed.graphed import GraphMemory

    memory = GraphMemory(left_bytes=lambda: 100, reserved_bytes=lambda: 7)
    assert not memory.full and memory.reserved_bytes() == 7
    assert memory.take(30) and not memory.full
    assert not memory.take(21) and not memory.full, "what does not fit is not counted"
    assert memory.take(20) and memory.full
    memory.give_back(30)
    assert not memory.full and memory.take(30)
    assert GraphMemory(left_bytes=lambda: 1, reserved_bytes=lambda: 0).full


class Watch(TorchDispatchMode):
    """Sees torch's operations."""

    def __torch_dispatch__(self, function: object, types: object, args: object = (), kwargs: object = None) -> object:
        return function(*args, **(kwargs or {}))


def conditions(context: RankContext) -> list[str]:
    """What was in the way of graphs, in order; collective calls are none."""
    import deepspeed_cases as ds

    from ray_deepep.deepspeed.captured import Condition

    ds.start_deepspeed()
    layer = ds.make_layer(ds.LayerCase(ep_size=1)).deepspeed_moe
    tokens = torch.zeros(NUM_TOKENS, ds.HIDDEN, requires_grad=True)
    condition = Condition(layer, tokens)
    found = [condition.problem(layer, tokens), condition.problem(layer, tokens.detach())]

    def with_setting(owner: object, name: str, value: object) -> str:
        before = getattr(owner, name)
        setattr(owner, name, value)
        text = condition.problem(layer, tokens)
        setattr(owner, name, before)
        return text

    found.append(with_setting(layer, "wall_clock_breakdown", True))
    hook = layer.experts.deepspeed_experts[1].up.register_forward_hook(lambda *_: None)
    found.append(condition.problem(layer, tokens))
    hook.remove()
    with torch.autograd.graph.save_on_cpu():
        found.append(condition.problem(layer, tokens))
    again = torch.ones((), requires_grad=True)
    again.register_hook(lambda _: found.append(condition.problem(layer, tokens)))
    again.backward()
    with Watch():
        found.append(condition.problem(layer, tokens))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found.append(condition.problem(layer, tokens))
    assert condition.problem(layer, tokens) == ""
    return found


def test_what_is_in_the_way_of_graphs(ranks: Ranks) -> None:
    (found,) = ranks.run(1, conditions)
    expected = (
        "",
        "needs no gradient",
        "are timed",
        "has hooks",
        "is hooked",
        "computed again",
        "are watched",
        "autocast",
    )
    assert len(found) == len(expected)
    for text, part in zip(found, expected):
        assert part in text and bool(part) == bool(text), (part, text)


def changes(context: RankContext) -> list[str]:
    """Changes that a graph does not stand for and that the condition missed."""
    import deepspeed_cases as ds

    from ray_deepep.deepspeed.captured import Condition

    ds.start_deepspeed()
    layer = ds.make_layer(ds.LayerCase(ep_size=1)).deepspeed_moe
    tokens = torch.zeros(NUM_TOKENS, ds.HIDDEN, requires_grad=True)
    expert = layer.experts.deepspeed_experts[0]

    def move() -> None:
        expert.up.weight.data = expert.up.weight.data.clone()

    cases: dict[str, Callable[[], object]] = {
        "capacity": lambda: setattr(layer.gate, "capacity_factor", 3.0),
        "noise": lambda: setattr(layer.gate, "noisy_gate_policy", "Jitter"),
        "evaluation": lambda: layer.gate.eval(),
        "address": move,
        "frozen": lambda: expert.down.bias.requires_grad_(False),
        "parameter": lambda: setattr(expert.up, "weight", nn.Parameter(expert.up.weight.detach().clone())),
        "module": lambda: setattr(expert, "down", nn.Linear(24, ds.HIDDEN)),
    }
    missed = []
    for name, change in cases.items():
        condition = Condition(layer, tokens)
        if not condition.holds(layer, tokens):
            missed.append(f"{name}: does not hold from the beginning")
        change()
        if condition.holds(layer, tokens):
            missed.append(name)
    condition = Condition(layer, tokens)
    missed += [str(other.shape) for other in (tokens[:8], tokens.bfloat16()) if condition.holds(layer, other)]
    return missed


def test_a_graph_does_not_stand_for_what_has_changed(ranks: Ranks) -> None:
    assert ranks.run(1, changes) == [[]]


def notes_of_mismatches(context: RankContext) -> list[list[str]]:
    """What a layer adds to a mismatch of each of two fields."""
    import deepspeed_cases as ds

    from ray_deepep import MismatchError
    from ray_deepep.deepspeed import enable, forward

    ds.start_deepspeed()
    layer, found = ds.make_layer(ds.LayerCase(ep_size=1)), []
    with pytest.MonkeyPatch.context() as patch, enable(ds.swap_config("reference", "compact")):
        for field in ("max_recv_tokens", "dtype"):

            def mismatch(*_: object, field: str = field) -> None:
                raise MismatchError("dispatch", 1, field, 160, None)

            patch.setattr(forward, "dispatch", mismatch)
            error = error_of(MismatchError, lambda: layer(torch.zeros(NUM_TOKENS, ds.HIDDEN)))
            found.append(getattr(error, "__notes__", []))
    return found


def test_a_mismatch_of_room_says_how_to_do_without_graphs(ranks: Ranks) -> None:
    (((note,), others),) = ranks.run(1, notes_of_mismatches)
    assert "SwapConfig(graphs='off')" in note and others == []


def test_who_does_not_come_to_agree_on_room_may_be_replaying() -> None:
    from ray_deepep import BootstrapError
    from ray_deepep.deepspeed.forward import comes_of_graphs

    absent = BootstrapError("buffer_room", [1], 60.0)
    assert comes_of_graphs(absent, replayed=True) and not comes_of_graphs(absent, replayed=False)
    assert not comes_of_graphs(BootstrapError("meet", [1], 60.0), replayed=True)


class Graph:
    """Calls a function where a CUDA graph would be launched."""

    def __init__(self, run: Callable[[], None]) -> None:
        self.run = run

    def replay(self) -> None:
        self.run()

    def close(self) -> None:
        self.run = lambda: pytest.fail("replayed after it was closed")


def captured_layer() -> tuple[object, torch.Tensor, list[nn.Parameter]]:
    """A layer whose graphs compute ``out = w x`` and ``l_aux = sum(x)`` in place; with what it tells of overflows."""
    from ray_deepep.deepspeed.captured import CapturedLayer, _Static

    weight, frozen = nn.Parameter(torch.tensor(3.0)), nn.Parameter(torch.tensor(1.0), requires_grad=False)
    static = _Static(
        x=torch.zeros(4, 2),
        out=torch.zeros(4, 2),
        l_aux=torch.zeros(()),
        exp_counts=torch.zeros(2, dtype=torch.int64),
        grad_out=torch.zeros(4, 2),
        grad_l_aux=torch.zeros(()),
        gradients=(torch.zeros(4, 2), torch.zeros(()), None),
        overflow=torch.zeros(2, dtype=torch.int32),
    )

    def forward() -> None:
        static.out.copy_(weight.detach() * static.x)
        static.l_aux.copy_(static.x.sum())

    def backward() -> None:
        static.gradients[0].copy_(weight.detach() * static.grad_out + static.grad_l_aux)
        static.gradients[1].copy_((static.grad_out * static.x).sum())

    handle = types.SimpleNamespace(first_rank=8, max_recv_tokens=100)
    layer = CapturedLayer((weight, frozen), static, [], (Graph(forward), Graph(backward)), handle)
    return layer, static.overflow, [weight, frozen]


def test_results_and_gradients_are_copies() -> None:
    captured, _, (weight, frozen) = captured_layer()
    layer = types.SimpleNamespace(l_aux=None, exp_counts=None)
    inputs = [torch.randn(4, 2, requires_grad=True) for _ in range(2)]
    outs = []
    for x in inputs:
        outs.append(captured(layer, x))
        (outs[-1].sum() + 2 * layer.l_aux).backward()
    for x, out in zip(inputs, outs):
        torch.testing.assert_close(out, 3 * x)
        torch.testing.assert_close(x.grad, torch.full((4, 2), 5.0))
    torch.testing.assert_close(weight.grad, inputs[0].sum() + inputs[1].sum())
    assert frozen.grad is None


def test_a_layer_is_busy_until_its_backward_has_run_or_cannot_any_more() -> None:
    captured, _, _ = captured_layer()
    layer, x = types.SimpleNamespace(l_aux=None, exp_counts=None), torch.ones(4, 2, requires_grad=True)
    assert not captured.busy
    out = captured(layer, x)
    assert captured.busy
    out.sum().backward(retain_graph=True)
    assert not captured.busy
    assert "only one backward per forward" in str(error_of(RuntimeError, out.sum().backward))
    out = captured(layer, x)
    del out
    assert captured.busy, "its l_aux is still there"
    layer.l_aux = None
    assert not captured.busy


def test_an_overflow_in_a_replay_is_raised_by_the_next_one() -> None:
    captured, overflow, _ = captured_layer()
    layer, x = types.SimpleNamespace(l_aux=None, exp_counts=None), torch.ones(4, 2, requires_grad=True)
    out = captured(layer, x)
    overflow.copy_(torch.tensor([2, 123]))
    error = error_of(ReceiveOverflowError, out.sum().backward)
    assert (error.rank, error.needed, error.room) == (9, 123, 100)
    error_of(ReceiveOverflowError, lambda: captured(layer, x))
