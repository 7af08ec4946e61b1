"""Cases of dispatch and combine: inputs of all ranks from a seed, and the comparison with the oracle.

Every rank makes the inputs of all ranks, so nothing but the code under test goes between processes.
"""

from __future__ import annotations

import dataclasses
import itertools

import oracle
import torch
from harness import RankContext, domain_size
from on_device import OnDevice

from ray_deepep import (
    Buffer,
    Communicator,
    DispatchHandle,
    DispatchResult,
    ExpertMajor,
    Float8Cast,
    Padded,
    TokenMajor,
)
from ray_deepep.handle import Layout

FLOAT8 = torch.float8_e4m3fn
DTYPES = (torch.float32, torch.bfloat16, torch.float16, FLOAT8)
PADDED = "padded"
"""Layout of a case whose capacity follows from its routing."""
LAYOUTS = (TokenMajor(), ExpertMajor(1), ExpertMajor(8), ExpertMajor(16), PADDED)
ROUTINGS = ("random", "distinct", "sparse", "dropped", "one_expert", "one_rank")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A dispatch and the combines after it."""

    seed: int
    num_tokens: tuple[int, ...]
    """Per rank."""
    num_experts: int = 8
    hidden: int = 24
    num_topk: int = 3
    layout: Layout | str = dataclasses.field(default_factory=TokenMajor)
    dtype: torch.dtype = torch.float32
    routing: str = "random"
    spare_rows: int | None = None
    """With ``max_recv_tokens``: this many rows more than the fullest rank receives."""
    cast: Float8Cast | None = None
    """Rows leave as float8."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CombineMode:
    """Arguments of one combine."""

    reduce: str = "exact"
    weighted: bool = False
    keep_routes: bool = False
    bias: bool = False
    carry: bool = False
    """Row weights travel home beside the rows."""


def layout_id(layout: Layout | str) -> str:
    """Name of a layout in test ids."""
    return layout if isinstance(layout, str) else str(layout).replace("alignment=", "")


def dtype_id(dtype: torch.dtype) -> str:
    """Name of a dtype in test ids."""
    return str(dtype).removeprefix("torch.")


def all_modes(token_major: bool) -> list[CombineMode]:
    """Every combination of arguments that is allowed."""
    if token_major:
        return [CombineMode(bias=bias, carry=carry) for bias, carry in itertools.product((False, True), repeat=2)]
    return [
        CombineMode(reduce=reduce, weighted=weighted, keep_routes=keep, bias=bias, carry=carry)
        for reduce in ("exact", "fast", "expert_order")
        for weighted, keep, bias, carry in itertools.product((False, True), repeat=4)
        if not (keep and reduce == "fast")
    ]


def some_modes(token_major: bool) -> list[CombineMode]:
    """Every argument in both states, with few combines."""
    if token_major:
        return [CombineMode(), CombineMode(bias=True, carry=True)]
    return [
        CombineMode(),
        CombineMode(weighted=True, keep_routes=True, bias=True, carry=True),
        CombineMode(reduce="fast", carry=True),
        CombineMode(reduce="fast", weighted=True, bias=True),
        CombineMode(reduce="expert_order", keep_routes=True, bias=True),
        CombineMode(reduce="expert_order", weighted=True),
    ]


