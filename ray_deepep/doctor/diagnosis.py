"""All judgements on one machine's readings."""

from __future__ import annotations

import json

from .findings import Finding
from .judge_gpu import judge_gpus
from .judge_software import judge_software
from .judge_system import judge_system
from .probes import read_machine
from .readings import Readings


def diagnose(readings: Readings) -> list[Finding]:
    """Findings in the order of the report. Pure."""
    has_gpus = bool(readings.gpu.gpus.text)
    return [
        *judge_software(readings.software, has_gpus=has_gpus),
        *judge_gpus(readings.gpu, readings.software),
        *judge_system(readings.system, has_gpus=has_gpus),
    ]


def num_usable_gpus(readings: Readings) -> int:
    """GPUs that the CUDA core can use: it loads, and torch sees them. Pure."""
    if readings.software.cuda_core.problem or not readings.gpu.torch.text:
        return 0
    return json.loads(readings.gpu.torch.text)["num_gpus"]


def examine() -> list[Finding]:
    """Read this machine and judge it."""
    return diagnose(read_machine())
