"""Cases of the low-latency calls: inputs of all ranks from a seed, what must come out, and the comparison.

What must come out is worked out route by route, in plain loops that share no code with the package. Every rank makes
the inputs of all ranks, so nothing but the code under test goes between processes.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Callable

import oracle
import torch
from device_cases import use_gpu
from harness import RankContext
from on_device import OnDevice

from ray_deepep import (
    Buffer,
    ExpertBlocks,
    ExpertMajor,
    Float8Cast,
    LowLatencyCombineResult,
    LowLatencyDispatchResult,
)
from ray_deepep.low_latency import LowLatencyLayout

FLOAT8 = torch.float8_e4m3fn
ROW_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = (*ROW_DTYPES, FLOAT8)
LAYOUTS = (ExpertBlocks(), ExpertMajor(1), ExpertMajor(8))
REDUCES = ("fast", "exact")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A dispatch and its combine."""

    seed: int
    num_tokens: tuple[int, ...]
    """Per rank."""
    max_tokens: int = 12
    num_experts: int = 8
    hidden: int = 128
    num_topk: int = 3
    layout: LowLatencyLayout = dataclasses.field(default_factory=ExpertBlocks)
    dtype: torch.dtype = torch.float32
    cast: Float8Cast | None = None
    dropped: float = 0.2
    """Share of -1 among the routes."""
    weighted: bool = True
    combine_dtype: torch.dtype = torch.bfloat16
    reduce: str = "fast"
    own_weights: bool = False
    """Combine gets weights of its own (``exact`` only)."""
    zero_copy: bool = False
    """The experts' answers lie in the heap, and are read there (``exact`` only)."""
    absent: frozenset[int] = frozenset()
    """Ranks that take no part."""

    @property
    def num_ranks(self) -> int:
        return len(self.num_tokens)

    @property
    def num_local(self) -> int:
        return self.num_experts // self.num_ranks

    @property
    def symm_bytes(self) -> int:
        """Room for the experts' answers, twice."""
        rows = self.num_local * self.num_ranks * self.max_tokens + self.num_local * 32
        return 2 * (rows * self.hidden * 4 + 4096) if self.zero_copy else 0


