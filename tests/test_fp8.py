"""Float8 dispatch against bfloat16: the error of what arrives, and the time of a call.

    python tests/test_fp8.py                                        # on the GPUs there are, or on the CPU core
    python tests/test_fp8.py --ranks 2 --tokens 4096 --hidden 7168  # several ranks on one GPU need MPS

prints a table. As a pytest it judges the errors, and that a cast inside gives the bits of a cast before; never times.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from device_cases import assert_same
from device_oracle import as_bytes
from harness import RankContext, RankPool, Ranks, shm_problem

from ray_deepep import Buffer, DispatchResult, ExpertMajor, Float8Cast, Float8Rows, TokenMajor, float8
from ray_deepep.cuda import cuda_problem

SCALE_FORMATS = ("float32", "power_of_two")
LARGEST_ERROR = {"float32": 0.04, "power_of_two": 0.05}
"""Relative, Frobenius. Three bits of mantissa round normal values by 2.6 % on average."""
TRANSPORT = "shm" if cuda_problem() else "cuda"
pytestmark = pytest.mark.skipif(
    bool(cuda_problem() and shm_problem()), reason=f"no core: {cuda_problem()}; {shm_problem()}"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """T and H per rank; SMs of a GPU; of how many calls each time is the median (0: no times)."""

    num_tokens: int = 64
    hidden: int = 256
    num_topk: int = 4
    num_experts: int = 16
    num_sms: int = 8
    num_rounds: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """One way to dispatch on one rank."""

    name: str
    row_bytes: int
    """Of a row on its way, scales included."""
    squared_error: float
    squared_norm: float
    times_us: list[float]


def compare(context: RankContext, sizes: Sizes) -> list[Found]:
    """All ways, on one rank."""
    device = use_device(context.rank)
    generator = torch.Generator(device).manual_seed(context.rank)
    shape = (sizes.num_tokens, sizes.hidden)
    # Tokens of different sizes, and a few elements that stand out: what scales per 128 elements are for.
    x = torch.randn(shape, generator=generator, device=device) * torch.rand(
        shape[0], 1, generator=generator, device=device
    )
    x[torch.rand(shape, generator=generator, device=device) < 0.001] *= 30.0
    x = x.to(torch.bfloat16)
    scores = torch.rand(sizes.num_tokens, sizes.num_experts, generator=generator, device=device)
    weights, topk_idx = scores.topk(sizes.num_topk)
    with make_buffer(context, sizes) as buffer:

        def dispatch(rows: torch.Tensor, **more: object) -> DispatchResult:
            return buffer.dispatch(rows, topk_idx, weights, num_sms=sizes.num_sms, **more)

        ways: dict[str, Callable[[], DispatchResult]] = {"bfloat16": lambda: dispatch(x)}
        for scale_format in SCALE_FORMATS:
            cast = Float8Cast(scale_format=scale_format)
            given = float8.quantize(x, cast)
            ways[f"float8 given, {scale_format}"] = lambda given=given: dispatch(given.data, x_scales=given.scales)
            ways[f"float8 cast inside, {scale_format}"] = lambda cast=cast: dispatch(x, cast=cast)
        reference = ways["bfloat16"]().x.float()
        return [measure(name, call, reference, sizes.num_rounds) for name, call in ways.items()]


def use_device(rank: int) -> torch.device:
    """The device of the transport that is tested; GPUs are shared by turns."""
    if TRANSPORT == "shm":
        return torch.device("cpu")
    torch.cuda.set_device(rank % torch.cuda.device_count())
    return torch.device("cuda", torch.cuda.current_device())


def make_buffer(context: RankContext, sizes: Sizes) -> Buffer:
    """Collective."""
    return context.buffer(
        TRANSPORT,
        num_experts=sizes.num_experts,
        hidden=sizes.hidden,
        num_topk=sizes.num_topk,
        max_tokens=sizes.num_tokens,
    )


def measure(name: str, call: Callable[[], DispatchResult], reference: torch.Tensor, num_rounds: int) -> Found:
    """Error of what one call brings, and times of further ones."""
    result = call()
    arrived, row_bytes = result.x, result.x.shape[1] * result.x.element_size()
    if result.x_scales is not None:
        arrived = float8.dequantize(Float8Rows(data=result.x, scales=result.x_scales), torch.float32)
        row_bytes += result.x_scales.shape[1] * 4
    return Found(
        name=name,
        row_bytes=row_bytes,
        squared_error=float(((arrived.float() - reference).double() ** 2).sum()),
        squared_norm=float((reference.double() ** 2).sum()),
        times_us=[call_us(call) for _ in range(num_rounds and num_rounds + 3)][3:],
    )


def call_us(call: Callable[[], DispatchResult]) -> float:
    """From the call until its rows are there."""
    finish = torch.cuda.synchronize if TRANSPORT == "cuda" else lambda: None
    finish()
    dist.barrier()
    start = time.perf_counter()
    call()
    finish()
    return (time.perf_counter() - start) * 1e6


def relative_error(of_ranks: list[Found]) -> float:
    """Frobenius, over the rows of all ranks."""
    return (sum(f.squared_error for f in of_ranks) / sum(f.squared_norm for f in of_ranks)) ** 0.5


@pytest.mark.parametrize("num_ranks", (1, 2, 4))
def test_error_against_bfloat16(ranks: Ranks, num_ranks: int) -> None:
    by_rank = ranks.run(num_ranks, compare, Sizes())
    errors = {of_ranks[0].name: relative_error(list(of_ranks)) for of_ranks in zip(*by_rank)}
    assert errors.pop("bfloat16") == 0.0
    assert len(errors) == 4
    for name, error in errors.items():
        assert 0.0 < error < LARGEST_ERROR[name.rsplit(", ", 1)[1]], (name, error)


def casts(context: RankContext, dtype: torch.dtype, hidden: int) -> None:
    """A cast inside against ``float8.quantize`` before: rows and scales, bit by bit, fresh and cached."""
    device, sizes = use_device(context.rank), Sizes(hidden=hidden)
    x = special_rows(sizes, dtype, torch.Generator(device).manual_seed(context.rank))
    topk_idx = torch.randint(
        -1, sizes.num_experts, (sizes.num_tokens, sizes.num_topk), generator=torch.Generator(device), device=device
    )
    with make_buffer(context, sizes) as buffer:
        for layout in (TokenMajor(), ExpertMajor(16)):
            for scale_format in SCALE_FORMATS:
                cast = Float8Cast(scale_format=scale_format)
                rows = float8.quantize(x, cast)
                given = buffer.dispatch(rows.data, topk_idx, x_scales=rows.scales, layout=layout)
                inside = buffer.dispatch(x, topk_idx, layout=layout, cast=cast)
                cached = buffer.dispatch(x, handle=given.handle, cast=cast)
                for name, got in (("fresh", inside), ("cached", cached)):
                    assert_same(f"{name} {cast} x", as_bytes(got.x), as_bytes(given.x))
                    assert_same(f"{name} {cast} scales", got.x_scales, given.x_scales)


def special_rows(sizes: Sizes, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Normal rows of many sizes; and zeros, largest and smallest values, powers of two, ties."""
    shape, device = (sizes.num_tokens, sizes.hidden), generator.device
    x = torch.randn(shape, generator=generator, device=device)
    x *= torch.exp2(torch.randint(-14, 12, (shape[0], 1), generator=generator, device=device))
    x[0] = 0.0
    x[1, ::2] = -0.0
    x[2] = torch.finfo(dtype).max
    x[3] = torch.finfo(dtype).tiny
    x[4] = 448.0
    x[5] = torch.arange(shape[1], device=device) % 65 * 0.125
    x[6] = 1e-4
    x[7] = torch.exp2(torch.arange(shape[1], device=device) % 14 - 7.0)
    return x.to(dtype)


