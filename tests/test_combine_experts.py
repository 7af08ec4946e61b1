"""``Buffer.combine_experts``: a block per local expert gives the bits that one tensor of all rows gives."""

from __future__ import annotations

import pytest
import torch
from bad_calls import WEIGHTS, BadCall, H, check_bad_call, expert_major, token_major
from cases import (
    DTYPES,
    PADDED,
    ROUTINGS,
    Case,
    CombineMode,
    all_modes,
    assert_same,
    dispatch,
    dtype_id,
    layout_id,
    make_buffer,
    make_world,
    random_rows,
    some_modes,
)
from harness import RankContext, Ranks

from ray_deepep import Buffer, DispatchHandle, ExpertMajor, InvalidArgumentError, InvalidTypeError
from ray_deepep.handle import CombineResult

LAYOUTS = (ExpertMajor(1), ExpertMajor(8), PADDED)


def blocks_of(handle: DispatchHandle, rows: torch.Tensor) -> list[torch.Tensor]:
    """Each in memory of its own, as experts return them."""
    return [block.reshape(-1, rows.shape[1]).clone() for block in handle.split(rows)]


def check_same_bits(context: RankContext, transport: str, case: Case, modes: list[CombineMode]) -> None:
    """Also where ranks differ in the method that they call."""
    world, rank = make_world(case), context.rank
    generator = torch.Generator().manual_seed(case.seed + rank)
    with make_buffer(context, transport, case, world) as buffer:
        handle = dispatch(buffer, world, rank).handle
        rows = random_rows(handle.num_rows, case.hidden, case.dtype, generator)
        bias = random_rows(handle.num_tokens, case.hidden, case.dtype, generator)
        weights = torch.rand(handle.num_rows, generator=generator)
        assert_same("split and joined", handle.join(blocks_of(handle, rows)), rows)
        assert tuple(len(block) for block in blocks_of(handle, rows)) == handle.expert_sizes
        for mode in modes:
            options = options_of(mode, weights, bias)
            want = buffer.combine(rows, handle, **options)
            assert_equal(mode, buffer.combine_experts(blocks_of(handle, rows), handle, **options), want)
            if rank % 2:
                mixed = buffer.combine(rows, handle, **options)
            else:
                mixed = buffer.combine_experts(tuple(blocks_of(handle, rows)), handle, **options)
            assert_equal(mode, mixed, want)


def options_of(mode: CombineMode, weights: torch.Tensor, bias: torch.Tensor) -> dict[str, object]:
    """Arguments of a combine."""
    return {
        "topk_weights": weights if mode.carry else None,
        "weighted": mode.weighted,
        "reduce": mode.reduce,
        "keep_routes": mode.keep_routes,
        "bias": bias if mode.bias else None,
    }


def assert_equal(mode: CombineMode, got: CombineResult, want: CombineResult) -> None:
    """All parts, bit by bit."""
    for name in ("x", "topk_weights", "routes"):
        assert_same(f"{mode} {name}", getattr(got, name), getattr(want, name))


@pytest.mark.parametrize("num_ranks", (1, 2, 4))
@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_id)
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=dtype_id)
def test_world_sizes(ranks: Ranks, transport: str, dtype: torch.dtype, layout: object, num_ranks: int) -> None:
    num_tokens = (9, 0, 7, 2)[:num_ranks]
    case = Case(seed=31, num_tokens=num_tokens, num_experts=num_ranks * 3, layout=layout, dtype=dtype)
    modes = all_modes(token_major=False) if num_ranks == 2 else some_modes(token_major=False)
    ranks.run(num_ranks, check_same_bits, transport, case, modes)


@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_id)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_routings(ranks: Ranks, transport: str, routing: str, layout: object) -> None:
    case = Case(seed=32, num_tokens=(11, 5), layout=layout, routing=routing)
    ranks.run(2, check_same_bits, transport, case, some_modes(token_major=False))


