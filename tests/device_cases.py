"""Cases whose inputs are made and judged where the tensors are: no copies to the host, cheap enough for thousands.

Every rank makes the inputs of all ranks from the case's seed. Ranks must have devices of one model, for equal draws.
"""

from __future__ import annotations

import dataclasses

import device_oracle
import torch
import torch.distributed as dist
from cases import FLOAT8, PADDED, ROUTINGS, Case
from device_oracle import World, as_bytes
from harness import RankContext

from ray_deepep import Buffer, DispatchHandle, DispatchResult, ExpertMajor, Padded, TokenMajor


def use_gpu(rank: int) -> torch.device:
    """Make the GPU of ``rank`` the current one."""
    torch.cuda.set_device(rank % torch.cuda.device_count())
    return torch.device("cuda", torch.cuda.current_device())


def random_rows(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Normal rows; a few elements are -0.0, whose sign shows where a sum starts."""
    rows = torch.randn(shape, generator=generator, device=generator.device)
    rows[torch.rand(shape, generator=generator, device=generator.device) < 0.05] = -0.0
    return rows.to(dtype)


def make_world(case: Case, device: torch.device) -> World:
    """Inputs of all ranks on ``device``."""
    generator = torch.Generator(device).manual_seed(case.seed)
    topk_idx = [_topk_idx(case, num_tokens, generator) for num_tokens in case.num_tokens]
    layout, locations = case.layout, None
    if layout == PADDED:
        positions = [_position_in_expert(idx, case.num_experts) for idx in topk_idx]
        layout = Padded(max((int(p.max()) + 3 for p in positions if p.numel()), default=0))
        # Backwards, so that slots are in no order that a plan might assume.
        locations = [torch.where(p >= 0, layout.capacity - 1 - p, -7).to(torch.int32) for p in positions]
    scales = None
    if case.dtype == FLOAT8:
        scales = [torch.rand(n, case.hidden // 128, generator=generator, device=device) for n in case.num_tokens]
    return World(
        num_experts=case.num_experts,
        hidden=case.hidden,
        layout=layout,
        x=[random_rows((n, case.hidden), case.dtype, generator) for n in case.num_tokens],
        topk_idx=topk_idx,
        topk_weights=[_weights(idx, generator) for idx in topk_idx],
        x_scales=scales,
        locations=locations,
    )


def worlds_of(case: Case, device: torch.device, count: int) -> list[World]:
    """Inputs of ``count`` runs, with all kinds of routing."""
    kinds = (ROUTINGS[i % len(ROUTINGS)] for i in range(count))
    return [make_world(dataclasses.replace(case, seed=case.seed + i, routing=k), device) for i, k in enumerate(kinds)]


def make_buffer(context: RankContext, case: Case) -> Buffer:
    """A buffer of transport ``cuda`` for a case without padded rows."""
    sizes = {"num_experts": case.num_experts, "hidden": case.hidden, "num_topk": case.num_topk}
    return context.buffer("cuda", max_tokens=max(case.num_tokens), **sizes)


def _topk_idx(case: Case, num_tokens: int, generator: torch.Generator) -> torch.Tensor:
    shape, device = (num_tokens, case.num_topk), generator.device
    random = torch.randint(0, case.num_experts, shape, generator=generator, device=device)
    if case.routing == "distinct":
        return torch.rand(num_tokens, case.num_experts, generator=generator, device=device).topk(case.num_topk).indices
    if case.routing == "sparse":
        return torch.where(torch.rand(shape, generator=generator, device=device) < 0.4, -1, random)
    if case.routing == "dropped":
        return torch.full_like(random, -1)
    if case.routing == "one_expert":
        return torch.full_like(random, case.num_experts - 1)
    if case.routing == "one_rank":
        return random % (case.num_experts // len(case.num_tokens))
    assert case.routing == "random", case.routing
    return random


def _weights(topk_idx: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Beside -1 anything may stand, NaN included."""
    weights = torch.rand(topk_idx.shape, generator=generator, device=topk_idx.device)
    return torch.where(topk_idx >= 0, weights, torch.nan)


def _position_in_expert(topk_idx: torch.Tensor, num_experts: int) -> torch.Tensor:
    """``[T, K]``: how many earlier routes of this rank have the same expert; -1 where there is no route."""
    position = torch.full_like(topk_idx, -1)
    expert, order = topk_idx[topk_idx >= 0].sort(stable=True)
    counts = torch.bincount(expert, minlength=num_experts)
    found = torch.empty_like(expert)
    found[order] = torch.arange(len(expert), device=expert.device) - (counts.cumsum(0) - counts)[expert]
    position[topk_idx >= 0] = found
    return position


def rows_needed(world: World) -> int:
    """Rows that the rank with most receives."""
    return max(arrival.num_rows for arrival in world.arrivals)


def make_rows(world: World, dtype: torch.dtype, seed: int, num_rows: int | None = None) -> list[torch.Tensor]:
    """Expert outputs of all ranks; ``num_rows`` each where shapes are fixed."""
    generator = torch.Generator(world.x[0].device).manual_seed(seed)
    counts = [here.num_rows if num_rows is None else num_rows for here in world.arrivals]
    return [random_rows((count, world.hidden), dtype, generator) for count in counts]


def gather_rows(rows: torch.Tensor) -> list[torch.Tensor]:
    """What all ranks hold, through the host; collective, equal shapes."""
    own = rows.cpu().contiguous().view(torch.uint8)
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, own)
    return [each.view(rows.dtype).to(rows.device) for each in everyone]


