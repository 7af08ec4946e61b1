"""Plain values into config dataclasses: JSON objects, and strings from a command line, checked field by field."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

from train.errors import ConfigError


def require(ok: bool, name: str, value: object, rule: str) -> None:
    """Raise ConfigError for field `name` unless `ok`."""
    if not ok:
        raise ConfigError(name, value, rule)


def check_types(section: object, prefix: str) -> None:
    """Raise ConfigError unless every field has its annotated type; an int will do for a float, a bool for neither."""
    for name, kind in typing.get_type_hints(type(section)).items():
        value, wanted = getattr(section, name), typing.get_origin(kind) or kind
        fits = isinstance(value, (int, float) if wanted is float else wanted)
        fits = fits and (wanted is bool or not isinstance(value, bool))
        require(fits, f"{prefix}{name}", value, f"must be of type {wanted.__name__}")


def set_dotted(raw: dict[str, Any], name: str, value: Any) -> None:
    """Put `value` at `section.field` (or `field`) of a nested dict that has that field already."""
    section_name, _, key = name.rpartition(".")
    section = raw.get(section_name) if section_name else raw
    require(isinstance(section, dict) and key in section, name, value, "no such field")
    section[key] = value


def build_dataclass(cls: type, raw: Any, prefix: str = "") -> Any:
    """A dataclass of type `cls`, nested ones included, from a dict; `prefix` goes before field names in errors."""
    require(isinstance(raw, dict), prefix.rstrip(".") or "config", raw, "must be a JSON object")
    types = typing.get_type_hints(cls)
    for key in raw:
        require(key in types, f"{prefix}{key}", raw[key], "no such field")
    return cls(**{key: _convert(types[key], value, f"{prefix}{key}") for key, value in raw.items()})


def _convert(kind: Any, value: Any, name: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return build_dataclass(kind, value, f"{name}.")
    if typing.get_origin(kind) is tuple:
        items = [value] if isinstance(value, str) else value
        require(isinstance(items, (list, tuple)), name, value, "must be a list of strings")
        return tuple(str(item) for item in items)
    if kind is bool:
        words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        found = value if isinstance(value, bool) else words.get(str(value).lower())
        require(found is not None, name, value, "must be true or false")
        return found
    if kind is str:
        require(isinstance(value, str), name, value, "must be a string")
        return value
    try:
        if isinstance(value, bool) or (kind is int and isinstance(value, float) and not value.is_integer()):
            raise ValueError
        return kind(value)
    except (TypeError, ValueError):
        raise ConfigError(name, value, f"must be of type {kind.__name__}") from None
