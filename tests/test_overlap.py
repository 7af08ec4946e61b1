"""What ``leave_sms`` asks of torch, on a torch that only notes it. What comes of it: benchmarks/cuda_overlap.py."""

from __future__ import annotations

import pytest
import torch
from harness import error_of

import ray_deepep
from ray_deepep import InvalidArgumentError, InvalidTypeError


class Settings:
    """Of a process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.library, self.carveout = "cublas", None
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch._C, "_get_sm_carveout_experimental", lambda: self.carveout)
        monkeypatch.setattr(torch._C, "_set_sm_carveout_experimental", self._leave)
        monkeypatch.setattr(torch.backends.cuda, "preferred_blas_library", self._use)

    def _leave(self, num_sms: int | None) -> None:
        self.carveout = num_sms

    def _use(self, library: str | None = None) -> str:
        self.library = self.library if library is None else library
        return self.library


def test_products_inside_leave_so_many(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(monkeypatch)
    with ray_deepep.leave_sms(8):
        assert (settings.carveout, settings.library) == (8, "cublaslt")
        with ray_deepep.leave_sms(24):
            assert settings.carveout == 24
        assert (settings.carveout, settings.library) == (8, "cublaslt")
    assert (settings.carveout, settings.library) == (None, "cublas")


def test_an_error_inside_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(monkeypatch)
    with pytest.raises(KeyError), ray_deepep.leave_sms(8):
        raise KeyError("product")
    assert (settings.carveout, settings.library) == (None, "cublas")


def test_without_gpus_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(monkeypatch)
    monkeypatch.setattr(torch.version, "cuda", None)
    with ray_deepep.leave_sms(8):
        assert (settings.carveout, settings.library) == (None, "cublas")
        assert torch.equal(torch.eye(2) @ torch.eye(2), torch.eye(2))


def test_bad_numbers() -> None:
    error = error_of(InvalidArgumentError, lambda: ray_deepep.leave_sms(0).__enter__())
    assert str(error) == "num_sms: must be >= 1; got 0"
    error_of(InvalidTypeError, lambda: ray_deepep.leave_sms(1.5).__enter__())