def check_bytes(context: RankContext, transport: str) -> None:
    """The same bytes are counted either way."""
    case = Case(seed=33, num_tokens=(6, 4), layout=ExpertMajor(4))
    world = make_world(case)
    with make_buffer(context, transport, case, world) as buffer:
        handle = dispatch(buffer, world, context.rank).handle
        rows = torch.ones(handle.num_rows, case.hidden)
        buffer.combine(rows, handle)
        want = buffer.stats(reset=True).combine_bytes
        buffer.combine_experts(blocks_of(handle, rows), handle)
        assert buffer.stats().combine_bytes == want > 0


def test_bytes(ranks: Ranks, transport: str) -> None:
    ranks.run(2, check_bytes, transport)


def bad_blocks(message: str, argument: str, change: object, error: type[Exception] = InvalidArgumentError) -> BadCall:
    """A call with blocks of the right shapes changed by ``change``; two experts of eight rows each."""

    def call(buffer: Buffer, handle: DispatchHandle) -> object:
        return buffer.combine_experts(change([torch.zeros(8, H), torch.zeros(8, H)]), handle)

    return BadCall(call=call, argument=argument, message=message, error=error, handle=expert_major)


def fixed_rows(buffer: Buffer) -> DispatchHandle:
    idx = torch.tensor([[0, 1], [2, 3], [-1, 3], [1, 0]])
    return buffer.dispatch(torch.ones(4, H), idx, WEIGHTS, layout=ExpertMajor(8), max_recv_tokens=64).handle


HANDLE_RULE = "must be of an expert-major or padded dispatch without max_recv_tokens; got "
BAD_CALLS = {
    "handle type": BadCall(
        call=lambda buffer, handle: buffer.combine_experts([], None),
        argument="handle",
        message="must be a DispatchHandle; got 'NoneType'",
        error=InvalidTypeError,
    ),
    "handle token-major": BadCall(
        call=lambda buffer, handle: buffer.combine_experts([], handle),
        argument="handle",
        message=HANDLE_RULE + "'token-major'",
        handle=token_major,
    ),
    "handle of fixed rows": BadCall(
        call=lambda buffer, handle: buffer.combine_experts([], handle),
        argument="handle",
        message=HANDLE_RULE + "'max_recv_tokens=64'",
        handle=fixed_rows,
    ),
    "one tensor": bad_blocks(
        "must be a tuple or list of tensors; got 'Tensor'", "expert_rows", torch.cat, InvalidTypeError
    ),
    "too few": bad_blocks(
        "must have one tensor for each of the 2 local experts; got 1", "expert_rows", lambda b: b[:1]
    ),
    "not a tensor": bad_blocks(
        "must be a torch.Tensor; got 'NoneType'", "expert_rows[1]", lambda b: [b[0], None], InvalidTypeError
    ),
    "rows": bad_blocks(
        "must have the 8 rows of its expert; got (7, 128)", "expert_rows[1]", lambda b: [b[0], b[1][:7]]
    ),
    "hidden": bad_blocks(
        "shape must be [rows, hidden=128]; got (8, 64)", "expert_rows[0]", lambda b: [b[0][:, :64], b[1]]
    ),
    "not contiguous": bad_blocks(
        "must be contiguous (call .contiguous()); got (256, 1)",
        "expert_rows[0]",
        lambda b: [b[0].repeat(1, 2)[:, :H], b[1]],
    ),
    "dtypes differ": bad_blocks(
        "must be like expert_rows[0], float32 on cpu; got 'bfloat16 on cpu'",
        "expert_rows[1]",
        lambda b: [b[0], b[1].bfloat16()],
        InvalidTypeError,
    ),
    "reduce": BadCall(
        call=lambda buffer, handle: buffer.combine_experts([torch.zeros(8, H)] * 2, handle, reduce="sum"),
        argument="reduce",
        message="must be one of exact, fast, expert_order; got 'sum'",
        handle=expert_major,
    ),
}


def check_call(context: RankContext, transport: str, name: str) -> None:
    check_bad_call(context, transport, BAD_CALLS[name])


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_call(ranks: Ranks, transport: str, name: str) -> None:
    ranks.run(2, check_call, transport, name)
