"""Charts of the report, and numbers in words: what is drawn of given values."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree

import pytest

from ray_deepep.report import charts, heatmap
from ray_deepep.report.scale import Scale, compact, duration


def test_heatmap_pixels(tmp_path):
    from matplotlib.image import imread

    (tmp_path / "x.png").write_bytes(heatmap.png([[(1, 2, 3, 255), (250, 0, 0, 255)], [(0, 0, 9, 255)] * 2]))
    assert (imread(tmp_path / "x.png") * 255).round().tolist() == [
        [[1, 2, 3, 255], [250, 0, 0, 255]],
        [[0, 0, 9, 255]] * 2,
    ]
    more, less = heatmap.load_colour(2.0), heatmap.load_colour(0.5)
    assert heatmap.load_colour(1.0)[3] == 0 and more[3] == less[3] == 128 and more[:3] != less[:3]
    assert heatmap.load_colour(0.0) == heatmap.load_colour(0.1) and heatmap.load_colour(0.0)[3] == 255


def test_charts_draw_what_they_are_given():
    series = charts.Series(css="run0", name="a", points=[(0.0, 0.0), (5.0, 10.0), (10.0, 100.0)])
    source = charts.line_chart([series], title="t", x_label="x", y_label="y", from_zero=True, y_limit=20.0)
    assert "1 values above 20 are drawn at it." in source
    svg = ElementTree.fromstring(re.search("<svg.*</svg>", source).group())
    (line,) = svg.iter("polyline")
    (x0, y0), (x1, y1), (x2, y2) = (tuple(map(float, p.split(","))) for p in line.get("points").split())
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and y0 - y1 == pytest.approx(y1 - y2, abs=0.2) and y0 > y1
    points = [(float(i), float(i % 7)) for i in range(10_000)] + [(10_000.0, 500.0)]
    thin = charts.thin_out(points)
    assert len(thin) < 1000 and thin[0] == points[0] and thin[-1] == points[-1] and thin == sorted(thin)
    medians = charts.running_median([(float(i), 1e9 if i == 300 else 2.0) for i in range(600)])
    assert {y for _, y in medians} == {2.0} and medians[-1][0] == 599.0


@pytest.mark.parametrize(("low", "high"), [(0, 1), (3.2, 3.2), (0, 0), (-5, 1e6), (1e-9, 2e-9), (1, 60)])
def test_scales(low, high):
    scale = Scale.over(low, high, 10.0, 110.0)
    ticks = scale.ticks(5)
    assert 1 <= len(ticks) <= 12 and ticks == sorted(set(ticks))
    assert all(9.9 <= scale(tick) <= 110.1 for tick in [*ticks, low, high])


def test_numbers_in_words():
    assert [compact(v) for v in (0, 0.25, 1200, 12_000, 3.2e6, 0.00012)] == [
        "0",
        "0.25",
        "1,200",
        "12k",
        "3.2M",
        "1.2e-04",
    ]
    assert [duration(v) for v in (3.21, 245, 7380, math.nan)] == ["3.2 s", "4 min 5 s", "2 h 3 min", "–"]
