"""The doctor where there are GPUs: what the driver's tools print here is understood, and rows go between all pairs."""

from __future__ import annotations

import pytest
import torch

from ray_deepep.cuda import cuda_problem
from ray_deepep.doctor import PairTest, diagnose, measure_pairs
from ray_deepep.doctor.diagnosis import num_usable_gpus
from ray_deepep.doctor.findings import Status
from ray_deepep.doctor.parsing import gpus, nvlinks, peer_matrix
from ray_deepep.doctor.probes import read_machine

pytestmark = pytest.mark.skipif(bool(cuda_problem()), reason=f"transport cuda: {cuda_problem()}")


def test_the_tools_of_this_driver_are_understood() -> None:
    readings = read_machine()
    found = {finding.name: finding for finding in diagnose(readings)}
    listed = gpus(readings.gpu.gpus.text)
    uuids = {gpu.uuid.removeprefix("GPU-") for gpu in listed}
    for index in range(torch.cuda.device_count()):
        assert str(torch.cuda.get_device_properties(index).uuid) in uuids
    assert num_usable_gpus(readings) == torch.cuda.device_count()
    assert found["CUDA runtime"].status is Status.OK
    for reading in ("clocks", "ecc", "nvlink", "peer_access"):
        assert not getattr(readings.gpu, reading).problem
    num_pairs = len(listed) * (len(listed) - 1)
    assert len(peer_matrix(readings.gpu.peer_access.text)) == num_pairs
    assert len(nvlinks(readings.gpu.nvlink.text)) in (0, len(listed))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_rows_go_between_all_pairs_of_gpus() -> None:
    num_gpus = torch.cuda.device_count()
    outcome = measure_pairs(PairTest(), num_gpus=num_gpus)
    assert (outcome.problem, outcome.transport) == ("", "cuda")
    assert len(outcome.pairs) == num_gpus * (num_gpus - 1)
    assert all(min(pair.dispatch_gb_per_s, pair.combine_gb_per_s) > 1.0 for pair in outcome.pairs)
