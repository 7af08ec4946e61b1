"""How busy the machine is with other things; figures are as good as it is quiet."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path

_STAT = Path("/proc/stat")
_QUIET_SHARE = 0.1
_QUIET_FOR_S = 3


def wait_until_quiet(limit_s: float) -> bool:
    """Sleep until the processors were at most a tenth busy for 3 s; False if that took longer than the limit."""
    end, quiet_s = time.monotonic() + limit_s, 0
    while quiet_s < _QUIET_FOR_S:
        if time.monotonic() > end:
            return False
        with_others = OthersWatch()
        time.sleep(1.0)
        quiet_s = quiet_s + 1 if with_others.share() <= _QUIET_SHARE else 0
    return True


class OthersWatch:
    """Share of the machine's processor time that went elsewhere than to this process and its ended children."""

    def __init__(self) -> None:
        self._busy_s, self._total_s = _machine_seconds()
        self._own_s = _own_seconds()

    def share(self) -> float:
        """From 0 to 1, since this object was made; 0 where the system does not tell."""
        busy_s, total_s = _machine_seconds()
        if total_s <= self._total_s:
            return 0.0
        elsewhere_s = (busy_s - self._busy_s) - (_own_seconds() - self._own_s)
        return min(max(elsewhere_s / (total_s - self._total_s), 0.0), 1.0)


def _machine_seconds() -> tuple[float, float]:
    """Busy (time stolen by the host included) and total."""
    if not _STAT.is_file():
        return 0.0, 0.0
    user, nice, system, idle, iowait, irq, softirq, steal = map(int, _STAT.read_text().split()[1:9])
    busy = user + nice + system + irq + softirq + steal
    ticks_per_s = os.sysconf("SC_CLK_TCK")
    return busy / ticks_per_s, (busy + idle + iowait) / ticks_per_s


def _own_seconds() -> float:
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime
