"""Figure 4, right: images and the training images that a net takes for similar."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from dist_train.pictures.cells import Named, Sheet, fill
from dist_train.pictures.style import CROSS, RED, SMALL
from dist_train.pictures.text import POINTS
from pipelines.png import fit

DIGITS, DECIMALS = 3, 6  # digits of the greatest distance; the most decimals
# In inches:
CELL, NAMES = 1.15, 0.38  # side of an image; height of its name and distance
GAP, ASIDE = 0.12, 0.2  # between two cells; more beside the first column


def draw_nearest(
    tests: Sequence[Named],
    found: Sequence[Sequence[Named]],
    distances: NDArray[np.float32],
    same: NDArray[np.bool_],
    title: str,
) -> Figure:
    """Figure 4, right: test images "in the first column. The remaining columns show the ... training images that
    produce feature vectors in the last hidden layer with the smallest Euclidean distance".

    Args:
        found: the training images beside each test image, nearest first.
        distances: float32 [tests, found].
        same: whether the class is that of the test image, bool [tests, found]; others have a cross and a dashed frame.
    """
    n, k = distances.shape
    row = CELL + NAMES + GAP
    sheet = Sheet((k + 1) * (CELL + GAP) - GAP + ASIDE, n * row - GAP, title)
    decimals = _decimals(float(distances.max(initial=0)))
    for i in range(n):
        for j, image in enumerate((tests[i], *found[i])):
            cell = sheet.cell(j * (CELL + GAP) + ASIDE * (j > 0), i * row, CELL, CELL)
            fill(cell, image.image)
            weight, colour, mark, below = "bold", "black", "", ""
            if j:
                weight, below = "normal", f"\n{distances[i, j - 1]:.{decimals}f}"
                if not same[i, j - 1]:
                    colour, mark = RED, f"{CROSS} "
                    cell.spines[:].set(visible=True, color=RED, linewidth=2, linestyle=(0, (3, 2)))
            name = fit(mark + image.name, CELL * POINTS, SMALL, weight)
            cell.set_xlabel(name + below, fontsize=SMALL, fontweight=weight, color=colour, labelpad=4, parse_math=False)
    return sheet.figure


def _decimals(greatest: float) -> int:
    """Decimals of all distances, of which the greatest shows `DIGITS` digits."""
    if not 0 < greatest < math.inf:
        return DIGITS - 1
    return min(DECIMALS, max(0, DIGITS - 1 - math.floor(math.log10(greatest))))