@pytest.mark.parametrize("hidden", (128, 7168))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_cast_inside_is_quantize_before(ranks: Ranks, dtype: torch.dtype, hidden: int) -> None:
    ranks.run(2, casts, dtype, hidden)


def table(by_rank: list[list[Found]]) -> str:
    """What the command prints. Times are those of the slowest rank."""
    lines = [f"{'dispatch':36} {'bytes a row':>11} {'error':>8} {'us a call':>10} {'of bfloat16':>11}"]
    plain = None
    for of_ranks in zip(*by_rank):
        us = max(statistics.median(found.times_us) for found in of_ranks)
        plain = us if plain is None else plain
        error = relative_error(list(of_ranks))
        lines.append(f"{of_ranks[0].name:36} {of_ranks[0].row_bytes:11} {error:8.2%} {us:10.1f} {us / plain:11.2f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096 if TRANSPORT == "cuda" else 512, help="T, per rank")
    parser.add_argument("--hidden", type=int, default=7168 if TRANSPORT == "cuda" else 1024)
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--num-sms", type=int, default=24, help="multiprocessors of a GPU")
    gpus = torch.cuda.device_count() if TRANSPORT == "cuda" else 0
    parser.add_argument("--ranks", type=int, default=gpus or 2, help="processes (default: one per GPU, or 2)")
    args = parser.parse_args()
    sizes = Sizes(
        num_tokens=args.tokens,
        hidden=args.hidden,
        num_topk=args.topk,
        num_experts=args.experts,
        num_sms=args.num_sms,
        num_rounds=args.rounds,
    )
    where = torch.cuda.get_device_name() if TRANSPORT == "cuda" else "CPU core"
    print(f"{args.tokens} tokens x {args.hidden}, top-{args.topk} of {args.experts}, {args.ranks} ranks, {where}")
    with RankPool(args.ranks) as pool:
        print(table(pool.run(compare, sizes, deadline_s=300.0)))


if __name__ == "__main__":
    main()
