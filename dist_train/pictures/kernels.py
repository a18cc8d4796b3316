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


def draw_kernels(blocks: Sequence[Weights], run: str, told: Sequence[str]) -> Figure:
    """Figure 3: "convolutional kernels ... learned by the first convolutional layer", those of tower 1 above those of
    tower 2.

    Args:
        blocks: the kernels of each tower.
        run: name of the run, for the title.
        told: lines to stand below them.
    """
    largest = max(float(np.abs(block).max()) for block in blocks)
    count = sum(len(block) for block in blocks)
    grids = [kernel_grid(block, largest, columns=16 if count <= 256 else 32) for block in blocks]
    label = LINE if len(blocks) > 1 else 0
    width = max(LEAST_WIDTH, 2 * MARGIN + max(grid.shape[1] for grid in grids))
    _, depth, high, wide = blocks[0].shape
    title = f"{count} kernels of size {high}x{wide}x{depth} of the first convolution: {run}"
    title = wrap(title, width / IMAGES_DPI, TITLE)
    scale = f"One scale for all kernels: zero is mid-grey, the largest absolute weight, {largest:.2g}, black or white"
    caption = "\n".join(wrap(line, width / IMAGES_DPI, SMALL) for line in (scale, *told))
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


def kernel_grid(weights: Weights, largest: float, columns: int = 16) -> Pixels:
    """Image of the kernels side by side with white gaps, each enlarged without interpolation to about `CELL` pixels:
    uint8 [rows * (h + GAP) - GAP, columns * (w + GAP) - GAP, 3]."""
    levels = kernel_levels(weights, largest)
    times = max(1, round(CELL / max(levels.shape[1:3])))
    levels = levels.repeat(times, 1).repeat(times, 2)
    n, height, width, _ = levels.shape
    columns = min(columns, n)
    grid = np.full((ceil_div(n, columns) * (height + GAP), columns * (width + GAP), 3), 255, np.uint8)
    for i, kernel in enumerate(levels):
        top, left = i // columns * (height + GAP), i % columns * (width + GAP)
        grid[top : top + height, left : left + width] = kernel
    return grid[:-GAP, :-GAP]


def kernel_levels(weights: Weights, largest: float) -> Pixels:
    """Images of the kernels, uint8 [n, height, width, 3]: level 255 (0.5 + w / (2 largest)), so a weight of 0 is
    mid-grey.

    All kernels have one scale, so that one which has hardly learned looks it: on a scale of its own it would be noise
    of full contrast. The paper does not say how figure 3 is scaled; the copies of its author's cuda-convnet that
    we have seen stretch the range of all kernels together (`shownet.py`).
    """
    levels = 255 * (0.5 + weights / (2 * (largest or 1.0)))
    pixels: Pixels = np.rint(levels).clip(0, 255).astype(np.uint8)
    return pixels.transpose(0, 2, 3, 1)


def _height(text: str) -> int:
    """Height in pixels of a text above or below the kernels, with its margin."""
    return LINE * (text.count("\n") + 1) + MARGIN
