"""What the documentation names is there: settings, files, modules."""

from __future__ import annotations

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
FOLDERS = "ray_deepep|train|csrc|tests|benchmarks|examples|docs"


def settings(text: str, quote: str) -> dict[str, str]:
    """Defaults by variable, of a table that begins with both."""
    rows = re.findall(rf"^\| {quote}(RAY_DEEPEP\w*){quote} \| ([^|]+) \|", text, re.MULTILINE)
    return {name: default.strip("` ") for name, default in rows}


def test_settings_are_documented() -> None:
    source = (ROOT / "ray_deepep/env.py").read_text()
    documented = settings(source, "``")
    assert set(documented) == set(re.findall(r'_read\(\s*"(\w+)"', source))
    assert documented == settings((ROOT / "docs/training.md").read_text(), "`")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_are_there(page: pathlib.Path) -> None:
    text = page.read_text()
    named = re.findall(rf"(?<![\w/.])((?:{FOLDERS})/[\w./*-]*\w)", text)
    named += re.findall(r"\]\(([^)#:]+)\)", text)
    named += [
        f"{module.replace('.', '/')}.py" for module in re.findall(r"-m ((?:train|benchmarks|ray_deepep)[\w.]*)", text)
    ]
    missing = [name for name in named if not list(ROOT.glob(name)) and not list(page.parent.glob(name))]
    assert missing == []
