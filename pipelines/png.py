"""Arbitrary names as text in figures, and figures as PNG."""

from __future__ import annotations

import re
import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a run draws only at its end, so it need not import matplotlib before
    from matplotlib.figure import Figure


def literal(text: str, keep: str = "") -> str:
    """A name to be drawn by matplotlib with `parse_math=False`: unprintable characters (a line feed, a byte that is not
    UTF-8) are escaped unless they are in `keep`."""
    odd = (c not in keep and unicodedata.category(c) in ("Cc", "Cs") for c in text)
    return "".join(ascii(c)[1:-1] if escaped else c for c, escaped in zip(text, odd, strict=True))


@contextmanager
def boxes() -> Iterator[None]:
    """Draws characters missing from the font as boxes, without a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")
        yield


def width(text: str, size: float, weight: str = "normal") -> float:
    """Width of one line of text at this font size, both in points."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(size=size, weight=weight)
    with boxes():
        return float(text_to_path.get_text_width_height_descent(text, font, ismath=False)[0])


def fit(text: str, points: float, size: float, weight: str = "normal") -> str:
    """The text, cut to this width with an ellipsis if it is wider. A class of ImageNet has room for its words alone,
    without the WordNet id before them."""
    kept = text = re.sub(r"^n\d{8} (?=\S)", "", literal(text))
    while text and width(kept, size, weight) > points:
        text = text[:-1]
        kept = text.rstrip(" ,") + "…"
    return kept


def as_png(figure: Figure, **options: Any) -> bytes:
    """PNG bytes of a figure. It is drawn before a file is opened, so no file can be left half written."""
    png = BytesIO()
    with boxes():
        figure.savefig(png, format="png", **options)
    return png.getvalue()
