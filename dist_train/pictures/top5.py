"""Figure 4, left: images and their most probable classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from dist_train.pictures.cells import Named, fill
from dist_train.pictures.style import BLUE, IMAGES_DPI, PINK, SMALL, TITLE
from dist_train.pictures.text import fit, wrap
from pipelines.misc import ceil_div

COLUMNS = 4
BARS = 5
IMAGE, BAR = 2.0, 0.2  # heights in inches
NAME_BELOW, NAME_IN_BAR = 148, 116  # widths in points


def draw_top5(
    images: Sequence[Named],
    labels: Sequence[int],
    probabilities: NDArray[np.float32],
    outputs: Sequence[str],
    title: str,
) -> Figure:
    """Figure 4, left: images "and the five labels considered most probable by our model. The correct label is written
    under each image, and the probability assigned to the correct label is also shown with a red bar (if it happens to
    be in the top 5)".

    Args:
        labels: the output of the net that is right, for each image.
        probabilities: float32 [images, outputs].
        outputs: their names.
    """
    n = len(images)
    columns = min(COLUMNS, n)
    rows = ceil_div(n, columns)
    bars = min(BARS, len(outputs))
    width = max(5.0, 2.2 * columns)
    figure = Figure(figsize=(width, (IMAGE + BAR * bars + 0.35) * rows + 0.8), dpi=IMAGES_DPI)
    figure.set_layout_engine("constrained", h_pad=0.07)
    figure.suptitle(wrap(title, width, TITLE), fontsize=TITLE, parse_math=False)
    cells = figure.subplots(2 * rows, columns, squeeze=False, height_ratios=[IMAGE, BAR * bars] * rows)
    for i, (above, below) in enumerate(zip(cells[::2].flat, cells[1::2].flat, strict=True)):
        if i >= n:
            above.set_axis_off()
            below.set_axis_off()
            continue
        fill(above, images[i].image)
        name = fit(images[i].name, NAME_BELOW, SMALL + 1, "bold")
        above.set_xlabel(name, fontsize=SMALL + 1, fontweight="bold", parse_math=False)
        _bars(below, probabilities[i], labels[i], outputs, bars)
    return figure


def _bars(cell: Axes, probabilities: NDArray[np.float32], label: int, outputs: Sequence[str], bars: int) -> None:
    """The most probable outputs, the first at the top, with their names and probabilities."""
    top = np.argsort(-probabilities, kind="stable")[:bars]
    cell.barh(range(bars), probabilities[top], 0.85, color=[PINK if output == label else BLUE for output in top])
    text: dict[str, Any] = {"va": "center_baseline", "fontsize": SMALL, "parse_math": False}
    for row, output in enumerate(top):
        cell.text(0.02, row, fit(outputs[output], NAME_IN_BAR), **text)
        cell.text(0.99, row, f"{probabilities[output]:.0%}", ha="right", **text)
    cell.set(xlim=(0, 1), ylim=(bars - 0.5, -0.5), xticks=[], yticks=[])
    cell.spines[:].set_color("#bbbbbb")