class World:
    """Inputs of all ranks; lists are by rank."""

    def __init__(self, case: Case) -> None:
        generator = torch.Generator().manual_seed(case.seed)
        self.case = case

        def rows(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        self.x = [rows(n, case.hidden, dtype=case.dtype) for n in case.num_tokens]
        self.x_scales = [torch.rand(n, case.hidden // 128, generator=generator) for n in case.num_tokens]
        self.topk_idx = [self._routing(n, generator) for n in case.num_tokens]
        self.weights = [torch.rand(idx.shape, generator=generator) for idx in self.topk_idx]
        self.combine_weights = [torch.rand(idx.shape, generator=generator) for idx in self.topk_idx]
        shape = (case.num_experts // case.num_ranks * case.num_ranks * case.max_tokens, case.hidden)
        self.outputs = [rows(*shape, dtype=case.combine_dtype) for _ in case.num_tokens]
        """What the experts of each rank answer, by (local expert, position in its group)."""

    def _routing(self, num_tokens: int, generator: torch.Generator) -> torch.Tensor:
        case = self.case
        order = torch.rand(num_tokens, case.num_experts, generator=generator).argsort(dim=1)
        idx = order[:, : case.num_topk].clone()
        idx[torch.rand(idx.shape, generator=generator) < case.dropped] = -1
        return idx

    @functools.cached_property
    def groups(self) -> list[list[list[tuple[int, int, int]]]]:
        """Routes (source, token, k) of each expert of each rank, in order."""
        case = self.case
        groups: list[list[list[tuple[int, int, int]]]] = [[[] for _ in range(case.num_local)] for _ in case.num_tokens]
        for source in range(case.num_ranks):
            if source in case.absent:
                continue
            for token, experts in enumerate(self.topk_idx[source].tolist()):
                for k, expert in enumerate(experts):
                    if expert >= 0:
                        groups[expert // case.num_local][expert % case.num_local].append((source, token, k))
        return groups

    def first_rows(self, rank: int) -> list[int]:
        """First row of each local expert, and the end."""
        case = self.case
        firsts, end = [], 0
        for group in self.groups[rank]:
            firsts.append(end)
            end += case.num_ranks * case.max_tokens if isinstance(case.layout, ExpertBlocks) else len(group)
            while isinstance(case.layout, ExpertMajor) and end % case.layout.alignment:
                end += 1
        return [*firsts, end]

    def output(self, rank: int, expert: int, position: int) -> torch.Tensor:
        """A row that a local expert answers."""
        return self.outputs[rank][expert * self.case.num_ranks * self.case.max_tokens + position]

    def combined(self, rank: int) -> torch.Tensor:
        """Rows that source ``rank`` must get back."""
        case = self.case
        where = {
            route: (owner, expert, position)
            for owner, experts in enumerate(self.groups)
            for expert, group in enumerate(experts)
            for position, route in enumerate(group)
        }
        out = torch.zeros(case.num_tokens[rank], case.hidden, dtype=case.combine_dtype)
        for token in range(case.num_tokens[rank]):
            terms = []
            for k in range(case.num_topk):
                if (rank, token, k) not in where or where[rank, token, k][0] in case.absent:
                    continue
                owner, expert, position = where[rank, token, k]
                weights = self.combine_weights if case.own_weights else self.weights
                weight = weights[rank][token, k] if case.weighted or case.own_weights else 1.0
                terms.append((owner, self.output(owner, expert, position).float() * weight))
            total = torch.zeros(case.hidden)
            if case.reduce == "exact":
                for _, term in terms:
                    total = total + term
            else:
                for owner in sorted({owner for owner, _ in terms}):
                    partial = torch.zeros(case.hidden)
                    for _, term in (t for t in terms if t[0] == owner):
                        partial = partial + term
                    total = total + partial.to(case.combine_dtype).float()
            out[token] = total.to(case.combine_dtype)
        return out


def make_buffer(context: RankContext, transport: str, case: Case) -> Buffer | OnDevice:
    """Collective."""
    return wrapped(context, transport)(
        transport,
        num_experts=case.num_experts,
        hidden=case.hidden,
        num_topk=case.num_topk,
        max_tokens=0,
        low_latency_max_tokens=case.max_tokens,
        symm_bytes=case.symm_bytes,
    )


def wrapped(context: RankContext, transport: str) -> Callable[..., Buffer | OnDevice]:
    """``context.buffer``; of transport ``cuda`` such that it takes and gives tensors on the CPU."""
    if transport != "cuda":
        return context.buffer
    use_gpu(context.rank)
    return lambda *args, **geometry: OnDevice(context.buffer(*args, **geometry))


def dispatch(buffer: Buffer, world: World, rank: int, **options: object) -> LowLatencyDispatchResult:
    """This rank's part of the case's dispatch."""
    case = world.case
    return buffer.low_latency_dispatch(
        world.x[rank],
        world.topk_idx[rank],
        topk_weights=world.weights[rank] if case.weighted else None,
        x_scales=world.x_scales[rank] if case.dtype == FLOAT8 else None,
        layout=case.layout,
        cast=case.cast,
        **options,
    )


def combine(
    buffer: Buffer, world: World, rank: int, result: LowLatencyDispatchResult, **options: object
) -> LowLatencyCombineResult:
    """This rank's part of the case's combine. Rows that no token reached are NaN: they must not matter."""
    case = world.case
    rows = torch.full(result.x.shape, float("nan"), dtype=case.combine_dtype)
    flat = rows.view(-1, case.hidden)
    for expert, group in enumerate(world.groups[rank]):
        first = world.first_rows(rank)[expert]
        for position in range(len(group)):
            flat[first + position] = world.output(rank, expert, position)
    weights = world.combine_weights[rank] if case.own_weights else None
    if case.zero_copy:
        rows = in_heap(buffer, rows)
        options["zero_copy"] = True
    return buffer.low_latency_combine(rows, result.handle, weights, reduce=case.reduce, **options)


def in_heap(buffer: Buffer, rows: torch.Tensor) -> torch.Tensor:
    """The same rows where peers read them."""
    held = buffer.symm_empty(rows.numel() // rows.shape[-1], rows.dtype).view(rows.shape)
    held.copy_(rows)
    return held


def check_dispatch(world: World, rank: int, result: LowLatencyDispatchResult) -> None:
    """Rows, counts, ranges and offsets, bit by bit."""
    case, groups, firsts = world.case, world.groups[rank], world.first_rows(rank)
    assert result.counts.tolist() == [len(group) for group in groups]
    assert result.counts.dtype == torch.int32
    counts = [[sum(r[0] == s for r in group) for s in range(case.num_ranks)] for group in groups]
    assert result.ranges.count.tolist() == counts
    assert result.ranges.begin.tolist() == [[sum(row[:s]) for s in range(case.num_ranks)] for row in counts]
    assert result.expert_offsets.tolist() == firsts
    assert result.absent.tolist() == [s in case.absent for s in range(case.num_ranks)]
    if isinstance(case.layout, ExpertBlocks):
        assert result.x.shape == (case.num_local, case.num_ranks * case.max_tokens, case.hidden)
    else:
        routes = case.num_ranks * case.max_tokens * min(case.num_topk, case.num_local)
        assert result.x.shape == (routes + case.num_local * (case.layout.alignment - 1), case.hidden)
    rows = [sent_rows(world, source) for source in range(case.num_ranks)]
    flat = result.x.view(-1, case.hidden)
    scales = None if result.x_scales is None else result.x_scales.view(-1, case.hidden // 128)
    assert (scales is not None) == (flat.dtype == FLOAT8)
    for expert, group in enumerate(groups):
        first = firsts[expert]
        for position, (source, token, _) in enumerate(group):
            x, x_scales = rows[source]
            assert_same(flat[first + position], x[token], f"expert {expert}, row {position}")
            if scales is not None:
                assert_same(scales[first + position], x_scales[token], f"scales, expert {expert}, row {position}")
        if isinstance(case.layout, ExpertMajor):
            padding = slice(first + len(group), firsts[expert + 1])
            assert not flat[padding].view(torch.uint8).any(), "padding of a group is zero"
            assert scales is None or not scales[padding].any()


def sent_rows(world: World, source: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows as they leave, and their scales."""
    case = world.case
    return (
        (world.x[source], world.x_scales[source]) if case.cast is None else oracle.quantize(world.x[source], case.cast)
    )


def assert_same(got: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Equal bits."""
    assert got.dtype == expected.dtype and got.shape == expected.shape, (what, got.dtype, got.shape, expected.shape)
    if not torch.equal(got.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8)):
        raise AssertionError(f"{what}: {got} is not {expected}")


def check_case(context: RankContext, transport: str, case: Case, *, with_hooks: bool = False) -> None:
    """Dispatch and combine on one rank against the oracle."""
    with make_buffer(context, transport, case) as buffer:
        step(buffer, World(case), context.rank, with_hooks=with_hooks)


def step(buffer: Buffer, world: World, rank: int, *, with_hooks: bool = False) -> None:
    """One dispatch and combine, checked."""
    result = dispatch(buffer, world, rank, return_recv_hook=with_hooks)
    if with_hooks:
        result.hook()
    result.handle.check()
    check_dispatch(world, rank, result)
    combined = combine(buffer, world, rank, result, return_recv_hook=with_hooks)
    if with_hooks:
        combined.hook()
    check_combined(world, rank, combined)


def check_combined(world: World, rank: int, combined: LowLatencyCombineResult) -> None:
    """Rows back at their source, bit by bit."""
    assert_same(combined.x, world.combined(rank), "combined rows")
    assert combined.absent.tolist() == [s in world.case.absent for s in range(world.case.num_ranks)]


def fuzz_case(generator: random.Random, num_ranks: int) -> Case:
    """A random case; small, because what goes wrong goes wrong with few tokens."""
    num_experts = num_ranks * generator.randint(1, 6)
    max_tokens = generator.choice((1, 3, 9, 20))
    dtype = generator.choice(DTYPES)
    cast = None
    if dtype != FLOAT8 and generator.random() < 0.4:
        cast = Float8Cast(scale_format=generator.choice(("float32", "power_of_two")))
    reduce = generator.choice(REDUCES)
    return Case(
        seed=generator.randrange(1 << 30),
        num_tokens=tuple(generator.randint(0, max_tokens) for _ in range(num_ranks)),
        max_tokens=max_tokens,
        num_experts=num_experts,
        hidden=128 * generator.randint(1, 3),
        num_topk=generator.randint(1, min(num_experts, 8)),
        layout=generator.choice((ExpertBlocks(), ExpertMajor(generator.randint(1, 20)))),
        dtype=dtype,
        cast=cast,
        dropped=generator.choice((0.0, 0.3, 1.0)),
        weighted=generator.random() < 0.7,
        combine_dtype=generator.choice(ROW_DTYPES),
        reduce=reduce,
        own_weights=reduce == "exact" and generator.random() < 0.5,
        zero_copy=reduce == "exact" and generator.random() < 0.5,
    )
