"""Figure 4, left: images and their most probable classes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from dist_train.pictures.cells import Named, Sheet, fill
from dist_train.pictures.style import BLUE, CROSS, ORANGE, RED, SMALL, TICK, TRACK
from dist_train.pictures.text import POINTS
from pipelines.misc import ceil_div
from pipelines.png import fit

COLUMNS = 6
BARS = 5
# In inches:
CELL, IMAGE, CAPTION, ROW = 1.75, 1.6, 0.45, 0.235  # width of a cell; heights of image, caption, and name with bar
GAP, BELOW = 0.2, 0.3  # between two cells, and two rows of them
PERCENT = 32  # points for a probability


def draw_top5(
    images: Sequence[Named],
    labels: Sequence[int],
    probabilities: NDArray[np.float32],
    outputs: Sequence[str],
    title: str,
) -> Figure:
    """Figure 4, left: images "and the five labels considered most probable by our model. The correct label is written
    under each image, and the probability assigned to the correct label is also shown with a red bar (if it happens to
    be in the top 5)". Here the bars are thin, below their names, the correct one orange and its name bold; under each
    image stands whether the most probable class is the correct one.

    Args:
        labels: the output of the net that is right, for each image.
        probabilities: float32 [images, outputs].
        outputs: their names.
    """
    n, bars = len(images), min(BARS, len(outputs))
    columns = n if n < 4 else min(COLUMNS, ceil_div(n, 2))  # right ones above wrong ones
    block = IMAGE + CAPTION + ROW * bars
    sheet = Sheet(columns * (CELL + GAP) - GAP, ceil_div(n, columns) * (block + BELOW) - BELOW, title)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        left, top = i % columns * (CELL + GAP), i // columns * (block + BELOW)
        above = sheet.cell(left, top, CELL, IMAGE)
        fill(above, image.image)
        name = fit(image.name, CELL * POINTS, SMALL + 1, "bold")
        above.set_xlabel(name, fontsize=SMALL + 1, fontweight="bold", labelpad=3, parse_math=False)
        first = int(probabilities[i].argmax())
        said = f"{TICK} right" if first == label else fit(f"{CROSS} taken for {outputs[first]}", CELL * POINTS, SMALL)
        colour = "black" if first == label else RED
        below = sheet.cell(left, top + block - ROW * bars, CELL, ROW * bars)
        below.set_title(said, fontsize=SMALL, color=colour, pad=5, parse_math=False)
        _bars(below, probabilities[i], label, outputs, bars)
    return sheet.figure


def _bars(cell: Axes, probabilities: NDArray[np.float32], label: int, outputs: Sequence[str], bars: int) -> None:
    """The most probable outputs, the first at the top: names and probabilities, each above its bar."""
    top = np.argsort(-probabilities, kind="stable")[:bars]
    rows = np.arange(bars) + 0.82
    cell.barh(rows, 1, 0.16, color=TRACK, label="track")
    cell.barh(rows, probabilities[top], 0.16, color=[ORANGE if output == label else BLUE for output in top])
    for row, output in enumerate(top):
        weight = "bold" if output == label else "normal"
        name = fit(outputs[output], CELL * POINTS - PERCENT, SMALL, weight)
        percent = f"{100 * probabilities[output]:.0f} %"
        for at, side, text in ((0.0, "left", name), (1.0, "right", percent)):
            cell.text(at, row + 0.66, text, ha=side, fontsize=SMALL, fontweight=weight, parse_math=False)
    cell.set(xlim=(0, 1), ylim=(bars, 0), xticks=[], yticks=[])
    cell.spines[:].set_visible(False)