def dispatch(buffer: Buffer, world: World, rank: int, **more: object) -> DispatchResult:
    """Dispatch this rank's part of ``world``."""
    return buffer.dispatch(
        world.x[rank],
        world.topk_idx[rank],
        world.topk_weights[rank],
        x_scales=None if world.x_scales is None else world.x_scales[rank],
        layout=world.layout,
        locations=None if world.locations is None else world.locations[rank],
        **more,
    )


def dispatch_along(buffer: Buffer, world: World, rank: int, handle: DispatchHandle, **more: object) -> DispatchResult:
    """Dispatch this rank's rows along an earlier plan."""
    scales = None if world.x_scales is None else world.x_scales[rank]
    return buffer.dispatch(world.x[rank], x_scales=scales, handle=handle, **more)


def assert_same(name: str, got: torch.Tensor | None, want: torch.Tensor | None) -> None:
    """Equal shape, dtype and bits, compared where the tensors are."""
    if want is None or got is None:
        assert got is want, f"{name}: got {got}, want {want}"
        return
    assert got.dtype == want.dtype and got.shape == want.shape, (
        f"{name}: got {got.dtype} {tuple(got.shape)}, want {want.dtype} {tuple(want.shape)}"
    )
    if torch.equal(_bits(got), _bits(want)):
        return
    wrong = [tuple(i) for i in (got.float() != want.float()).nonzero()[:4].tolist()]
    values = [(got[i].item(), want[i].item()) for i in wrong]
    count = int((_bits(got) != _bits(want)).sum())
    raise AssertionError(f"{name}: {count} differ, first at {wrong or 'signs of zero'}, (got, want) {values}")


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])


def assert_dispatched(
    result: DispatchResult,
    world: World,
    rank: int,
    *,
    scaled: bool = False,
    cached: bool = False,
    max_recv_tokens: int | None = None,
) -> None:
    """Compare a result, and its handle's counts, with the oracle."""
    want = device_oracle.dispatch(world, rank, scale_by_weights=scaled, num_rows=max_recv_tokens)
    assert_same("dispatch x", as_bytes(result.x), as_bytes(want.x))
    assert_same("dispatch x_scales", result.x_scales, want.x_scales)
    assert_same("dispatch topk_idx", result.topk_idx, None if cached else want.topk_idx)
    assert_same("dispatch topk_weights", result.topk_weights, want.topk_weights)
    _assert_counts(result.handle, world, rank, max_recv_tokens)


def _assert_counts(handle: DispatchHandle, world: World, rank: int, max_recv_tokens: int | None) -> None:
    here, counts = world.arrivals[rank], handle.device_counts
    per_expert, num_tokens = here.num_per_expert.tolist(), len(here.tokens)
    offsets = None if here.expert_offsets is None else here.expert_offsets.tolist()
    assert (counts.num_recv_tokens.item(), counts.num_rows.item()) == (num_tokens, here.num_rows)
    assert counts.num_recv_tokens_per_expert.tolist() == per_expert
    if offsets is not None:
        assert counts.expert_offsets.tolist() == offsets
    if max_recv_tokens is None:
        assert (handle.num_recv_tokens, handle.num_rows) == (num_tokens, here.num_rows)
        assert list(handle.num_recv_tokens_per_expert) == per_expert
        if isinstance(world.layout, ExpertMajor):
            assert list(handle.expert_offsets) == offsets
        return
    fixed = max_recv_tokens if isinstance(world.layout, TokenMajor) else None
    assert (handle.num_recv_tokens, handle.num_rows) == (fixed, max_recv_tokens)
    assert handle.max_recv_tokens == max_recv_tokens
    assert handle.num_recv_tokens_per_expert is None and handle.expert_offsets is None
