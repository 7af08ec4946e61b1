"""Thousands of random dispatches and combines over long-lived buffers, each judged on the GPU by the oracle.

    python tests/gpu/soak.py --ranks 2                        # 10,000 iterations
    python tests/gpu/soak.py --ranks 4 --seconds 300 --seed 7

Layouts, dtypes, routings, token counts, casts, fixed shapes, CUDA graphs, old plans, async operations, tensors in the
heap and numbers of SMs come in any order, on buffers that live for the whole run. All ranks draw the same iterations,
and each makes the inputs of all. Exit status 1 after an error. Several ranks on one GPU need MPS.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import gc
import pathlib
import random
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import device_cases
import device_oracle
import torch
import torch.distributed as dist
from captured import CapturedLayer
from cases import FLOAT8, PADDED, ROUTINGS, Case, CombineMode, all_modes
from device_oracle import World
from harness import CaseFailed, RankContext, RankPool
from tqdm import tqdm

from ray_deepep import Buffer, DispatchHandle, DispatchResult, ExpertMajor, Float8Cast, TokenMajor, Work, float8
from ray_deepep.cuda import cuda_problem

SYMM_BYTES_PER_RANK = 16 << 20
"""What a buffer's heap grows by with each rank that may send to this one."""
NUM_KEPT = 6
"""Handles of earlier iterations that stay in use."""
LOOK_EVERY = 50
"""Iterations between two looks at the clock, which all ranks take together."""
SCALE_FORMATS = ("float32", "power_of_two")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """A run; the same on all ranks."""

    iterations: int
    seconds: float = 0.0
    """Longest time of the loop; 0: no limit."""
    seed: int = 0
    progress: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
    """Sizes of one buffer; experts per rank."""

    experts_per_rank: int
    hidden: int
    num_topk: int
    max_tokens: int
    padded: bool = False


GEOMETRIES = (
    Geometry(experts_per_rank=4, hidden=256, num_topk=4, max_tokens=200),
    Geometry(experts_per_rank=16, hidden=1024, num_topk=8, max_tokens=90),
    Geometry(experts_per_rank=3, hidden=384, num_topk=2, max_tokens=64, padded=True),
)


