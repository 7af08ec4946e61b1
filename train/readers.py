"""Documents out of files and folders: text, JSON lines, parquet, or the standard library's own Python sources."""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from train.errors import DataError

# Installed packages and tests vary between machines; encodings and pydoc_data are tables rather than code.
_LIBRARY_SKIP = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings", "pydoc_data"}
)


def find_files(paths: tuple[str, ...]) -> list[Path]:
    """The files behind `paths`: folders are walked, hidden names and `__pycache__` left out, order is fixed.

    Without paths, the standard library's `.py` files, ordered by the hash of their names so that a size cap still
    leaves a mix of subjects. Raises DataError for a missing path or a folder without files.
    """
    if not paths:
        return _library_files()
    files: list[Path] = []
    for name in paths:
        path = Path(name)
        if path.is_file():
            files.append(path)
        elif path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.is_file() and not _hidden(p.relative_to(path)))
            if not found:
                raise DataError(name, "the folder holds no files", "Put .txt, .jsonl or .parquet files in it")
            files += found
        else:
            raise DataError(name, "no such file or folder", "Check the path given to --data")
    return files


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in path.parts)


def _library_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    kept: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        # Not even looked into: installed packages are below, tens of thousands of files.
        subfolders[:] = [name for name in subfolders if name not in _LIBRARY_SKIP]
        kept += [Path(folder, name).relative_to(root) for name in names if name.endswith(".py")]
    if not kept:
        raise DataError(str(root), "the standard library's sources are not here", "Pass your own text with --data")
    kept.sort(key=lambda name: hashlib.sha256(name.as_posix().encode()).digest())
    return [root / name for name in kept]


def read_documents(paths: tuple[str, ...], *, max_bytes: int = 0, progress: bool = False) -> Iterator[str]:
    """Yield the documents of `paths` in a fixed order, stopping after about `max_bytes` bytes of UTF-8 (0: never).

    A document longer than what is left is cut. Raises DataError naming the file that cannot be used.
    """
    files = find_files(paths)
    left = max_bytes or None
    for path in tqdm(files, desc="reading", unit="file", disable=not progress or len(files) < 10, leave=False):
        for document in _read_file(path, skip_undecodable=not paths):
            if left is None:
                yield document
                continue
            raw = document.encode("utf-8")
            yield document if len(raw) <= left else raw[:left].decode("utf-8", errors="ignore")
            left -= len(raw)
            if left <= 0:
                return


def _read_file(path: Path, *, skip_undecodable: bool) -> Iterator[str]:
    try:
        if path.suffix == ".jsonl":
            yield from _read_jsonl(path)
        elif path.suffix == ".parquet":
            yield from _read_parquet(path)
        else:
            yield _read_text(path)
    except DataError:
        # A few library sources declare another encoding; nobody chose those files, so they are left out.
        if not skip_undecodable:
            raise


def _read_text(path: Path) -> str:
    raw = _read_bytes(path)
    remedy = "Remove the file, convert it to UTF-8, or name the text files one by one"
    if b"\0" in raw:
        raise DataError(str(path), f"is not text: NUL byte at offset {raw.index(0)}", remedy)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(str(path), f"is not UTF-8 text: byte at offset {error.start}", remedy) from None


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(str(path), f"cannot be read ({error.strerror})", "Check its permissions") from error


def _read_jsonl(path: Path) -> Iterator[str]:
    remedy = 'Each line must be a JSON object such as {"text": "..."}'
    for number, line in enumerate(_read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(str(path), f"line {number} is not JSON ({error.msg})", remedy) from None
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise DataError(str(path), f"line {number} has no string field `text`", remedy)
        yield text


def _read_parquet(path: Path) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
        if "text" not in table.schema_arrow.names:
            found = ", ".join(table.schema_arrow.names)
            raise DataError(
                str(path), f"has no column `text` (found: {found})", "Rename the column that holds the text"
            )
        for batch in table.iter_batches(columns=["text"]):
            for row, text in enumerate(batch.column(0).to_pylist()):
                if not isinstance(text, str):
                    raise DataError(str(path), f"row {row} of column `text` is not a string", "Drop such rows")
                yield text
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(str(path), f"is no readable parquet file ({error})", "Write it again") from error
