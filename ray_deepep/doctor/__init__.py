"""``ray-deepep doctor``: what this machine has, what is missing or sick, and what to do about it. Needs no GPU.

Probes read (``probes``), judgements are pure functions from readings to findings (``judge_*``), ``report`` prints.
"""

from .bandwidth import PairTest, measure_pairs
from .diagnosis import diagnose, examine
from .findings import Finding, Status, worst
from .pairs import PairSpeed, judge_pairs
from .report import Report, finding_lines, run, write

__all__ = [
    "Finding",
    "PairSpeed",
    "PairTest",
    "Report",
    "Status",
    "diagnose",
    "examine",
    "finding_lines",
    "judge_pairs",
    "measure_pairs",
    "run",
    "worst",
    "write",
]
