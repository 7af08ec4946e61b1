"""Checks of the fields of frozen settings: typed errors that name the field, its value and the rule."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection
from typing import TypeVar

from .errors import InvalidArgumentError, InvalidTypeError

C = TypeVar("C", bound=type)


def known_fields(cls: C) -> C:
    """Class decorator: a keyword that is no field of the dataclass is an ``InvalidTypeError`` that lists its fields."""
    init, names = cls.__init__, tuple(field.name for field in dataclasses.fields(cls) if field.init)

    @functools.wraps(init)
    def checked(self, *args: object, **values: object) -> None:
        for name, value in values.items():
            if name not in names:
                raise InvalidTypeError(name, value, f"{cls.__name__} has no such field, only {', '.join(names)}")
        init(self, *args, **values)

    cls.__init__ = checked
    return cls


def check_int(name: str, value: object, *, least: int, most: int | None = None) -> None:
    """An ``int``, no ``bool``, of at least ``least``."""
    if type(value) is not int:
        raise InvalidTypeError(name, value, "must be an int")
    if value < least:
        raise InvalidArgumentError(name, value, f"must be >= {least}")
    if most is not None and value > most:
        raise InvalidArgumentError(name, value, f"must be at most {most}")


def check_number(name: str, value: object) -> None:
    """An ``int`` or ``float``, no ``bool``."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidTypeError(name, value, "must be a number")


def check_positive(name: str, value: object) -> None:
    """A number above 0, and not NaN."""
    check_number(name, value)
    if not value > 0:
        raise InvalidArgumentError(name, value, "must be > 0")


def check_duration(name: str, value: object) -> None:
    """A number of seconds that is not negative, and not NaN."""
    check_number(name, value)
    if not value >= 0:
        raise InvalidArgumentError(name, value, "must be >= 0")


def check_bool(name: str, value: object) -> None:
    """``True`` or ``False``."""
    if not isinstance(value, bool):
        raise InvalidTypeError(name, value, "must be a bool")


def check_str(name: str, value: object) -> None:
    """Text."""
    if not isinstance(value, str):
        raise InvalidTypeError(name, value, "must be a str")


def check_choice(name: str, value: object, allowed: Collection[str]) -> None:
    """One of some words."""
    check_str(name, value)
    if value not in allowed:
        raise InvalidArgumentError(name, value, f"must be one of {', '.join(allowed)}")
