"""Gradients through dispatch, experts and combine, against the same model on one process with all experts."""

from __future__ import annotations

import dataclasses
import itertools

import oracle
import pytest
import torch
from cases import PADDED, Case, dtype_id, layout_id, make_buffer, make_world
from harness import RankContext, Ranks, error_of
from torch.utils.checkpoint import checkpoint

import ray_deepep
from ray_deepep import Buffer, DispatchResult, ExpertMajor, InvalidArgumentError, InvalidTypeError, TokenMajor

SEED = 7
# Relative to the largest element; rows of bfloat16 are rounded at each of about six steps.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gradients:
    """Results of one rank."""

    out: torch.Tensor
    dx: torch.Tensor
    dweights: torch.Tensor
    dexperts: torch.Tensor
    """``[L, H, H]``."""


def expert_matrices(case: Case) -> torch.Tensor:
    """``[E, H, H]``, one matrix per expert."""
    generator = torch.Generator().manual_seed(case.seed + 99)
    return torch.randn(case.num_experts, case.hidden, case.hidden, generator=generator) / case.hidden**0.5


def loss_factors(world: oracle.World, rank: int) -> torch.Tensor:
    """The gradient of a rank's output."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(world.x[rank].shape, generator=generator).to(world.x[rank].dtype)


def clean_world(case: Case) -> oracle.World:
    """As ``make_world`` with 0 beside -1, for the model on one process multiplies with it."""
    world = make_world(case)
    return dataclasses.replace(world, topk_weights=[weights.nan_to_num() for weights in world.topk_weights])


def on_one_process(case: Case, world: oracle.World) -> list[Gradients]:
    """All ranks' results from autograd in float64, without any dispatch."""
    matrices = expert_matrices(case).double().requires_grad_()
    xs = [x.double().requires_grad_() for x in world.x]
    all_weights = [weights.double().requires_grad_() for weights in world.topk_weights]
    outs, loss = [], torch.zeros((), dtype=torch.float64)
    for rank, (x, weights, idx) in enumerate(zip(xs, all_weights, world.topk_idx)):
        rows = torch.tanh(torch.einsum("th,tkhj->tkj", x, matrices[idx.clamp(min=0)]))
        outs.append((rows * torch.where(idx >= 0, weights, 0.0).unsqueeze(-1)).sum(1))
        loss = loss + (outs[-1] * loss_factors(world, rank).double()).sum()
    loss.backward()
    local = matrices.grad.split(world.num_local_experts)
    return [
        Gradients(out=out.detach(), dx=x.grad, dweights=weights.grad, dexperts=dexperts)
        for out, x, weights, dexperts in zip(outs, xs, all_weights, local)
    ]


def run_experts(result: DispatchResult, world: oracle.World, matrices: torch.Tensor) -> torch.Tensor:
    """Rows of this rank's experts in the layout; token-major rows come out weighted and summed."""
    x = result.x
    if isinstance(world.layout, TokenMajor):
        out = torch.zeros_like(x)
        for expert, matrix in enumerate(matrices):
            weight = torch.where(result.topk_idx == expert, result.topk_weights, 0.0).sum(1, keepdim=True)
            out = out + torch.tanh(x @ matrix) * weight.to(x.dtype)
        return out
    if isinstance(world.layout, ExpertMajor):
        offsets = result.handle.expert_offsets
        sizes = [end - start for start, end in itertools.pairwise(offsets)]
        return torch.cat([torch.tanh(part @ matrix) for part, matrix in zip(x.split(sizes), matrices)])
    blocks = x.view(world.num_ranks, world.num_local_experts, world.layout.capacity, world.hidden)
    return torch.tanh(torch.einsum("nlch,lhj->nlcj", blocks, matrices)).reshape(x.shape)


def forward(
    buffer: Buffer,
    world: oracle.World,
    rank: int,
    x: torch.Tensor,
    weights: torch.Tensor,
    matrices: torch.Tensor,
    *,
    weigh_at: str,
    reduce: str,
) -> torch.Tensor:
    """The layer; ``weigh_at`` says where a route is multiplied by its weight."""
    result = ray_deepep.dispatch(
        buffer,
        x,
        world.topk_idx[rank],
        weights,
        layout=world.layout,
        locations=None if world.locations is None else world.locations[rank],
        reduce=reduce,
    )
    rows = run_experts(result, world, matrices)
    if weigh_at == "experts":
        if not isinstance(world.layout, TokenMajor):
            rows = rows * result.topk_weights.unsqueeze(1).to(rows.dtype)
        return ray_deepep.combine(buffer, rows, result.handle, reduce=reduce).x
    return ray_deepep.combine(buffer, rows, result.handle, topk_weights=weights, weighted=True, reduce=reduce).x