def make_world(case: Case, transport: str = "") -> oracle.World:
    """Inputs of all ranks; a transport of several nodes rounds once for each."""
    generator = torch.Generator().manual_seed(case.seed)
    topk_idx = [_topk_idx(case, num_tokens, generator) for num_tokens in case.num_tokens]
    locations, layout = None, case.layout
    if layout == PADDED:
        capacities = [_capacity(idx, case.num_experts) for idx in topk_idx]
        layout = Padded(max(capacities))
        locations = [_locations(idx, case.num_experts, layout.capacity, generator) for idx in topk_idx]
    scales = None
    if case.dtype == FLOAT8:
        scales = [torch.rand(n, case.hidden // 128, generator=generator) for n in case.num_tokens]
    world = oracle.World(
        num_experts=case.num_experts,
        hidden=case.hidden,
        layout=layout,
        x=[random_rows(n, case.hidden, case.dtype, generator) for n in case.num_tokens],
        topk_idx=topk_idx,
        topk_weights=[_weights(idx, generator) for idx in topk_idx],
        x_scales=scales,
        locations=locations,
        cast=case.cast,
        domain_size=domain_size(transport) % len(case.num_tokens),
    )
    if case.spare_rows is not None:
        room = max(1, max(here.num_rows for here in world.arrivals) + case.spare_rows)
        world = dataclasses.replace(world, max_recv_tokens=room)
    return with_rows(world, world.x)


def with_rows(world: oracle.World, x: list[torch.Tensor]) -> oracle.World:
    """The same routing with other rows."""
    if world.cast is None:
        return world.with_rows(x=x)
    data, scales = zip(*(oracle.quantize(rows, world.cast) for rows in x))
    return world.with_rows(x=list(data), x_scales=list(scales), x_given=x)


def random_rows(num_rows: int, hidden: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Normal rows; a few elements are -0.0, whose sign shows where a sum starts."""
    rows = torch.randn(num_rows, hidden, generator=generator)
    rows[torch.rand(rows.shape, generator=generator) < 0.05] = -0.0
    return rows.to(dtype)


def _topk_idx(case: Case, num_tokens: int, generator: torch.Generator) -> torch.Tensor:
    shape = (num_tokens, case.num_topk)
    random = torch.randint(0, case.num_experts, shape, generator=generator)
    if case.routing == "distinct":
        scores = torch.rand(num_tokens, case.num_experts, generator=generator)
        return scores.topk(case.num_topk, dim=1).indices
    if case.routing == "sparse":
        return torch.where(torch.rand(shape, generator=generator) < 0.4, -1, random)
    if case.routing == "dropped":
        return torch.full(shape, -1)
    if case.routing == "one_expert":
        return torch.full(shape, case.num_experts - 1)
    if case.routing == "one_rank":
        return random % (case.num_experts // len(case.num_tokens))
    assert case.routing == "random", case.routing
    return random


def _weights(topk_idx: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Beside -1 anything may stand, NaN included."""
    return torch.where(topk_idx >= 0, torch.rand(topk_idx.shape, generator=generator), torch.nan)


def _capacity(topk_idx: torch.Tensor, num_experts: int) -> int:
    """Enough for every expert, with holes."""
    counts = torch.bincount(topk_idx[topk_idx >= 0], minlength=num_experts)
    return int(counts.max()) + 2 if counts.any() else 0


def _locations(topk_idx: torch.Tensor, num_experts: int, capacity: int, generator: torch.Generator) -> torch.Tensor:
    """Distinct slots for the routes of one rank, in no particular order."""
    locations = torch.full(topk_idx.shape, -7, dtype=torch.int32)
    for expert in range(num_experts):
        mask = topk_idx == expert
        locations[mask] = torch.randperm(capacity, generator=generator)[: int(mask.sum())].to(torch.int32)
    return locations


def make_buffer(context: RankContext, transport: str, case: Case, world: oracle.World) -> Buffer | OnDevice:
    """A buffer just large enough for the case; collective."""
    buffer = context.buffer(
        transport,
        num_experts=case.num_experts,
        hidden=case.hidden,
        num_topk=case.num_topk,
        max_tokens=max(case.num_tokens),
        max_capacity=world.layout.capacity if isinstance(world.layout, Padded) else 0,
    )
    return OnDevice(buffer) if transport.partition("/")[0] in ("cuda", "nvshmem") else buffer


def dispatch(buffer: Buffer, world: oracle.World, rank: int, **more: object) -> DispatchResult:
    """Dispatch this rank's part of ``world``."""
    return buffer.dispatch(
        topk_idx=world.topk_idx[rank],
        topk_weights=world.topk_weights[rank],
        layout=world.layout,
        locations=None if world.locations is None else world.locations[rank],
        max_recv_tokens=world.max_recv_tokens,
        **rows_to_send(world, rank),
        **more,
    )


def rows_to_send(world: oracle.World, rank: int) -> dict[str, object]:
    """The arguments of a dispatch, new or cached, that say what goes."""
    if world.cast is not None:
        return {"x": world.x_given[rank], "cast": world.cast}
    return {"x": world.x[rank], "x_scales": None if world.x_scales is None else world.x_scales[rank]}


def assert_same(name: str, got: torch.Tensor | None, want: torch.Tensor | None) -> None:
    """Equal shape, dtype and bits."""
    if want is None or got is None:
        assert got is want, f"{name}: got {got}, want {want}"
        return
    got = got.cpu()
    assert got.dtype == want.dtype and got.shape == want.shape, (
        f"{name}: got {got.dtype} {tuple(got.shape)}, want {want.dtype} {tuple(want.shape)}"
    )
    assert got.is_contiguous(), f"{name}: not contiguous"
    if not torch.equal(_bits(got), _bits(want)):
        wrong = [tuple(i) for i in (got.float() != want.float()).nonzero()[:4].tolist()]
        values = [(got[i].item(), want[i].item()) for i in wrong]
        raise AssertionError(f"{name}: differs at {wrong or 'signs of zero'}, (got, want) {values}")


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    # The clone has normal strides where a size is 1.
    return tensor.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def assert_dispatched(
    result: DispatchResult, world: oracle.World, rank: int, *, scaled: bool = False, cached: bool = False
) -> None:
    """Compare a result, and its handle, with the oracle."""
    want, here, handle = oracle.dispatch(world, rank, scale_by_weights=scaled), world.arrivals[rank], result.handle
    assert_same("dispatch x", result.x, want.x)
    assert_same("dispatch x_scales", result.x_scales, want.x_scales)
    assert_same("dispatch topk_idx", result.topk_idx, None if cached else want.topk_idx)
    assert_same("dispatch topk_weights", result.topk_weights, want.topk_weights)
    assert_same("handle.recv_topk_weights", handle.recv_topk_weights, want.topk_weights)
    assert handle.layout == world.layout
    assert (handle.num_tokens, handle.num_topk) == tuple(world.topk_idx[rank].shape)
    assert_counts(handle, here, world)


def assert_counts(handle: DispatchHandle, here: oracle.Arrival, world: oracle.World) -> None:
    """What the handle says on the host, and on the device."""
    room, token_major = world.max_recv_tokens, isinstance(world.layout, TokenMajor)
    assert handle.max_recv_tokens == room
    if room is None:
        assert (handle.num_recv_tokens, handle.num_rows) == (len(here.tokens), here.num_rows)
        assert handle.num_recv_tokens_per_expert == here.num_per_expert
        assert handle.expert_offsets == here.expert_offsets
    else:
        assert (handle.num_recv_tokens, handle.num_rows) == (room if token_major else None, room)
        assert handle.num_recv_tokens_per_expert is None and handle.expert_offsets is None
    counts = handle.device_counts
    assert (int(counts.num_recv_tokens), int(counts.num_rows)) == (len(here.tokens), here.num_rows)
    assert tuple(counts.num_recv_tokens_per_expert.tolist()) == here.num_per_expert
    assert len(counts.expert_offsets) == len(here.num_per_expert) + 1
    if isinstance(world.layout, ExpertMajor):
        assert tuple(counts.expert_offsets.tolist()) == here.expert_offsets
    assert {tensor.dtype for tensor in vars(counts).values()} == {torch.int32}
    handle.check()


def check_combine(
    buffer: Buffer, handle: DispatchHandle, world: oracle.World, rank: int, mode: CombineMode, *, seed: int
) -> None:
    """Combine random rows and compare with the oracle."""
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.bfloat16 if world.x[0].dtype == FLOAT8 else world.x[0].dtype
    rows = [random_rows(world.rows_of(r), world.hidden, dtype, generator) for r in range(world.num_ranks)]
    biases = [random_rows(len(x), world.hidden, dtype, generator) for x in world.x]
    width = (world.topk_idx[0].shape[1],) if isinstance(world.layout, TokenMajor) else ()
    carried = [torch.rand(world.rows_of(r), *width, generator=generator) for r in range(world.num_ranks)]
    result = buffer.combine(
        rows[rank],
        handle,
        topk_weights=carried[rank] if mode.carry else None,
        weighted=mode.weighted,
        reduce=mode.reduce,
        keep_routes=mode.keep_routes,
        bias=biases[rank] if mode.bias else None,
    )
    bias = biases[rank] if mode.bias else None
    want = oracle.combine(world, rank, rows, weighted=mode.weighted, reduce=mode.reduce, bias=bias)
    assert_same(f"{mode} x", result.x, want)
    assert_same(f"{mode} routes", result.routes, oracle.routes_home(world, rank, rows) if mode.keep_routes else None)
    home = oracle.weights_home(world, rank, carried) if mode.carry else None
    assert_same(f"{mode} topk_weights", result.topk_weights, home)
    if mode.carry:
        assert_same("combine_weights", buffer.combine_weights(carried[rank], handle), home)


def check_case(context: RankContext, transport: str, case: Case, modes: list[CombineMode] | None = None) -> None:
    """Dispatch, cached dispatch and combines of a case on this rank; run it on every rank."""
    world, rank = make_world(case, transport), context.rank
    token_major = isinstance(world.layout, TokenMajor)
    try:
        with make_buffer(context, transport, case, world) as buffer:
            result = dispatch(buffer, world, rank)
            assert_dispatched(result, world, rank)
            for mode in some_modes(token_major) if modes is None else modes:
                check_combine(buffer, result.handle, world, rank, mode, seed=case.seed + 1)
            check_cached_dispatch(buffer, result.handle, world, rank, seed=case.seed + 2)
            if not token_major and world.x[0].dtype != FLOAT8:
                scaled = dispatch(buffer, world, rank, scale_by_weights=True)
                assert_dispatched(scaled, world, rank, scaled=True)
    except Exception as error:
        raise AssertionError(f"rank {rank}, {case}: {type(error).__name__}: {error}") from error


def check_cached_dispatch(buffer: Buffer, handle: DispatchHandle, world: oracle.World, rank: int, *, seed: int) -> None:
    """Other rows along the same plan."""
    generator = torch.Generator().manual_seed(seed)
    given = world.x if world.x_given is None else world.x_given
    others = with_rows(world, [random_rows(len(x), world.hidden, x.dtype, generator) for x in given])
    assert_dispatched(buffer.dispatch(handle=handle, **rows_to_send(others, rank)), others, rank, cached=True)


def transport_of(comm: Communicator) -> str:
    """Name of its transport, and of the size of its domains if it has several."""
    return f"{comm.transport}/{comm.domains.domain_size}" if comm.domains.num_nodes > 1 else comm.transport


def check_still_works(buffer: Buffer, rank: int) -> None:
    """Dispatch and combine of all ranks on a buffer that saw errors."""
    geometry = buffer.geometry
    case = Case(
        seed=1,
        num_tokens=(5, 3, 4, 0)[: buffer.comm.num_ranks],
        num_experts=geometry.num_experts,
        hidden=geometry.hidden,
        num_topk=2,
        layout=ExpertMajor(4),
    )
    world = make_world(case, transport_of(buffer.comm))
    result = dispatch(buffer, world, rank)
    assert_dispatched(result, world, rank)
    for mode in some_modes(token_major=False):
        check_combine(buffer, result.handle, world, rank, mode, seed=2)