class Soak:
    """One rank's part of a run."""

    def __init__(self, context: RankContext, options: Options) -> None:
        self.rank, self.num_ranks, self.options = context.rank, context.num_ranks, options
        self.device = device_cases.use_gpu(context.rank)
        self.random = random.Random(options.seed)
        self.buffers = [self._make_buffer(context, geometry) for geometry in GEOMETRIES]
        self.layers = [
            self._capture(number, layout, async_op)
            for number in (0, 1)
            for layout, async_op in ((TokenMajor(), False), (ExpertMajor(8), True))
        ]
        self.kept: collections.deque[tuple[Buffer, World, DispatchHandle]] = collections.deque(maxlen=NUM_KEPT)
        self.counts: collections.Counter[str] = collections.Counter()

    def run(self) -> dict[str, int]:
        """How many iterations of each kind there were.

        Raises:
            AssertionError: naming the iteration that went wrong.
        """
        start = time.monotonic()
        steps = tqdm(
            range(self.options.iterations), unit="iteration", disable=not self.options.progress or self.rank != 0
        )
        for number in steps:
            if number % LOOK_EVERY == 0 and self._late(start):
                break
            kind = self.random.choices(("eager", "graph", "old_plan"), weights=(6, 2, 2))[0]
            case = None
            try:
                case = self._draw_case() if kind == "eager" else None
                getattr(self, f"_{kind}")(*([] if case is None else [case]))
            except Exception as error:
                what = f"seed {self.options.seed}, iteration {number}, {kind} {case or ''}"
                raise AssertionError(f"rank {self.rank}, {what}: {type(error).__name__}: {error}") from error
            self.counts[kind] += 1
        self._finish()
        return dict(self.counts)

    def _make_buffer(self, context: RankContext, geometry: Geometry) -> Buffer:
        # A token may name one expert K times; positions in an expert, and three slots that stay empty.
        capacity = geometry.max_tokens * geometry.num_topk + 3 if geometry.padded else 0
        return context.buffer(
            "cuda",
            num_experts=geometry.experts_per_rank * self.num_ranks,
            hidden=geometry.hidden,
            num_topk=geometry.num_topk,
            max_tokens=geometry.max_tokens,
            max_capacity=capacity,
            symm_bytes=SYMM_BYTES_PER_RANK * self.num_ranks,
        )

    def _capture(self, number: int, layout: object, async_op: bool) -> CapturedLayer:
        geometry = GEOMETRIES[number]
        case = Case(
            seed=0,
            num_tokens=tuple(max(geometry.max_tokens - 23 * rank, 0) for rank in range(self.num_ranks)),
            num_experts=geometry.experts_per_rank * self.num_ranks,
            hidden=geometry.hidden,
            num_topk=geometry.num_topk,
            layout=layout,
            dtype=torch.bfloat16,
        )
        room = sum(case.num_tokens)
        if isinstance(layout, ExpertMajor):
            room = room * case.num_topk + layout.alignment * geometry.experts_per_rank
        return CapturedLayer(self.buffers[number], case, self.rank, max_recv_tokens=room, async_op=async_op)

    def _draw_case(self) -> Case:
        draw, geometry = self.random, self.random.choice(GEOMETRIES)
        # All kinds but the one that needs as many experts as choices.
        routings = [routing for routing in ROUTINGS if routing != "distinct"]
        layouts = (PADDED,) if geometry.padded else (TokenMajor(), ExpertMajor(draw.choice((1, 8, 16, 128))))
        counts = (0, 1, draw.randint(0, geometry.max_tokens), draw.randint(0, geometry.max_tokens), geometry.max_tokens)
        return Case(
            seed=draw.getrandbits(40),
            num_tokens=tuple(draw.choice(counts) for _ in range(self.num_ranks)),
            num_experts=geometry.experts_per_rank * self.num_ranks,
            hidden=geometry.hidden,
            num_topk=draw.randint(1, geometry.num_topk),
            layout=draw.choice(layouts),
            dtype=draw.choice((torch.float32, torch.bfloat16, torch.bfloat16, torch.float16, FLOAT8)),
            routing=draw.choices(routings, weights=[6 if r == "random" else 2 for r in routings])[0],
        )

    def _eager(self, case: Case) -> None:
        buffer = next(b for b, g in zip(self.buffers, GEOMETRIES) if g.hidden == case.hidden)
        world, draw, more = device_cases.make_world(case, self.device), self.random, {}
        want, sent = world, world
        if case.dtype != FLOAT8 and draw.random() < 0.25:
            more["cast"] = Float8Cast(scale_format=draw.choice(SCALE_FORMATS))
            rows = [float8.quantize(x, more["cast"]) for x in world.x]
            want = dataclasses.replace(world, x=[r.data for r in rows], x_scales=[r.scales for r in rows])
            self.counts["cast"] += 1
        elif case.dtype != FLOAT8 and not isinstance(world.layout, TokenMajor) and draw.random() < 0.25:
            more["scale_by_weights"] = True
        room = None
        if case.layout != PADDED and draw.random() < 0.4:
            room = device_cases.rows_needed(world) + draw.choice((0, 1, 64))
            room = more["max_recv_tokens"] = max(room, 1)
            self.counts["fixed"] += 1
        sent = self._placed(buffer, sent)
        result = self._call(device_cases.dispatch, buffer, sent, self.rank, **more)
        if room is not None:
            result.handle.check()
        scaled = more.get("scale_by_weights", False)
        device_cases.assert_dispatched(result, want, self.rank, scaled=scaled, max_recv_tokens=room)
        self._combine(buffer, world, result.handle)
        if draw.random() < 0.3:
            self.kept.append((buffer, world, result.handle))

    def _old_plan(self) -> None:
        """Other rows along the plan of an earlier iteration."""
        if not self.kept:
            return
        buffer, world, handle = self.kept[self.random.randrange(len(self.kept))]
        seed = self.random.getrandbits(40)
        generator = torch.Generator(self.device).manual_seed(seed)
        x = [device_cases.random_rows(tuple(x.shape), x.dtype, generator) for x in world.x]
        other = dataclasses.replace(world, x=x)
        placed = self._placed(buffer, other)
        result = self._call(device_cases.dispatch_along, buffer, placed, self.rank, handle)
        room = handle.max_recv_tokens
        device_cases.assert_dispatched(result, other, self.rank, cached=True, max_recv_tokens=room)
        self._combine(buffer, other, handle)

    def _graph(self) -> None:
        layer = self.random.choice(self.layers)
        seed, routing = self.random.getrandbits(40), self.random.choice(("random", "sparse", "one_rank", "one_expert"))
        world = device_cases.make_world(dataclasses.replace(layer.case, seed=seed, routing=routing), self.device)
        layer.replay(world)
        layer.check(world)

    def _combine(self, buffer: Buffer, world: World, handle: DispatchHandle) -> None:
        mode: CombineMode = self.random.choice(all_modes(isinstance(world.layout, TokenMajor)))
        seed, dtype = self.random.getrandbits(40), world.x[0].dtype
        dtype = torch.bfloat16 if dtype == FLOAT8 else dtype
        room = handle.max_recv_tokens
        rows = device_cases.make_rows(world, dtype, seed, num_rows=room)
        generator = torch.Generator(self.device).manual_seed(seed + 1)
        biases = [device_cases.random_rows(tuple(x.shape), dtype, generator) for x in world.x]
        width = (handle.num_topk,) if isinstance(world.layout, TokenMajor) else ()
        carried = [torch.rand(len(r), *width, generator=generator, device=self.device) for r in rows]
        bias = biases[self.rank] if mode.bias else None
        got = self._call(
            buffer.combine,
            self._placed_rows(buffer, rows[self.rank]),
            handle,
            topk_weights=carried[self.rank] if mode.carry else None,
            weighted=mode.weighted,
            reduce=mode.reduce,
            keep_routes=mode.keep_routes,
            bias=bias,
        )
        want = device_oracle.combine(world, self.rank, rows, weighted=mode.weighted, reduce=mode.reduce, bias=bias)
        device_cases.assert_same(f"{mode} x", got.x, want)
        if mode.keep_routes:
            device_cases.assert_same(f"{mode} routes", got.routes, device_oracle.routes_home(world, self.rank, rows))
        if mode.carry:
            home = device_oracle.weights_home(world, self.rank, carried)
            device_cases.assert_same(f"{mode} weights", got.topk_weights, home)

    def _call(self, operation, *args: object, **more: object) -> DispatchResult:
        async_op = self.random.random() < 0.4
        self.counts["async"] += async_op
        result = operation(*args, num_sms=self.random.choice((1, 4, 8, 20)), async_op=async_op, **more)
        if isinstance(result, Work):
            # Something of the caller's beside it.
            torch.ones(256, 256, device=self.device).sin_().sum()
            result = result.wait()
        return result

    def _placed(self, buffer: Buffer, world: World) -> World:
        own = self._placed_rows(buffer, world.x[self.rank])
        return dataclasses.replace(world, x=[own if r == self.rank else x for r, x in enumerate(world.x)])

    def _placed_rows(self, buffer: Buffer, rows: torch.Tensor) -> torch.Tensor:
        """In the heap on some ranks; all ranks draw equally often."""
        resident = [self.random.random() < 0.4 for _ in range(self.num_ranks)][self.rank]
        if not resident:
            return rows
        self.counts["in_heap"] += 1
        copy = buffer.symm_empty(rows.shape[0], rows.dtype)
        device_oracle.as_bytes(copy).copy_(device_oracle.as_bytes(rows))
        return copy

    def _late(self, start: float) -> bool:
        late = torch.tensor([0 < self.options.seconds < time.monotonic() - start])
        dist.broadcast(late, 0)
        return bool(late)

    def _finish(self) -> None:
        torch.cuda.synchronize()
        self.kept.clear()
        gc.collect()
        for buffer in self.buffers:
            buffer.check()
            # Nothing of the heap was lost on the way.
            whole = SYMM_BYTES_PER_RANK * self.num_ranks // (4 * buffer.geometry.hidden)
            buffer.symm_empty(whole, torch.float32)
            buffer.close()


def soak(context: RankContext, options: Options) -> dict[str, int]:
    """One run on this rank."""
    return Soak(context, options).run()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=10_000)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.0, help="longest time of the loop (default: no limit)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if problem := cuda_problem():
        print(f"transport cuda: {problem}", file=sys.stderr)
        return 1
    options = Options(iterations=args.iterations, seconds=args.seconds, seed=args.seed, progress=True)
    start = time.monotonic()
    try:
        with RankPool(args.ranks) as pool:
            counts = pool.run(soak, options, deadline_s=args.seconds + 120.0 if args.seconds else 86_400.0)[0]
    except CaseFailed as error:
        print(f"{error}\nsoak: FAILED after {time.monotonic() - start:.0f} s, seed {args.seed}", file=sys.stderr)
        return 1
    done = counts.pop("eager", 0), counts.pop("graph", 0), counts.pop("old_plan", 0)
    parts = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
    print(
        f"soak: {sum(done)} iterations ({done[0]} new plans, {done[1]} graph replays, {done[2]} old plans) on"
        f" {args.ranks} ranks, no error, {time.monotonic() - start:.0f} s; among them {parts}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
