"""``max_recv_tokens``: outputs of a fixed number of rows, against the oracle; overflow; gradients."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cases import (
    DTYPES,
    FLOAT8,
    PADDED,
    Case,
    all_modes,
    assert_same,
    check_case,
    dispatch,
    dtype_id,
    layout_id,
    make_buffer,
    make_world,
)
from harness import RankContext, Ranks, error_of
from test_autograd import assert_close, clean_world, expert_matrices, loss_factors, on_one_process

import ray_deepep
from ray_deepep import (
    ExpertMajor,
    InvalidArgumentError,
    InvalidTypeError,
    MismatchError,
    ReceiveOverflowError,
    TokenMajor,
)
from ray_deepep.fixed_shapes import fit_rows
from ray_deepep.handle import Layout

SEED = 31
LAYOUTS = (TokenMajor(), ExpertMajor(1), ExpertMajor(8))
WORLD_SIZES = (1, 2, 4)


def tokens_of(num_ranks: int) -> tuple[int, ...]:
    return (9, 4, 0, 7)[:num_ranks]


@pytest.mark.parametrize("num_ranks", WORLD_SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_id)
def test_rows_counts_and_combines(
    ranks: Ranks, transport: str, layout: Layout, dtype: torch.dtype, num_ranks: int
) -> None:
    hidden = 256 if dtype == FLOAT8 else 24
    case = Case(
        seed=SEED,
        num_tokens=tokens_of(num_ranks),
        hidden=hidden,
        layout=layout,
        dtype=dtype,
        routing="sparse",
        spare_rows=5,
    )
    ranks.run(num_ranks, check_case, transport, case)


@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_id)
def test_room_that_fits_exactly(ranks: Ranks, transport: str, layout: Layout) -> None:
    case = Case(seed=SEED, num_tokens=(6, 3), layout=layout, routing="one_expert", spare_rows=0)
    ranks.run(2, check_case, transport, case)


@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_id)
@pytest.mark.parametrize("num_tokens", ((0, 0), (0, 5)), ids=str)
def test_ranks_without_rows(ranks: Ranks, transport: str, num_tokens: tuple[int, ...], layout: Layout) -> None:
    for routing in ("random", "dropped", "one_rank"):
        case = Case(seed=SEED, num_tokens=num_tokens, layout=layout, routing=routing, spare_rows=2)
        ranks.run(2, check_case, transport, case)


@pytest.mark.parametrize("layout", (TokenMajor(), ExpertMajor(8)), ids=layout_id)
def test_all_combine_modes(ranks: Ranks, transport: str, layout: Layout) -> None:
    case = Case(seed=SEED, num_tokens=(7, 0, 4, 3), num_topk=4, layout=layout, dtype=torch.bfloat16, spare_rows=3)
    ranks.run(4, check_case, transport, case, all_modes(layout == TokenMajor()))


def check_overflow(context: RankContext, transport: str, layout: Layout, room: int) -> tuple[str, str]:
    """Rank 0 gets all rows, too many; the error comes from its handle and only from there. What fits is right."""
    case = Case(seed=SEED, num_tokens=(6, 5), num_experts=4, num_topk=2, layout=layout, routing="one_rank")
    world, rank = make_world(case), context.rank
    limited = dataclasses.replace(world, max_recv_tokens=room)
    with make_buffer(context, transport, case, world) as buffer:
        whole, cut = dispatch(buffer, world, rank), dispatch(buffer, limited, rank)
        needed = whole.handle.num_rows
        assert needed == world.arrivals[rank].num_rows and cut.x.shape == (room, case.hidden)
        for name in ("x", "topk_idx", "topk_weights"):
            want = getattr(whole, name)
            fill = -1 if name == "topk_idx" else 0
            assert_same(name, getattr(cut, name), None if want is None else fit_rows(want, room, fill))
        check_combine_of_what_fits(buffer, cut.handle, whole.handle)
        if rank == 0:
            error = error_of(ReceiveOverflowError, cut.handle.check)
            assert (error.rank, error.needed, error.room) == (0, needed, room)
            of_a_node = dataclasses.replace(cut.handle, first_rank=4)
            assert error_of(ReceiveOverflowError, of_a_node.check).rank == 4
        else:
            cut.handle.check()
        whole.handle.check()
    return str(needed), str(error) if rank == 0 else ""


def check_combine_of_what_fits(buffer, cut, whole) -> None:
    """As a combine of all rows with zeros where there was no room."""
    generator = torch.Generator().manual_seed(SEED)
    rows = torch.randn(cut.num_rows, buffer.geometry.hidden, generator=generator)
    assert torch.equal(buffer.combine(rows, cut).x, buffer.combine(fit_rows(rows, whole.num_rows), whole).x)
    shape = (cut.num_rows, cut.num_topk) if isinstance(cut.layout, TokenMajor) else (cut.num_rows,)
    weights = torch.rand(shape, generator=generator)
    want = buffer.combine_weights(fit_rows(weights, whole.num_rows), whole)
    assert torch.equal(buffer.combine_weights(weights, cut), want)


@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_id)
@pytest.mark.parametrize("room", (1, 10))
def test_overflow_is_reported_by_the_handle(ranks: Ranks, transport: str, layout: Layout, room: int) -> None:
    (needed, message), (_, none) = ranks.run(2, check_overflow, transport, layout, room)
    assert message == f"max_recv_tokens: rank 0 needed {needed} rows; got {room}"
    assert none == ""


def check_gradients(context: RankContext, transport: str, case: Case, weigh_at: str, reduce: str) -> None:
    """Experts run on all rows, those that nobody sent included: their gradients must not count."""
    world, rank = clean_world(case), context.rank
    want = on_one_process(case, world)[rank]
    x = world.x[rank].clone().requires_grad_()
    weights = world.topk_weights[rank].clone().requires_grad_()
    matrices = expert_matrices(case).split(world.num_local_experts)[rank].requires_grad_()
    with make_buffer(context, transport, case, world) as buffer:
        result = ray_deepep.dispatch(
            buffer,
            x,
            world.topk_idx[rank],
            weights,
            layout=world.layout,
            reduce=reduce,
            max_recv_tokens=world.max_recv_tokens,
            num_sms=4,
        )
        assert result.x.shape == (world.max_recv_tokens, case.hidden)
        rows = run_experts(result, matrices)
        if weigh_at == "experts" and isinstance(world.layout, ExpertMajor):
            rows = rows * result.topk_weights.unsqueeze(1)
        more = {"topk_weights": weights, "weighted": True} if weigh_at == "combine" else {}
        out = ray_deepep.combine(buffer, rows, result.handle, reduce=reduce, num_sms=4, **more).x
        out.backward(loss_factors(world, rank))
    assert_close("out", out.detach(), want.out, case.dtype)
    assert_close("dx", x.grad, want.dx, case.dtype)
    assert_close("dweights", weights.grad, want.dweights, case.dtype)
    assert_close("dexperts", matrices.grad, want.dexperts, case.dtype)


def run_experts(result: ray_deepep.DispatchResult, matrices: torch.Tensor) -> torch.Tensor:
    """As a program under capture does: masks from the device, no number on the host. Rows of nobody come out as 1."""
    x, out = result.x, torch.ones_like(result.x)
    if result.topk_idx is not None:
        used = (result.topk_idx >= 0).any(1, keepdim=True)
        total = torch.zeros_like(x)
        for expert, matrix in enumerate(matrices):
            weight = torch.where(result.topk_idx == expert, result.topk_weights, 0.0).sum(1, keepdim=True)
            total = total + torch.tanh(x @ matrix) * weight
        return torch.where(used, total, out)
    counts = result.handle.device_counts
    row = torch.arange(len(x))
    for expert, matrix in enumerate(matrices):
        begin = counts.expert_offsets[expert]
        mine = (row >= begin) & (row < begin + counts.num_recv_tokens_per_expert[expert])
        out = torch.where(mine.unsqueeze(1), torch.tanh(x @ matrix), out)
    return out


@pytest.mark.parametrize("num_ranks", WORLD_SIZES)
@pytest.mark.parametrize("reduce", ("exact", "fast"))
@pytest.mark.parametrize(
    ("layout", "weigh_at"),
    ((TokenMajor(), "experts"), (ExpertMajor(8), "experts"), (ExpertMajor(8), "combine")),
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_gradients(ranks: Ranks, transport: str, layout: Layout, weigh_at: str, reduce: str, num_ranks: int) -> None:
    case = Case(seed=SEED, num_tokens=tokens_of(num_ranks), hidden=12, layout=layout, routing="sparse", spare_rows=6)
    ranks.run(num_ranks, check_gradients, transport, case, weigh_at, reduce)


def check_unused_rows(context: RankContext, transport: str, layout: Layout) -> None:
    """Nothing depends on rank 0's rows; its zeros for them have the shape that the handle asks for."""
    case = Case(seed=SEED, num_tokens=(5, 4), hidden=8, layout=layout, spare_rows=4)
    world, rank = clean_world(case), context.rank
    x = world.x[rank].clone().requires_grad_()
    weights = world.topk_weights[rank].clone().requires_grad_()
    with make_buffer(context, transport, case, world) as buffer:
        result = ray_deepep.dispatch(
            buffer, x, world.topk_idx[rank], weights, layout=layout, max_recv_tokens=world.max_recv_tokens
        )
        (3 * result.topk_weights if rank == 0 else 2 * result.x).sum().backward()
    owner = torch.div(world.topk_idx[rank], world.num_local_experts, rounding_mode="floor")
    torch.testing.assert_close(weights.grad, torch.where(owner == 0, 3.0, 0.0))
    rows = (owner == 1).sum(1) if isinstance(layout, ExpertMajor) else (owner == 1).any(1)
    torch.testing.assert_close(x.grad, 2.0 * rows.float().unsqueeze(1).expand_as(x))


