"""The colour share of the first convolution's kernels, for what the paper says of figure 3 (section 6.1).

"The kernels on GPU 1 are largely color-agnostic, while the kernels on on GPU 2 are largely color-specific."
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dist_train.pictures.kernels import Weights

NOISE = 2 / 3  # expected share of white noise

Shares = dict[str, float]  # of one tower's kernels: mean, least, median, most


def colour_shares(kernels: Weights) -> NDArray[np.float64]:
    """Share of each kernel's energy that is colour, float64 [n], from 0 to 1.

    The three weights w of a position are split into their part along the grey axis (1, 1, 1) / sqrt(3), which answers
    to brightness, and the rest, which a grey image does not excite. The share is the squared length of the rest, summed
    over positions, over that of w.

    It is 0 for a grey kernel, whose channels are equal; 1 where the three weights of each position add up to 0, as in
    red against green; 2/3 for a kernel of a single channel. It is 2/3 for white noise as well, by expectation, of which
    two dimensions of three are colour: there kernels begin, and those that have learned little stay. A kernel of zeros
    has 0.

    Args:
        kernels: [n, 3, height, width].
    """
    weights = kernels.astype(np.float64)
    energy = np.square(weights).sum((1, 2, 3))
    colour = np.square(weights - weights.mean(1, keepdims=True)).sum((1, 2, 3))
    share: NDArray[np.float64] = colour / np.where(energy == 0, 1, energy)
    return share


def summarised(blocks: Sequence[Weights]) -> list[Shares]:
    """Mean, least, median and most of the shares of each tower's kernels."""
    found = [colour_shares(block) for block in blocks]
    return [
        {"mean": float(s.mean()), "least": float(s.min()), "median": float(np.median(s)), "most": float(s.max())}
        for s in found
    ]


def colour_told(towers: Sequence[Shares]) -> list[str]:
    """The shares in words, a line for each tower and one to judge them by."""
    names = [f"tower {i + 1}" for i in range(len(towers))] if len(towers) > 1 else ["all kernels"]
    lines = [
        f"{name}: {s['mean']:.1%} on average; kernels from {s['least']:.1%} to {s['most']:.1%}, "
        f"median {s['median']:.1%}"
        for name, s in zip(names, towers, strict=True)
    ]
    return [*lines, f"to compare: white noise, as before training, {NOISE:.1%}; a grey kernel, 0%"]
