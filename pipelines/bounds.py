"""Bounds on settings, declared next to the fields of a dataclass and checked together."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import field, fields
from pathlib import Path
from typing import Any

from pipelines.speech import in_line

OUT_OF_REACH = 1 << 48  # of a number of steps, samples or threads
LONGEST = 200  # bytes of a name: with what is added to it, it is a file's, whose name takes 255 at most
SHOWN = 60  # characters of a name in a message


def least(minimum: float, default: Any, rule: str = "") -> Any:
    """A field whose value must be at least `minimum`. `rule` replaces the default message."""
    return _bounded(default, lambda value: value >= minimum, rule or f"it must be at least {minimum}", unlimited=True)


def above(limit: float, default: Any, rule: str = "") -> Any:
    """A field whose value must be larger than `limit`. `rule` replaces the default message."""
    return _bounded(default, lambda value: value > limit, rule or f"it must be above {limit}")


def within(low: float, high: float, default: Any, *, closed: bool = False) -> Any:
    """A field whose value must lie in [low, high), or in [low, high] if `closed`."""
    rule = f"it must lie in [{low}, {high}{']' if closed else ')'}"
    return _bounded(default, lambda value: low <= value < high or (closed and value == high), rule)


def folder_name(default: str) -> Any:
    """A field for a name, or several with slashes, of a folder that is made below another one."""
    rule = f"it must name a folder, without .., control characters, or more than {LONGEST} bytes"
    return _bounded(default, _names, rule)


def folder_path(default: str) -> Any:
    """A field for the path of a folder, which has a name of its own."""
    rule = f"it must end with the name of a folder, without control characters or more than {LONGEST} bytes"

    def fits(text: str) -> bool:
        path = Path(os.path.abspath(text))
        return not text or (bool(path.name) and _names(path.name) and max(map(len, map(os.fsencode, path.parts))) < 256)

    return _bounded(default, fits, rule)


def _names(text: str) -> bool:
    short = len(text.encode(errors="surrogateescape")) <= LONGEST
    return not text or (bool(Path(text).name) and ".." not in Path(text).parts and short and in_line(text) == text)


def broken(settings: Any) -> tuple[str, str] | None:
    """First field of a dataclass that is out of bounds, and the message, `is 0: it must be ...`; None if all fit."""
    for f in fields(settings):
        value = getattr(settings, f.name)
        if isinstance(value, str) and "\0" in value:
            return f.name, f"is {in_line(value)}: it must not hold a NUL"
        if f.metadata and not f.metadata["fits"](value):
            shown = in_line(value[:SHOWN]) if isinstance(value, str) else value
            return f.name, f"is {shown}: {f.metadata['rule']}"
        if isinstance(value, int) and f.metadata.get("unlimited") and value >= OUT_OF_REACH:
            return f.name, "has more digits than this setting can have"
    return None


def _bounded(default: Any, fits: Callable[[Any], bool], rule: str, *, unlimited: bool = False) -> Any:
    return field(default=default, metadata={"fits": fits, "rule": rule, "unlimited": unlimited})
