"""Text that fits its place in a picture."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from pipelines.png import literal

POINTS = 72  # per inch
LETTER = 0.56  # width of an average letter, as a share of the font size
LEADING = 1.25  # from one line of a text to the next, likewise


def wrap(text: str, inches: float, size: int) -> str:
    """The text in lines that fit a figure of this width at this font size in points."""
    characters = int(inches * POINTS / (LETTER * size))
    wrapped: list[str] = []
    for line in literal(text, keep="\n").split("\n"):
        wrapped += textwrap.wrap(line, characters, break_on_hyphens=False)
    return "\n".join(wrapped)


def spread(centres: Sequence[float], sizes: Sequence[float], high: float) -> list[float]:
    """Centres of labels of these sizes, moved apart as little as keeps them from overlapping, between 0 and `high` as
    far as there is room. Labels at one height are stacked in the order given, the first on top."""
    order = sorted(range(len(centres)), key=lambda i: (centres[i], -i))
    found = list(centres)
    floor = 0.0
    for i in order:
        found[i] = max(centres[i], floor + sizes[i] / 2)
        floor = found[i] + sizes[i] / 2
    for i in reversed(order):
        found[i] = min(found[i], high - sizes[i] / 2)
        high = found[i] - sizes[i] / 2
    return found
