"""Images with their names, in cells of fixed size below a title."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from dist_train.pictures.style import IMAGES_DPI, TITLE
from dist_train.pictures.text import LEADING, POINTS, wrap

Pixels = NDArray[np.uint8]  # [height, width, 3]
MARGIN = 0.2  # inches around all cells
WIDEST = 5.5  # inches that a title has at least


class Named(NamedTuple):
    """An image and the name of its class."""

    image: Pixels
    name: str


class Sheet:
    """A figure for cells of fixed size, below a title whose first line is bold. Positions are in inches from the upper
    left corner of the cells.

    Args:
        width, height: of all cells together.
    """

    def __init__(self, width: float, height: float, title: str) -> None:
        self._width = max(WIDEST, 2 * MARGIN + width)
        head, _, rest = title.partition("\n")
        head = wrap(head, self._width - 2.5 * MARGIN, TITLE + 1)
        rest = wrap(rest, self._width - 2 * MARGIN, TITLE)
        line = LEADING * (TITLE + 1) / POINTS
        above = line * (1 + head.count("\n")), line * (1 + rest.count("\n")) * bool(rest)
        self._height = height + 3 * MARGIN + sum(above)
        self._top = self._height - 2 * MARGIN - sum(above)
        self.figure = Figure(figsize=(self._width, self._height), dpi=IMAGES_DPI)
        below = self._top + MARGIN
        self._say(below + sum(above), head, TITLE + 1, "bold")
        self._say(below + above[1], rest, TITLE, "normal")

    def _say(self, height: float, text: str, size: int, weight: str) -> None:
        at = MARGIN / self._width, height / self._height
        # parse_math: a $ in a name is a $
        self.figure.text(*at, text, fontsize=size, fontweight=weight, va="top", parse_math=False)

    def cell(self, left: float, top: float, width: float, height: float) -> Axes:
        """Axes at this place."""
        bottom = self._top - top - height
        place = (MARGIN + left) / self._width, bottom / self._height, width / self._width, height / self._height
        return self.figure.add_axes(place)


def fill(cell: Axes, image: Pixels) -> None:
    """Fill a cell with an image, whole and without a frame."""
    cell.imshow(image)
    cell.set(xticks=[], yticks=[], anchor="S")  # directly above its label, whatever its shape
    cell.spines[:].set_visible(False)
