"""From values to places on a drawing, and round numbers along an axis."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Linear: ``low`` is drawn at ``start``, ``high`` at ``end``."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def over(cls, low: float, high: float, start: float, end: float, *, pad: float = 0.0) -> Scale:
        """For values from ``low`` to ``high``, with room of a share ``pad`` above, and below unless ``low`` is 0."""
        span = high - low or abs(high) or 1.0
        if high == low:
            low, high = low - span / 2 * (low != 0), high + span / 2
        return cls(low=low - pad * span * (low != 0), high=high + pad * span, start=start, end=end)

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, about: int) -> list[float]:
        """Multiples of 1, 2 or 5 times a power of ten, ``about`` so many."""
        rough = (self.high - self.low) / about
        power = 10.0 ** math.floor(math.log10(rough))
        step = power * next((m for m in (1, 2, 5, 10) if m * power >= rough * 0.999), 10)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(index * step, 12) for index in range(first, last + 1)]


def compact(value: float) -> str:
    """A number in few characters: 1200 is 1,200, 3200000 is 3.2M, 0.00012 is 1.2e-04."""
    size = abs(value)
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= unit:
            divisor = 1e3 if name == "k" else unit
            return f"{value / divisor:.4g}{name}"
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1e}" if 0 < size < 1e-3 else f"{value:.4g}"


def duration(seconds: float) -> str:
    """Seconds in words: 3.2 s, 4 min 5 s, 2 h 3 min."""
    if math.isnan(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def size_of(num_bytes: int) -> str:
    """Bytes in words."""
    value, units = float(num_bytes), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.0f} {units[0]}" if units[0] == "bytes" else f"{value:.1f} {units[0]}"
