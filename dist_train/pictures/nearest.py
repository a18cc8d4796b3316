"""Figure 4, right: images and the training images that a net takes for similar."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from dist_train.pictures.cells import Named, fill
from dist_train.pictures.style import IMAGES_DPI, RED, SMALL, TITLE
from dist_train.pictures.text import fit, wrap

NAME = 76  # width in points
CELL, GAP = 1.25, 0.15  # width of a cell in inches, and of the gap beside the first column as a share of it


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
        same: whether the class is that of the test image, bool [tests, found]; other names are red.
    """
    n, k = distances.shape
    width = max(5.0, CELL * (k + 1) + 0.2)
    figure = Figure(figsize=(width, 1.55 * n + 0.9), dpi=IMAGES_DPI, layout="constrained")
    figure.suptitle(wrap(title, width, TITLE), fontsize=TITLE, parse_math=False)
    cells = figure.subplots(n, k + 2, squeeze=False, width_ratios=[1, GAP, *[1] * k])
    for i, (first, gap, *others) in enumerate(cells):
        fill(first, tests[i].image)
        name = fit(tests[i].name, NAME, SMALL, "bold")
        first.set_xlabel(name, fontsize=SMALL, fontweight="bold", parse_math=False)
        gap.set_axis_off()
        for j, cell in enumerate(others):
            fill(cell, found[i][j].image)
            text = f"{fit(found[i][j].name, NAME)}\n{distances[i, j]:.3g}"
            colour = "black" if same[i, j] else RED
            cell.set_xlabel(text, fontsize=SMALL, color=colour, parse_math=False)
    return figure
