"""What the arms of an experiment have come to: losses and errors, and what was measured layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from dist_train.pictures.style import SWEEP_DPI, plain
from pipelines.png import literal

SMOOTHED = 25  # steps of which a point of a curve is the mean
COLOURS = 10  # of the colour map; further arms have them again, in other line styles
LINES = ("-", "--", ":")
LOSS = 3.2  # nats, the top of the picture: a little more than guessing among ten classes, ln 10 = 2.3
FLOOR = 1e-12  # of a logarithm: a layer that is dead


class Curve(NamedTuple):
    """The training loss of a run, in nats, at its recorded steps."""

    steps: Sequence[int]
    losses: Sequence[float]


class Panel(NamedTuple):
    """One quantity that a probe measures in each layer: its key in the record, its title, and its scale."""

    key: str
    title: str
    logarithmic: bool


PANELS = (
    Panel("signal", "deviation of outputs over images", True),
    Panel("output", "deviation of outputs over images and units", True),
    Panel("gradient", "root mean square of the gradient to the weights", True),
    Panel("dead", "share of dead units", False),
)


class Probed(NamedTuple):
    """What was measured before a step.

    Attributes:
        layers: their names.
        values: by the key of a panel, float64 [arms, layers]; NaN if an arm has no such layer, or has diverged.
        ratios: learning rate over the largest stable one of the last layer, float64 [arms]; NaN if it is not known.
    """

    step: int
    layers: Sequence[str]
    values: Mapping[str, NDArray[np.float64]]
    ratios: NDArray[np.float64]


def draw_arms(
    curves: Mapping[str, Sequence[Curve]], errors: Mapping[str, Sequence[float]], title: str, batch: str
) -> Figure:
    """Training loss over the steps, and the validation error of each run.

    Args:
        curves: of the runs of each arm. An arm without runs of its own, which averages other runs, has none.
        errors: of the runs of each arm, as fractions of 1, in the order in which the arms are shown.
        batch: images in a step.
    """
    figure = Figure(figsize=(13, 2.2 + 0.33 * max(8, len(errors))), dpi=SWEEP_DPI, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for i, (arm, values) in enumerate(errors.items()):
        colour, line = colormaps["tab10"](i % COLOURS), LINES[i // COLOURS % len(LINES)]
        for j, curve in enumerate(curves.get(arm, ())):
            label = literal(arm) if j == 0 else None  # once in the legend
            left.plot(*_smooth(curve), line, color=colour, lw=1.3, label=label)
        right.plot([100 * value for value in values], [i] * len(values), "o", color=colour, alpha=0.75)
        if values:
            right.plot(100 * np.mean(values), i, "|", color="black", ms=16, mew=1.5)
    left.set(xlabel=f"step ({batch} images)", ylabel=f"training loss (nats, mean of {SMOOTHED} steps)", ylim=(0, LOSS))
    right.set(xlabel="top-1 validation error (%), bar: mean of the runs", ylim=(len(errors) - 0.4, -0.6))
    right.set_yticks(range(len(errors)), list(map(literal, errors)), parse_math=False)
    plain(left, right)
    legend = figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    for text in legend.get_texts():
        text.set_parse_math(False)
    figure.suptitle(literal(title), parse_math=False)
    return figure


def draw_layers(arms: Sequence[str], probes: Sequence[Probed]) -> Figure:
    """A column of panels for each probed step: what was measured layer by layer, and the learning rate over its stable
    limit, a row for each arm."""
    rows, height = len(PANELS) + 1, 0.9 + 0.24 * len(arms)
    figure = Figure(figsize=(6.2 * len(probes), rows * height), dpi=SWEEP_DPI, layout="constrained")
    axes = figure.subplots(rows, len(probes), squeeze=False)
    for j, probe in enumerate(probes):
        labels = list(map(literal, arms)) if j == 0 else []
        for cell, panel in zip(axes[:, j], PANELS, strict=False):
            _heat(cell, probe.values[panel.key], probe.layers, panel.logarithmic)
            cell.set_yticks(range(len(arms)), labels, fontsize="small", parse_math=False)
            cell.set_title(f"step {probe.step}: {panel.title}", fontsize="medium")
        ratio = axes[-1, j]
        _ratios(ratio, probe.ratios)
        ratio.set_yticks(range(len(arms)), labels, parse_math=False)
        ratio.set_title(f"step {probe.step}: lr / largest stable lr of the last layer (SGD)", fontsize="medium")
    return figure


def _smooth(curve: Curve) -> Curve:
    """Means of about `SMOOTHED` steps, each at the last of them."""
    if not curve.steps:
        return curve
    n = max(1, SMOOTHED // curve.steps[0])  # records, which are as far apart as the first is from the beginning
    steps: list[int] = []
    losses: list[float] = []
    for first in range(0, len(curve.steps), n):
        group = slice(first, first + n)
        if len(curve.steps[group]) > n // 2:  # fewer would be a noisy tail
            steps.append(curve.steps[group][-1])
            losses.append(float(np.mean(curve.losses[group])))
    return Curve(steps, losses)


def _heat(axes: Axes, values: NDArray[np.float64], layers: Sequence[str], logarithmic: bool) -> None:
    """A coloured cell with its number for each arm and layer."""
    if logarithmic:
        shown = np.log10(np.maximum(values, FLOOR))
        low, high = np.nanmin(shown), np.nanmax(shown)
    else:
        shown, low, high = values, 0, 1
    axes.imshow(shown, aspect="auto", cmap="viridis", vmin=low, vmax=high)
    for (i, j), value in np.ndenumerate(values):
        if not np.isnan(value):
            colour = "black" if shown[i, j] > (low + high) / 2 else "white"
            axes.text(j, i, f"{value:.2g}", ha="center", va="center", fontsize=6, color=colour)
    axes.set_xticks(range(len(layers)), list(layers), fontsize="small")


def _ratios(axes: Axes, ratios: NDArray[np.float64]) -> None:
    """A point for each arm, red if its learning rate is above the stable limit."""
    for i, ratio in enumerate(ratios):
        if not np.isnan(ratio):
            axes.plot(ratio, i, "o", color="crimson" if ratio > 1 else "seagreen")
    axes.set(xscale="log", ylim=(len(ratios) - 0.5, -0.5), xlim=(1e-3, 1e2))
    axes.axvline(1, color="grey", lw=1)
    plain(axes)
