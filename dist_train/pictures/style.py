"""The look that all pictures share: resolutions, font sizes, colours, axes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a run draws only at its end: matplotlib is imported by what draws
    from matplotlib.axes import Axes

CURVES_DPI = 100
SWEEP_DPI = 110
IMAGES_DPI = 96  # pictures that show images, whose sizes are counted in pixels

SMALL, TITLE = 8, 10  # font sizes in points
# Okabe and Ito's, which a colour-blind reader tells apart, each dark enough for text on white. What must be understood
# stands in a word, a mark or a line style too.
COLOURS = ("#0072b2", "#d55e00", "#007a58", "#a6508a")
GREY = "#8a8a8a"  # what is there to compare with
ORANGE, BLUE, TRACK = "#f0953f", "#9fbcd9", "#eeeeee"  # bars: the correct class; another one; up to 100 %
RED = "#b3261e"  # text and frame of what is wrong, which has a cross or a dashed frame too
TICK, CROSS = "✓", "✗"  # in the font that matplotlib brings


def plain(*many: Axes) -> None:
    """Give these axes a faint grid and no frame at the top and the right."""
    for axes in many:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
