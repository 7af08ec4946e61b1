"""Dots of rows by the CUDA core's kernel, against float64 and against torch's bits for rows that are scaled.

tests/gpu/run.sh tests/gpu/test_cuda_row_dots.py
"""

from __future__ import annotations

import itertools

import pytest
import torch

from ray_deepep.cuda import cuda_problem
from ray_deepep.row_dots import fits_kernel, row_dots

pytestmark = pytest.mark.skipif(bool(cuda_problem()), reason=f"transport cuda: {cuda_problem()}")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# 16 bytes (float32: 32); a few threads; one vector more than threads, and than they load at once; a model's.
HIDDEN = (8, 128, 1032, 4104, 7168)
# float32 sums of thousands of terms, some added one after the other.
TOLERANCE = 1e-6
GUARD = 64


@pytest.fixture
def kernel_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """What would fall back to torch fails."""

    def refuse(*tensors: torch.Tensor) -> None:
        pytest.fail(f"torch's way for {[tuple(tensor.shape) for tensor in tensors]}")

    monkeypatch.setattr("ray_deepep.row_dots._pieces", refuse)


def normal(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cuda") -> torch.Tensor:
    return torch.randn(shape, device=device).to(dtype)


def dots_of(a: torch.Tensor, b: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Poisoned before, with poison behind that must stay."""
    size = b.shape[:-1].numel()
    memory = torch.full((size + GUARD,), float("nan"), device=a.device)
    row_dots(a, b, out=memory[:size].view(b.shape[:-1]), weights=weights)
    assert memory[size:].isnan().all()
    return memory[:size].view(b.shape[:-1])


def assert_close(got: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """By the norm of what is expected; a single dot may be close to zero, so its size is taken from its terms."""
    assert got.isfinite().all()
    for dots, rows in zip(got, b, strict=True):  # float64 of all at once would be large
        terms = a.double() * rows.double()
        assert (dots.double() - terms.sum(-1)).norm() <= TOLERANCE * terms.norm()


@pytest.mark.parametrize("num_groups", (0, 1, 2, 3, 8))
@pytest.mark.parametrize("num_rows", (0, 1, 33, 1000))
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("kernel_only")
def test_dots(dtype: torch.dtype, hidden: int, num_rows: int, num_groups: int) -> None:
    a, b = normal(num_rows, hidden, dtype=dtype), normal(num_groups, num_rows, hidden, dtype=dtype)
    kept = a.clone(), b.clone()
    got = dots_of(a, b)
    assert_close(got, a, b)
    assert torch.equal(dots_of(a, b), got)
    assert torch.equal(a, kept[0]) and torch.equal(b, kept[1])


@pytest.mark.parametrize("num_groups", (1, 2, 3, 4, 8))
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("kernel_only")
def test_scaled_rows_have_the_bits_of_torch(dtype: torch.dtype, hidden: int, num_groups: int) -> None:
    """Also where a product is infinite or below the smallest normal number."""
    a, b = normal(333, hidden, dtype=dtype), normal(num_groups, 333, hidden, dtype=dtype)
    weights = normal(333)
    weights[:9] = torch.tensor([0.0, -0.0, 1.0, 1e-6, 3e-8, 1e38, 1e-38, 7e4, float("inf")])
    a[8].abs_().clamp_(min=0.5)  # no NaN
    plain, scaled = a.clone(), a.clone()
    got = dots_of(scaled, b, weights)
    expected = plain.clone().mul_(weights.unsqueeze(-1))
    as_bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(scaled.view(as_bits), expected.view(as_bits))
    # The dots are those of the rows as they were.
    assert torch.equal(got, dots_of(plain, b))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("kernel_only")
def test_bits_depend_on_the_rows_alone(dtype: torch.dtype) -> None:
    a, b = normal(77, 1032, dtype=dtype), normal(9, 77, 1032, dtype=dtype)
    got = dots_of(a, b)
    for first, num_groups in itertools.product((0, 4), (1, 2, 3, 5)):
        part = slice(first, first + num_groups)
        assert torch.equal(dots_of(a, b[part]), got[part])
        assert torch.equal(dots_of(a[10:20], b[part, 10:20].contiguous()), got[part, 10:20])


def test_many_dimensions_and_a_broadcast_gradient() -> None:
    """Blocks as DeepSpeed's experts return them, and the gradient of a sum, which is one number for all."""
    a, b = normal(1, 1, 50, 64, dtype=torch.bfloat16), normal(1, 1, 50, 64, dtype=torch.bfloat16)
    assert torch.equal(dots_of(a, b), dots_of(a.view(50, 64), b.view(1, 50, 64)).view(1, 1, 50))
    b = normal(4, 50, 64, dtype=torch.bfloat16)
    one = torch.ones((), dtype=torch.bfloat16, device="cuda").expand(50, 64)
    assert torch.equal(dots_of(one, b), dots_of(one.contiguous(), b))


def test_what_the_kernel_does_not_take() -> None:
    """The same numbers, from torch."""
    memory, weights = normal(2, 3, 40, 72), normal(2, 1, 40)
    a, b = memory[:, 1:2], normal(2, 1, 40, 72)
    plain, out = a.clone(), torch.full((2, 1, 40), float("nan"), device="cuda")
    assert not fits_kernel(a, b, out, weights)
    row_dots(a, b, out=out, weights=weights)
    torch.testing.assert_close(out, (plain * b).sum(-1))
    assert torch.equal(a, plain * weights.unsqueeze(-1))
    for a, b in (
        (torch.cat([normal(1), normal(40 * 72)])[1:].view(40, 72), normal(3, 40, 72)),
        (normal(40, 6), normal(3, 40, 6)),
        (normal(40, 72), normal(40, 3, 72).transpose(0, 1)),
    ):
        out = torch.full((3, 40), float("nan"), device="cuda")
        assert not fits_kernel(a, b, out, None)
        row_dots(a, b, out=out)
        torch.testing.assert_close(out, (a * b).sum(-1))


@pytest.mark.usefixtures("kernel_only")
def test_order_on_the_current_stream() -> None:
    a, b, out = torch.zeros(500, 4096, device="cuda"), normal(2, 500, 4096), torch.zeros(2, 500, device="cuda")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        a.fill_(1.0)
        row_dots(a, b, out=out)
        copy = out.clone()
    stream.synchronize()
    assert_close(copy, a, b)


@pytest.mark.usefixtures("kernel_only")
def test_in_a_graph() -> None:
    a, b, weights = normal(300, 512, dtype=torch.bfloat16), normal(1, 300, 512, dtype=torch.bfloat16), normal(300)
    out = torch.zeros(1, 300, device="cuda")
    row_dots(a.clone(), b, out=out, weights=weights)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        row_dots(a, b, out=out, weights=weights)
    for _ in range(3):
        a.copy_(normal(300, 512))
        plain = a.clone()
        graph.replay()
        assert_close(out, plain, b)
        assert torch.equal(a, plain.mul_(weights.unsqueeze(-1)))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.usefixtures("kernel_only")
def test_tensors_on_another_than_the_current_gpu() -> None:
    a, b = normal(100, 256, device="cuda:1"), normal(3, 100, 256, device="cuda:1")
    assert_close(dots_of(a, b), a, b)
    assert torch.cuda.current_device() == 0
