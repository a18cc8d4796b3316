"""The look that all pictures share: resolutions, font sizes, colours, axes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a run draws only at its end: matplotlib is imported by what draws
    from matplotlib.axes import Axes

CURVES_DPI = 100
SWEEP_DPI = 110
IMAGES_DPI = 96  # pictures that show images, whose sizes are counted in pixels

SMALL, TITLE = 8, 10  # font sizes in points
PINK, BLUE, RED = "#f5a9bc", "#b5cdea", "#c8102e"  # the correct class; the others; a wrong one


def plain(*many: Axes) -> None:
    """Give these axes a faint grid and no frame at the top and the right."""
    for axes in many:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
