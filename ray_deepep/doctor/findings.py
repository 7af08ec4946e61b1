"""What the doctor says: one frozen finding per thing it looked at."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable


class Status(enum.StrEnum):
    """How a finding stands, from good to bad."""

    NOT_APPLICABLE = "not_applicable"
    """This machine has no such thing, or it cannot be read, and nothing follows from it."""
    OK = "ok"
    WARNING = "warning"
    """Things work, but slower or with less than the machine could give."""
    PROBLEM = "problem"
    """Something that this machine is meant to do will fail."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report."""

    name: str
    status: Status
    value: str
    """What was found, in one line."""
    advice: str = ""
    """What to do about it; empty if there is nothing to do."""


def worst(findings: Iterable[Finding]) -> Status:
    """The worst status, ``ok`` at best."""
    order = list(Status)
    return max((finding.status for finding in findings), key=order.index, default=Status.OK)


def ok(name: str, value: str, advice: str = "") -> Finding:
    """A finding that is as it should be."""
    return Finding(name=name, status=Status.OK, value=value, advice=advice)


def warning(name: str, value: str, advice: str) -> Finding:
    """A finding that costs speed or leaves a part out."""
    return Finding(name=name, status=Status.WARNING, value=value, advice=advice)


def problem(name: str, value: str, advice: str) -> Finding:
    """A finding that keeps something from working."""
    return Finding(name=name, status=Status.PROBLEM, value=value, advice=advice)


def not_applicable(name: str, value: str, advice: str = "") -> Finding:
    """A finding about something that is not here."""
    return Finding(name=name, status=Status.NOT_APPLICABLE, value=value, advice=advice)
