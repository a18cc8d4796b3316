"""Bounds on settings, declared next to the fields of a dataclass and checked together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field, fields
from typing import Any


def least(minimum: float, default: Any, rule: str = "") -> Any:
    """A field whose value must be at least `minimum`. `rule` replaces the default message."""
    return _bounded(default, lambda value: value >= minimum, rule or f"it must be at least {minimum}")


def above(limit: float, default: Any, rule: str = "") -> Any:
    """A field whose value must be larger than `limit`. `rule` replaces the default message."""
    return _bounded(default, lambda value: value > limit, rule or f"it must be above {limit}")


def within(low: float, high: float, default: Any, *, closed: bool = False) -> Any:
    """A field whose value must lie in [low, high), or in [low, high] if `closed`."""
    rule = f"it must lie in [{low}, {high}{']' if closed else ')'}"
    return _bounded(default, lambda value: low <= value < high or (closed and value == high), rule)


def broken(settings: Any) -> tuple[str, str] | None:
    """First field of a dataclass that is out of bounds, and the message, `is 0: it must be ...`; None if all fit."""
    for f in fields(settings):
        value = getattr(settings, f.name)
        if f.metadata and not f.metadata["fits"](value):
            return f.name, f"is {value}: {f.metadata['rule']}"
    return None


def _bounded(default: Any, fits: Callable[[Any], bool], rule: str) -> Any:
    return field(default=default, metadata={"fits": fits, "rule": rule})