def assert_close(name: str, got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, want {tuple(want.shape)}"
    if want.numel():
        error = float((got.double() - want.double()).abs().max())
        scale = max(float(want.abs().max()), 1.0)
        assert error <= TOLERANCE[dtype] * scale, f"{name}: differs by {error:.3g}, largest element {scale:.3g}"


def check_gradients(
    context: RankContext, transport: str, case: Case, weigh_at: str, reduce: str, recompute: bool = False
) -> None:
    world, rank = clean_world(case), context.rank
    want = on_one_process(case, world)[rank]
    x = world.x[rank].clone().requires_grad_()
    weights = world.topk_weights[rank].clone().requires_grad_()
    matrices = expert_matrices(case).split(world.num_local_experts)[rank].to(case.dtype).requires_grad_()
    with make_buffer(context, transport, case, world) as buffer:

        def layer(x: torch.Tensor, weights: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
            return forward(buffer, world, rank, x, weights, matrices, weigh_at=weigh_at, reduce=reduce)

        inputs = (x, weights, matrices)
        out = checkpoint(layer, *inputs, use_reentrant=False) if recompute else layer(*inputs)
        out.backward(loss_factors(world, rank))
    assert (out.dtype, x.grad.dtype, weights.grad.dtype) == (case.dtype, case.dtype, torch.float32)
    assert_close("out", out.detach(), want.out, case.dtype)
    assert_close("dx", x.grad, want.dx, case.dtype)
    assert_close("dweights", weights.grad, want.dweights, case.dtype)
    assert_close("dexperts", matrices.grad, want.dexperts, case.dtype)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=dtype_id)
@pytest.mark.parametrize("num_ranks", (1, 3))
@pytest.mark.parametrize("reduce", ("exact", "fast", "expert_order"))
@pytest.mark.parametrize(
    ("layout", "weigh_at"),
    (
        (TokenMajor(), "experts"),
        (ExpertMajor(8), "experts"),
        (ExpertMajor(8), "combine"),
        (PADDED, "experts"),
        (PADDED, "combine"),
    ),
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_gradients(
    ranks: Ranks, transport: str, layout: object, weigh_at: str, reduce: str, num_ranks: int, dtype: torch.dtype
) -> None:
    case = Case(
        seed=SEED,
        num_tokens=(9, 5, 2)[:num_ranks],
        num_experts=6,
        hidden=12,
        layout=layout,
        dtype=dtype,
        routing="sparse",
    )
    ranks.run(num_ranks, check_gradients, transport, case, weigh_at, reduce)


@pytest.mark.parametrize("layout", (TokenMajor(), ExpertMajor(1), PADDED), ids=layout_id)
@pytest.mark.parametrize("num_tokens", ((0, 6), (6, 0), (0, 0)), ids=str)
@pytest.mark.parametrize("routing", ("random", "one_rank", "dropped"))
def test_ranks_without_rows(
    ranks: Ranks, transport: str, routing: str, num_tokens: tuple[int, ...], layout: object
) -> None:
    """No tokens to send, or none received, must not keep a rank from the others' backward."""
    case = Case(seed=SEED, num_tokens=num_tokens, num_experts=4, hidden=8, layout=layout, routing=routing)
    ranks.run(2, check_gradients, transport, case, "experts" if layout == TokenMajor() else "combine", "exact")


@pytest.mark.parametrize("layout", (TokenMajor(), ExpertMajor(1), PADDED), ids=layout_id)
def test_activation_checkpointing(ranks: Ranks, transport: str, layout: object) -> None:
    """A recomputed forward dispatches again, and backward uses the new plan."""
    case = Case(seed=SEED, num_tokens=(4, 6), num_experts=4, hidden=8, layout=layout)
    weigh_at = "experts" if layout == TokenMajor() else "combine"
    ranks.run(2, check_gradients, transport, case, weigh_at, "exact", True)


def check_unused_outputs(context: RankContext, transport: str, layout: object) -> None:
    """Rank 0's loss sees only the received weights, the others' only the rows; all enter every collective."""
    case = Case(seed=SEED, num_tokens=(5, 4, 3), num_experts=6, hidden=8, layout=layout)
    world, rank = clean_world(case), context.rank
    x = world.x[rank].clone().requires_grad_()
    weights = world.topk_weights[rank].clone().requires_grad_()
    locations = None if world.locations is None else world.locations[rank]
    with make_buffer(context, transport, case, world) as buffer:
        result = ray_deepep.dispatch(buffer, x, world.topk_idx[rank], weights, layout=world.layout, locations=locations)
        (3 * result.topk_weights if rank == 0 else 2 * result.x).sum().backward()
    owner = torch.div(world.topk_idx[rank], world.num_local_experts, rounding_mode="floor")
    torch.testing.assert_close(weights.grad, torch.where(owner == 0, 3.0, 0.0))
    if layout == TokenMajor():
        rows = [len({r for r in ranks if r > 0}) for ranks in owner.tolist()]
    else:
        rows = (owner > 0).sum(1).tolist()
    torch.testing.assert_close(x.grad, 2.0 * torch.tensor(rows).float().unsqueeze(1).expand_as(x))


@pytest.mark.parametrize("layout", (TokenMajor(), ExpertMajor(4), PADDED), ids=layout_id)
def test_unused_outputs(ranks: Ranks, transport: str, layout: object) -> None:
    ranks.run(3, check_unused_outputs, transport, layout)


def check_weights_that_need_no_gradient(context: RankContext, transport: str, layout: object) -> None:
    """The shorter backward of a weighted combine gives the same row gradients, bit for bit."""
    case = Case(seed=SEED, num_tokens=(5, 4), num_experts=6, hidden=8, layout=layout, dtype=torch.bfloat16)
    world, rank = clean_world(case), context.rank
    found = []
    with make_buffer(context, transport, case, world) as buffer:
        for needs_gradient in (True, False):
            x = world.x[rank].clone().requires_grad_()
            weights = world.topk_weights[rank].clone().requires_grad_(needs_gradient)
            matrices = expert_matrices(case).split(world.num_local_experts)[rank].to(case.dtype)
            out = forward(buffer, world, rank, x, weights, matrices, weigh_at="combine", reduce="exact")
            out.backward(loss_factors(world, rank))
            assert (weights.grad is not None) == needs_gradient
            found.append(x.grad)
    assert torch.equal(*found)


@pytest.mark.parametrize("layout", (ExpertMajor(4), PADDED), ids=layout_id)
def test_weights_that_need_no_gradient(ranks: Ranks, transport: str, layout: object) -> None:
    ranks.run(2, check_weights_that_need_no_gradient, transport, layout)


def check_weights_that_arrived(context: RankContext, transport: str) -> None:
    """They are not those whose gradient can be asked for, easy to mistake, and refused before anything is sent."""
    case = Case(seed=SEED, num_tokens=(5, 4), num_experts=6, hidden=8, layout=ExpertMajor(4))
    world, rank = clean_world(case), context.rank
    with make_buffer(context, transport, case, world) as buffer:
        weights = world.topk_weights[rank].clone().requires_grad_()
        result = ray_deepep.dispatch(buffer, world.x[rank], world.topk_idx[rank], weights, layout=world.layout)
        options = {"topk_weights": result.topk_weights, "weighted": True}
        error = error_of(InvalidArgumentError, lambda: ray_deepep.combine(buffer, result.x, result.handle, **options))
        assert (error.argument, error.value) == ("topk_weights", tuple(result.topk_weights.shape))
        assert f"shape must be {tuple(weights.shape)}, as given to the dispatch" in str(error)
        options["topk_weights"] = weights.tolist()
        error_of(InvalidTypeError, lambda: ray_deepep.combine(buffer, result.x, result.handle, **options))
        options["topk_weights"] = weights
        assert ray_deepep.combine(buffer, result.x, result.handle, **options).x.shape == world.x[rank].shape


def test_weights_that_arrived(ranks: Ranks, transport: str) -> None:
    ranks.run(2, check_weights_that_arrived, transport)
