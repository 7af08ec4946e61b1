"""Dots of rows without a GPU: the bits of torch's own products and sums, and what the kernel would be given."""

from __future__ import annotations

import contextlib

import pytest
import torch
from harness import error_of

from ray_deepep import InvalidArgumentError, local_kernel
from ray_deepep import row_dots as module
from ray_deepep.cuda import core_version
from ray_deepep.row_dots import fits_kernel, row_dots

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape).to(dtype)


def poisoned(shape: torch.Size, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


# Gates' gradients at the source: 2 rows, one piece, several pieces with a shorter last one, and none at all.
@pytest.mark.parametrize(("k", "num_tokens", "hidden"), [(1, 2, 8), (2, 100, 72), (3, 301, 520), (0, 5, 8), (2, 0, 8)])
@pytest.mark.parametrize("gates", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_row_against_several(dtype: torch.dtype, gates: torch.dtype, k: int, num_tokens: int, hidden: int) -> None:
    a, b = normal(num_tokens, hidden, dtype=dtype), normal(k, num_tokens, hidden, dtype=dtype)
    kept, product = a.clone(), torch.promote_types(dtype, gates)
    out = poisoned(b.shape[:-1], product)
    row_dots(a, b, out=out)
    assert torch.equal(out, (a.to(product) * b).sum(-1))
    assert torch.equal(a, kept)


@pytest.mark.parametrize(("num_sources", "num_slots", "hidden"), [(1, 7, 16), (2, 300, 520), (3, 0, 8)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_one_expert(dtype: torch.dtype, num_sources: int, num_slots: int, hidden: int) -> None:
    """Blocks of padded rows are views with gaps; what is in the gaps stays."""
    everything = normal(num_sources, 2, num_slots, hidden, dtype=dtype)
    weights, dots = normal(num_sources, 2, num_slots), poisoned(everything.shape[:-1])
    rows, kept = normal(num_sources, 1, num_slots, hidden, dtype=dtype), everything.clone()
    row_dots(everything[:, 1:], rows, out=dots[:, 1:], weights=weights[:, 1:])
    assert torch.equal(dots[:, 1:], (kept[:, 1:].float() * rows).sum(-1))
    assert torch.equal(everything[:, 1:], (kept[:, 1:].float() * weights[:, 1:].unsqueeze(-1)).to(dtype))
    assert torch.equal(everything[:, :1], kept[:, :1]) and dots[:, :1].isnan().all()


def test_what_the_kernel_takes() -> None:
    a, b, out, weights = normal(4, 8), normal(3, 4, 8), poisoned((3, 4)), normal(4)
    assert fits_kernel(a, b, out, None) and fits_kernel(a, b, out, weights)
    for dtype in DTYPES:
        assert fits_kernel(a.to(dtype), b.to(dtype), out, weights)
        assert fits_kernel(a[:0].to(dtype), b[:, :0].to(dtype), out[:, :0], weights[:0])
    between = torch.empty(33)[1:].view(4, 8)
    for refused in (
        (a.double(), b.double(), out, None),
        (a.bfloat16(), b, out, None),
        (a, b, out.bfloat16(), None),
        (a, b, out, weights.bfloat16()),
        (normal(8, 4).t(), b, out, None),
        (a, normal(4, 3, 8).transpose(0, 1), out, None),
        (a, b, poisoned((4, 3)).t(), None),
        (a, b, out, normal(8)[::2]),
        (between, b, out, None),
        (normal(4, 6), normal(3, 4, 6), out, None),
    ):
        assert not fits_kernel(*refused)


@pytest.mark.skipif(not core_version()[0], reason=f"no CUDA core: {core_version()[1]}")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_core_takes_what_it_is_given(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Without rows nothing is launched, so this needs no GPU: it is about names and types of arguments."""
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
    out = poisoned((2, 0))
    assert module._launch(normal(0, 8, dtype=dtype), normal(2, 0, 8, dtype=dtype), out, None)
    assert module._launch(normal(0, 8, dtype=dtype), normal(2, 0, 8, dtype=dtype), out, normal(0))


def test_without_a_core(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise ImportError("no CUDA core")

    monkeypatch.setattr(local_kernel, "load_core", absent)
    assert not module._launch(normal(4, 8), normal(2, 4, 8), poisoned((2, 4)), None)


@pytest.mark.parametrize(
    ("argument", "changed", "rule"),
    [
        ("b", {"b": normal(3, 5, 8)}, "must be [*G, *N, H], where a is [*N, H] = [4, 8]"),
        ("b", {"b": normal(8)}, "must be"),
        ("b", {"a": normal(8)}, "must be"),
        ("b", {"a": normal(2, 3, 4, 8)}, "must be"),
        ("out", {"out": normal(4, 3)}, "must be [3, 4], as b without H"),
        ("weights", {"weights": normal(1)}, "must be [4], as a without H"),
        ("b", {"b": torch.empty(3, 4, 8, device="meta")}, "must be on cpu, as a is"),
        ("out", {"out": torch.empty(3, 4, device="meta")}, "must be on cpu, as a is"),
        ("weights", {"weights": torch.empty(4, device="meta")}, "must be on cpu, as a is"),
    ],
)
def test_what_does_not_go_together(argument: str, changed: dict[str, torch.Tensor], rule: str) -> None:
    """torch would broadcast some of it."""
    given = {"a": normal(4, 8), "b": normal(3, 4, 8), "out": poisoned((3, 4)), "weights": normal(4)} | changed
    kept = {name: tensor.clone() for name, tensor in given.items()}
    a, b = given.pop("a"), given.pop("b")
    error = error_of(InvalidArgumentError, lambda: row_dots(a, b, **given))
    assert error.argument == argument and rule in error.rule
    assert torch.equal(a, kept["a"])