@pytest.mark.parametrize("layout", (TokenMajor(), ExpertMajor(4)), ids=layout_id)
def test_unused_rows(ranks: Ranks, transport: str, layout: Layout) -> None:
    ranks.run(2, check_unused_rows, transport, layout)


def bad_arguments(context: RankContext, transport: str) -> list[str]:
    case = Case(seed=SEED, num_tokens=(3, 3), hidden=8, layout=PADDED)
    world = make_world(case)
    with make_buffer(context, transport, case, world) as buffer:
        x, idx = world.x[context.rank], world.topk_idx[context.rank]
        handle = buffer.dispatch(x, idx, max_recv_tokens=20).handle
        locations = world.locations[context.rank]
        calls = (
            (InvalidArgumentError, lambda: buffer.dispatch(x, idx, max_recv_tokens=0)),
            (InvalidTypeError, lambda: buffer.dispatch(x, idx, max_recv_tokens=2.0)),
            (InvalidTypeError, lambda: buffer.dispatch(x, idx, max_recv_tokens=True)),
            (InvalidArgumentError, lambda: buffer.dispatch(x, handle=handle, max_recv_tokens=20)),
            (
                InvalidArgumentError,
                lambda: buffer.dispatch(x, idx, layout=world.layout, locations=locations, max_recv_tokens=4),
            ),
            (InvalidArgumentError, lambda: buffer.combine(torch.zeros(19, 8), handle)),
            (InvalidArgumentError, lambda: buffer.combine_weights(torch.zeros(19, 3), handle)),
        )
        messages = [str(error_of(error, call)) for error, call in calls]
        # Nothing was sent: the ranks are still in step.
        assert torch.equal(buffer.dispatch(x, handle=handle).x, buffer.dispatch(x, idx, max_recv_tokens=20).x)
        return messages


