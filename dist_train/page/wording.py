"""Numbers, times and strangers' text as the page writes them."""

from __future__ import annotations

import math
import time

from pipelines.speech import in_line

MINUTE, HOUR, DAY = 60, 3600, 86400
LONGEST = 300  # characters of a stranger's text in one place


def spoken(seconds: float) -> str:
    """A duration in its two largest units: `2 h 10 min`."""
    if seconds < 9.95:
        return f"{max(0.0, seconds):.1f} s"
    whole = round(seconds)
    for unit, name, lower, below in ((DAY, "d", HOUR, "h"), (HOUR, "h", MINUTE, "min"), (MINUTE, "min", 1, "s")):
        if whole >= 10 * unit:
            return f"{round(whole / unit)} {name}"
        if whole >= unit:
            rest = whole % unit // lower
            return f"{whole // unit} {name}" + (f" {rest} {below}" if rest else "")
    return f"{whole} s"


def percent(fraction: float | None, digits: int = 1) -> str:
    """`38.1 %`; a dash if it is not known."""
    return "–" if fraction is None or not math.isfinite(fraction) else f"{100 * fraction:.{digits}f} %"


def whole(number: float | None) -> str:
    """A count: `1,281,167`."""
    return "–" if number is None or not math.isfinite(number) else f"{round(number):,}"


def moment(when: float | None) -> str:
    """A Unix time in this machine's zone: `2026-11-27 19:36`."""
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(when)) if when is not None else "–"
    except (OverflowError, ValueError, OSError):
        return "–"


def plainly(value: object) -> str:
    """A stranger's text in one line, cut if it is long; what would turn or hide other text is escaped."""
    text = str(value)
    return in_line(text if len(text) <= LONGEST else text[: LONGEST - 1] + "…")
