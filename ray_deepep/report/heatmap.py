"""Tokens per expert over time: a row for each expert, a column for each record, as a small PNG inside SVG.

Half transparent colours over the page's own background serve light and dark alike.
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Sequence

from .markup import Markup, tag

_WIDTH, _LEFT, _RIGHT, _TOP, _BOTTOM = 460, 34, 8, 6, 34
_MAX_COLUMNS = 400
_MORE, _LESS = (226, 88, 34), (37, 99, 235)
_STEEP = 2.0
"""Twice two: four times the mean, or a quarter of it, has the full colour."""


def load_colour(ratio: float) -> tuple[int, int, int, int]:
    """RGBA of tokens over the mean: clear at 1, orange above, blue below, full at 4 and at 1/4."""
    depth = max(-1.0, min(1.0, math.log2(ratio) / _STEEP)) if ratio > 0 else -1.0
    return (*(_MORE if depth > 0 else _LESS), round(255 * abs(depth)))


def heatmap(columns: Sequence[tuple[int, Sequence[float]]], *, title: str) -> Markup:
    """``columns``: (step, tokens of each expert), by step, all of one length."""
    columns = _merge(columns, _MAX_COLUMNS)
    num_experts = len(columns[0][1])
    pixels = []
    for expert in range(num_experts):
        row = []
        for _, tokens in columns:
            mean = sum(tokens) / num_experts
            row.append(load_colour(tokens[expert] / mean if mean else 1.0))
        pixels.append(row)
    inner = min(360, max(60, 14 * num_experts))
    width, height = _WIDTH - _LEFT - _RIGHT, inner + _TOP + _BOTTOM
    frame = {"x": _LEFT, "y": _TOP, "width": width, "height": inner}
    image = tag("image", href=data_uri(png(pixels)), preserveAspectRatio="none", class_="pixels", **frame)
    labels = [
        tag("text", expert, x=_LEFT - 6, y=_TOP + (expert + 0.5) * inner / num_experts + 4, text_anchor="end")
        for expert in _some(num_experts, 8)
    ]
    for column in _some(len(columns), 5):
        x = _LEFT + (column + 0.5) * width / len(columns)
        labels.append(tag("text", columns[column][0], x=x, y=_TOP + inner + 15, text_anchor="middle"))
    labels.append(tag("text", "step", x=_LEFT + width / 2, y=height - 4, text_anchor="middle", class_="label"))
    border = tag("rect", class_="border", **frame)
    svg = tag("svg", tag("title", title), image, border, *labels, viewBox=f"0 0 {_WIDTH} {height}", role="img")
    return tag("figure", tag("figcaption", tag("b", title)), svg)


def load_legend() -> Markup:
    """What the colours mean."""
    steps = [(0.25, "¼ of the mean or less"), (0.5, "½"), (1.0, "even"), (2.0, "2×"), (4.0, "4× or more")]
    keys = []
    for ratio, name in steps:
        r, g, b, alpha = load_colour(ratio)
        colour = tag("span", class_="swatch", style=f"background:rgba({r},{g},{b},{alpha / 255:.2f})")
        keys.append(tag("span", colour, name))
    return tag("p", *keys, class_="legend")


def _some(count: int, about: int) -> list[int]:
    """At most ``about`` indices below ``count``, spread evenly from the first to the last."""
    if count <= about:
        return list(range(count))
    return sorted({round(i * (count - 1) / (about - 1)) for i in range(about)})


def _merge(columns: Sequence[tuple[int, Sequence[float]]], limit: int) -> list[tuple[int, list[float]]]:
    """At most ``limit`` columns: neighbours are added up under the first one's step."""
    size = math.ceil(len(columns) / limit)
    return [
        (part[0][0], [float(sum(values)) for values in zip(*(tokens for _, tokens in part))])
        for part in (columns[i : i + size] for i in range(0, len(columns), size))
    ]


def data_uri(image: bytes) -> str:
    """An address that holds the PNG itself."""
    return f"data:image/png;base64,{base64.b64encode(image).decode()}"


def png(pixels: Sequence[Sequence[tuple[int, int, int, int]]]) -> bytes:
    """RGBA rows as a PNG file (ISO/IEC 15948: signature, IHDR, IDAT, IEND)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", len(pixels[0]), len(pixels), 8, 6, 0, 0, 0)
    raw = b"".join(b"\0" + bytes(value for pixel in row for value in pixel) for row in pixels)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(raw)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)
