"""Figure 3: the kernels of the first convolution."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from dist_train.pictures.cells import Pixels
from dist_train.pictures.style import IMAGES_DPI, SMALL, TITLE
from dist_train.pictures.text import POINTS, wrap
from pipelines.misc import ceil_div

Weights = NDArray[np.float32]  # [n, 3, height, width]

# In pixels:
MARGIN, LEAST_WIDTH = 24, 720
LINE = round(1.5 * TITLE * IMAGES_DPI / POINTS)
CELL, GAP = 66, 4  # approximate side of a kernel; gap between two
CAPTION = "Each kernel is scaled on its own: zero is mid-grey, its largest absolute weight black or white"


def draw_kernels(blocks: Sequence[Weights], run: str) -> Figure:
    """Figure 3: "convolutional kernels ... learned by the first convolutional layer", those of tower 1 above those of
    tower 2.

    Args:
        blocks: the kernels of each tower.
        run: name of the run, for the title.
    """
    count = sum(len(block) for block in blocks)
    grids = [kernel_grid(block, columns=16 if count <= 256 else 32) for block in blocks]
    label = LINE if len(blocks) > 1 else 0
    width = max(LEAST_WIDTH, 2 * MARGIN + max(grid.shape[1] for grid in grids))
    _, depth, high, wide = blocks[0].shape
    title = f"{count} kernels of size {high}x{wide}x{depth} of the first convolution: {run}"
    title = wrap(title, width / IMAGES_DPI, TITLE)
    caption = wrap(CAPTION, width / IMAGES_DPI, SMALL)
    above, below = _height(title), _height(caption)
    height = above + sum(grid.shape[0] + label for grid in grids) + MARGIN // 2 * (len(grids) - 1) + below

    figure = Figure(figsize=(width / IMAGES_DPI, height / IMAGES_DPI), dpi=IMAGES_DPI)
    # parse_math: a $ in a name is a $
    figure.text(0.5, 1 - MARGIN / 2 / height, title, ha="center", va="top", fontsize=TITLE, parse_math=False)
    figure.text(0.5, MARGIN / 2 / height, caption, ha="center", va="bottom", fontsize=SMALL, parse_math=False)
    top = height - above
    for i, grid in enumerate(grids):
        left = (width - grid.shape[1]) // 2
        if label:
            figure.text(left / width, (top - LINE / 2) / height, f"tower {i + 1}", va="center", fontsize=SMALL)
        top -= label + grid.shape[0]
        figure.figimage(grid, left, top, origin="upper")  # pixel by pixel: axes would interpolate
        top -= MARGIN // 2
    return figure


def kernel_grid(weights: Weights, columns: int = 16) -> Pixels:
    """Image of the kernels side by side with white gaps, each enlarged without interpolation to about `CELL` pixels:
    uint8 [rows * (h + GAP) - GAP, columns * (w + GAP) - GAP, 3]."""
    levels = kernel_levels(weights)
    times = max(1, round(CELL / max(levels.shape[1:3])))
    levels = levels.repeat(times, 1).repeat(times, 2)
    n, height, width, _ = levels.shape
    columns = min(columns, n)
    grid = np.full((ceil_div(n, columns) * (height + GAP), columns * (width + GAP), 3), 255, np.uint8)
    for i, kernel in enumerate(levels):
        top, left = i // columns * (height + GAP), i % columns * (width + GAP)
        grid[top : top + height, left : left + width] = kernel
    return grid[:-GAP, :-GAP]


def kernel_levels(weights: Weights) -> Pixels:
    """Images of the kernels, uint8 [n, height, width, 3], each scaled on its own: level 255 (0.5 + w / (2 max |w|)), so
    a weight of 0 is mid-grey."""
    largest = np.abs(weights).max((1, 2, 3), keepdims=True)
    levels = 255 * (0.5 + weights / (2 * np.maximum(largest, np.finfo(np.float32).tiny)))
    pixels: Pixels = np.rint(levels).clip(0, 255).astype(np.uint8)
    return pixels.transpose(0, 2, 3, 1)


def _height(text: str) -> int:
    """Height in pixels of a text above or below the kernels, with its margin."""
    return LINE * (text.count("\n") + 1) + MARGIN