def test_bad_arguments(ranks: Ranks, transport: str) -> None:
    want = [
        "max_recv_tokens: must be >= 1; got 0",
        "max_recv_tokens: must be an int; got 'float'",
        "max_recv_tokens: must be an int; got 'bool'",
        "max_recv_tokens: must be left out with handle=; got 20",
        "max_recv_tokens: goes with token-major and expert-major rows; a padded layout has fixed shapes anyway; got 4",
        "rows: must have the handle's 20 rows; got (19, 8)",
        "topk_weights: shape must be (20, 3); got (19, 3)",
    ]
    assert ranks.run(2, bad_arguments, transport) == [want, want]


def other_room(context: RankContext, transport: str, rooms: tuple[int | None, int | None]) -> str:
    with context.buffer(transport, num_experts=4, hidden=8, num_topk=2, max_tokens=3) as buffer:
        idx = torch.zeros(3, 2, dtype=torch.int64)
        call = lambda: buffer.dispatch(torch.ones(3, 8), idx, max_recv_tokens=rooms[context.rank])  # noqa: E731
        texts = {str(error_of(MismatchError, call)) for _ in range(2)}
        assert buffer.dispatch(torch.ones(3, 8), idx, max_recv_tokens=9).x.shape == (9, 8)
        return texts.pop() if len(texts) == 1 else str(texts)


@pytest.mark.parametrize("rooms", ((8, 9), (8, None), (None, 8)))
def test_other_room_on_another_rank(ranks: Ranks, transport: str, rooms: tuple[int | None, int | None]) -> None:
    text = f"dispatch: rank 1 passed max_recv_tokens={rooms[1]}, rank 0 passed max_recv_tokens={rooms[0]}"
    assert ranks.run(2, other_room, transport, rooms) == [text, text]
