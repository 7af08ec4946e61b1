"""Experts as grouped products against experts one by one: outputs, all gradients, and when there is no such thing."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from deepspeed.moe.experts import Experts
from deepspeed_cases import HIDDEN, Expert, LayerCase, differences, make_layer, start_deepspeed, step, swap_config
from harness import RankContext, Ranks
from torch import nn

from ray_deepep import CommConfig
from ray_deepep.deepspeed import enable
from ray_deepep.deepspeed.grouped import GroupedPlans, rowwise_graph, stacked
from ray_deepep.deepspeed.registry import BufferRegistry


class Gated(nn.Module):
    """Two linear layers in, one out, no biases."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(HIDDEN, 24, bias=False), nn.Linear(HIDDEN, 24, bias=False)
        self.down = nn.Linear(24, HIDDEN, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Halves(nn.Module):
    """As ``Gated``, with one linear layer in, which is cut in two."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(HIDDEN, 48), nn.Linear(24, HIDDEN, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.both(x).chunk(2, dim=-1)
        return self.down(F.gelu(gate, approximate="tanh") * up)


def in_a_row() -> nn.Module:
    return nn.Sequential(nn.Linear(HIDDEN, 24), nn.Sequential(nn.ReLU(), nn.Linear(24, 8)), nn.Linear(8, HIDDEN))


def check_grouped(context: RankContext, transport: str, case: LayerCase, layout: str, combine: str) -> None:
    start_deepspeed()
    layer = make_layer(case)
    expected = step(case, layer)
    with enable(swap_config(transport, layout, combine, "grouped")) as swap:
        step(case, layer)
        seen = step(case, layer)
        assert swap._registry.grouped.of(layer.deepspeed_moe.experts)[1] == "" and not swap._registry._logged
    assert not differences(expected, seen, atol=1e-5 if case.dtype == torch.float32 else 2e-2)
    assert expected["y"].abs().max() > 0


@pytest.mark.parametrize("layout,combine", (("padded", "exact"), ("padded", "fast"), ("compact", "exact")))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
def test_same_results(ranks: Ranks, transport: str, dtype: torch.dtype, layout: str, combine: str) -> None:
    ranks.run(2, check_grouped, transport, LayerCase(k=2, dtype=dtype), layout, combine)


CASES = {
    "gated": LayerCase(k=4, expert=Gated),
    "halves": LayerCase(k=2, expert=Halves),
    "nested": LayerCase(k=1, expert=in_a_row),
    "residual": LayerCase(moe={"use_residual": True}),
    "one expert a rank": LayerCase(num_experts=2, k=2),
    "idle experts": LayerCase(k=1, shape=(3,), moe={"min_capacity": 1}),
    "keep": LayerCase(k=2, drop_tokens=False),
}


@pytest.mark.parametrize("name", CASES)
def test_kinds_of_experts(ranks: Ranks, name: str) -> None:
    ranks.run(2, check_grouped, "reference", CASES[name], "padded", "exact")


def test_four_ranks(ranks: Ranks, transport: str) -> None:
    ranks.run(4, check_grouped, transport, LayerCase(ep_size=2, k=2), "padded", "exact")


def idle_rank(context: RankContext) -> None:
    """Nothing is routed to the experts of rank 1: their gradients are zero, not missing."""
    start_deepspeed()
    case = LayerCase(k=1, moe={"min_capacity": 1})
    layer = make_layer(case)
    with torch.no_grad():
        layer.deepspeed_moe.gate.wg.weight.zero_()
    expected = step(case, layer)
    with enable(swap_config("reference", experts="grouped")):
        seen = step(case, layer)
    assert not differences(expected, seen, atol=1e-5)
    grads = [value for name, value in seen.items() if "experts" in name]
    assert any(grad.any() for grad in grads) == (context.rank == 0)


def test_experts_without_rows(ranks: Ranks) -> None:
    ranks.run(2, idle_rank)


def with_hook(context: RankContext) -> list[str]:
    """Whoever looks at an expert, or puts another module into it, gets what it would get without the grouping."""
    start_deepspeed()
    case = LayerCase()
    layer = make_layer(case)
    expected = step(case, layer)
    with enable(swap_config("reference", experts="grouped")) as swap:
        step(case, layer)
        experts, calls = layer.deepspeed_moe.experts.deepspeed_experts, []
        handles = [expert.up.register_forward_hook(lambda *_: calls.append(1)) for expert in experts]
        assert not differences(expected, step(case, layer))
        assert len(calls) == len(experts)
        logged = sorted(swap._registry._logged)
        for handle in handles:
            handle.remove()
        for expert in experts:
            expert.up = nn.Sequential(expert.up, nn.Identity())
        assert not differences(step(case, layer), step(case, layer))
        first = dict(swap._registry.grouped.of(layer.deepspeed_moe.experts)[0]._interpreter._modules)
        assert "up.0" in first and "up" not in first
    return logged


def test_hooks_and_replaced_modules(ranks: Ranks) -> None:
    for logged in ranks.run(2, with_hook):
        assert logged == ["experts run one after the other: an expert has hooks"]


def test_an_expert_that_was_replaced_is_seen() -> None:
    container, plans = Experts(Expert(), 2), GroupedPlans()
    before, _ = plans.of(container)
    assert plans.of(container)[0] is before is not None
    container.deepspeed_experts[1] = Expert()
    assert plans.of(container)[0] is not before


def test_what_modules_hold_in_new_dictionaries_is_seen() -> None:
    """As others put them there: ZeRO 3 changes those of parameters."""
    container, plans = Experts(Expert(), 2), GroupedPlans()
    experts = container.deepspeed_experts
    rows, ends = torch.randn(6, HIDDEN), torch.tensor([2, 6], dtype=torch.int32)
    grouped, _ = plans.of(container)
    before = grouped(rows, ends)
    for expert in experts:
        expert.up._parameters = dict(expert.up._parameters)
        expert.up.weight = nn.Parameter(torch.randn_like(expert.up.weight))
    assert plans.of(container)[0] is grouped
    after = grouped(rows, ends)
    wanted = torch.cat([expert(part) for expert, part in zip(experts, rows.split((2, 4)))])
    assert not torch.allclose(after, before) and torch.allclose(after, wanted, atol=1e-5)
    experts[1].up._forward_hooks = {0: lambda *_: None}
    assert grouped.problem(rows) == "an expert has hooks"
    experts[1]._modules = dict(experts[1]._modules) | {"up": nn.Linear(HIDDEN, 24)}
    assert not grouped.is_current()


def auto_on_cpus(context: RankContext) -> None:
    start_deepspeed()
    layer = make_layer(LayerCase())
    expected = step(LayerCase(), layer)
    with enable(swap_config("reference", combine="auto")):
        assert not differences(expected, step(LayerCase(), layer))


def test_auto_is_bit_equal_on_cpus(ranks: Ranks) -> None:
    ranks.run(2, auto_on_cpus)


def combines(context: RankContext) -> None:
    """Rows of grouped experts come home as sums, unless they are told to come one by one."""
    case = LayerCase(k=4, dtype=torch.bfloat16)
    start_deepspeed()
    layer = make_layer(case)
    seen = {}
    for combine in ("auto", "fast", "exact"):
        with enable(swap_config("reference", combine=combine, experts="grouped")):
            seen[combine] = step(case, layer)
    assert not differences(seen["fast"], seen["auto"])
    assert differences(seen["exact"], seen["auto"])


def test_auto_sums_where_grouped_experts_are(ranks: Ranks) -> None:
    ranks.run(2, combines)


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.down = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.norm(x))


class Mixing(Expert):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + x.mean()


class Branching(Expert):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if x.sum() > 0 else x


class Cutting(Expert):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).chunk(2)[0]


class Scaled(Expert):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(HIDDEN))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.scale


class Pair(Expert):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return super().forward(x), None


class Noisy(Expert):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(super().forward(x), 0.1)


UNFIT = {
    "another layer": ([Normed(), Normed()], "an expert contains LayerNorm"),
    "rows are mixed": ([Mixing(), Mixing()], "an expert calls mean"),
    "it depends on values": ([Branching(), Branching()], "an expert cannot be traced (TraceError)"),
    "rows are cut apart": ([Cutting(), Cutting()], "an expert cuts rows apart"),
    "a parameter of its own": ([Scaled(), Scaled()], "an expert uses scale"),
    "two outputs": ([Pair(), Pair()], "an expert returns more than one tensor"),
    "random numbers": ([Noisy(), Noisy()], "an expert calls <function dropout"),
    "different sizes": ([nn.Linear(16, 16), nn.Linear(16, 16, bias=False)], "experts are not built alike"),
    "different options": (
        [nn.Sequential(nn.Linear(16, 16), nn.GELU()), nn.Sequential(nn.Linear(16, 16), nn.GELU("tanh"))],
        "experts are not built alike",
    ),
}


@pytest.mark.parametrize("name", UNFIT)
def test_experts_that_are_not_grouped(name: str) -> None:
    experts, reason = UNFIT[name]
    graph, found = rowwise_graph(experts)
    assert graph is None and found.startswith(reason)


def test_rows_of_another_dtype_and_autocast() -> None:
    grouped, _ = GroupedPlans().of(Experts(Expert(), 2))
    rows = torch.ones(4, HIDDEN)
    assert grouped.problem(rows) == ""
    assert "rows are torch.bfloat16" in grouped.problem(rows.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert grouped.problem(rows) == "autocast is on"


def test_weights_at_equal_distances_are_not_copied() -> None:
    flat = torch.randn(3 * 40)
    views = [flat[40 * i + 8 : 40 * i + 32].view(4, 6) for i in range(3)]
    whole = stacked(views)
    assert whole.data_ptr() == views[0].data_ptr() and torch.equal(whole, torch.stack(views))
    uneven = [views[0], views[2], views[1]]
    assert torch.equal(stacked(uneven), torch.stack(uneven))
    apart = [view.clone() for view in views]
    assert torch.equal(stacked(apart), torch.stack(apart)) and stacked(apart).data_ptr() != apart[0].data_ptr()
    odd = [flat[39 * i : 39 * i + 24].view(4, 6) for i in range(3)]
    assert torch.equal(stacked(odd), torch.stack(odd)) and stacked(odd).data_ptr() != odd[0].data_ptr()


def test_what_is_not_grouped_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    registry = BufferRegistry(CommConfig())
    with caplog.at_level(logging.WARNING, "ray_deepep"):
        for _ in range(3):
            registry.log_once(logging.WARNING, "experts run one after the other: for a reason")
    assert caplog.messages == ["experts run one after the other: for a reason"]
