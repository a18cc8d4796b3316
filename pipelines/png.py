"""Names in pictures, whatever they are, and pictures as files."""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a run draws only at its end
    from matplotlib.figure import Figure


def literal(text: str, keep: str = "") -> str:
    """A name as matplotlib shows it with `parse_math=False`: what is no character at all (a line feed, a byte that is
    not UTF-8) as an escape, unless it is in `keep`."""
    odd = (c not in keep and unicodedata.category(c) in ("Cc", "Cs") for c in text)
    return "".join(ascii(c)[1:-1] if escaped else c for c, escaped in zip(text, odd, strict=True))


@contextmanager
def boxes() -> Iterator[None]:
    """Letters that the font lacks are boxes, without a word."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")
        yield


def as_png(figure: Figure, **options: Any) -> bytes:
    """A picture as a file holds it. Drawn before the file is begun: nothing can be half written."""
    png = BytesIO()
    with boxes():
        figure.savefig(png, format="png", **options)
    return png.getvalue()
