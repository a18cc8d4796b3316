"""Images with their names, in the cells of a picture."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]  # [height, width, 3]


class Named(NamedTuple):
    """An image and the name of its class."""

    image: Pixels
    name: str


def fill(cell: Axes, image: Pixels) -> None:
    """Fill a cell with an image, whole and without a frame."""
    cell.imshow(image)
    cell.set(xticks=[], yticks=[], anchor="S")  # directly above its label, whatever its shape
    cell.spines[:].set_visible(False)
