"""Names in pictures, and pictures in files, whatever the names are and whatever the disk does."""

from __future__ import annotations

import unicodedata
import warnings
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.files import write_atomically

if TYPE_CHECKING:  # a run draws only at its end
    from matplotlib.figure import Figure


def literal(text: str, keep: str = "") -> str:
    """A name as matplotlib shows it with `parse_math=False`: what is no character at all (a line feed, a byte that is
    not UTF-8) as an escape, unless it is in `keep`."""
    odd = (c not in keep and unicodedata.category(c) in ("Cc", "Cs") for c in text)
    return "".join(ascii(c)[1:-1] if escaped else c for c, escaped in zip(text, odd, strict=True))


def save_figure(figure: Figure, path: Path, **options: Any) -> None:
    """Write it as a PNG, whole or not at all. A letter that the font lacks is a box, without a word. Raises OSError."""
    png = BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")
        figure.savefig(png, format="png", **options)
    write_atomically(path, png.getvalue())
