"""Text that fits its place in a picture."""

from __future__ import annotations

import textwrap

from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path

from dist_train.pictures.style import SMALL
from pipelines.png import boxes, literal

POINTS = 72  # an inch
LETTER = 0.56  # width of an average letter, as a share of the font size


def fit(text: str, points: float, size: int = SMALL, weight: str = "normal") -> str:
    """The text, or as much of its beginning as is this wide, with an ellipsis."""
    font = FontProperties(size=size, weight=weight)
    kept = text = literal(text)
    with boxes():
        while text and text_to_path.get_text_width_height_descent(kept, font, ismath=False)[0] > points:
            text = text[:-1]
            kept = text.rstrip(" ,") + "…"
    return kept


def wrap(text: str, inches: float, size: int) -> str:
    """The text in lines that fit a figure of this width at this font size in points."""
    characters = int(inches * POINTS / (LETTER * size))
    wrapped: list[str] = []
    for line in literal(text, keep="\n").split("\n"):
        wrapped += textwrap.wrap(line, characters, break_on_hyphens=False)
    return "\n".join(wrapped)
