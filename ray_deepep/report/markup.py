"""HTML and SVG from function calls. Text is escaped where it enters, so no caller can forget it."""

from __future__ import annotations

import html
import re

_VOID = {"meta", "br"}
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class Markup(str):
    """Text that is HTML already."""


def text(content: object) -> Markup:
    """``content`` as HTML text; characters that XML forbids become U+FFFD."""
    if isinstance(content, Markup):
        return content
    return Markup(html.escape(_NOT_XML.sub("\ufffd", str(content))))


def join(*parts: object) -> Markup:
    """The parts one after the other, escaped where they are no markup yet."""
    return Markup("".join(text(part) for part in parts))


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """An element. Attributes: ``class_`` is ``class``, ``stroke_width`` is ``stroke-width``; None leaves one out.

    Floats, which are coordinates, get two digits after the point at most.
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{text(_value(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{given}>" + ("" if name in _VOID else f"{join(*children)}</{name}>"))


def _value(value: object) -> object:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value
