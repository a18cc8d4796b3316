"""Pictures of an experiment: losses and errors of its arms, and what was measured layer by layer.

The first arms of a sweep are shown in colour, each with a marker of its own; all others, for comparison, in grey.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from dist_train.pictures.style import COLOURS, GREY, RED, SWEEP_DPI, plain
from dist_train.pictures.text import wrap
from pipelines.png import fit

SMOOTHED = 25  # steps per point of a curve, which is their mean
MARKERS = ("o", "s", "^", "D")  # of the arms in colour
LOSS = 3.2  # nats, the top of the picture: a little more than guessing among ten classes, ln 10 = 2.3
ROOM = 0.05  # of an axis, beside the outermost values
NAME = 260  # width in points
LABEL, HEAD = 9, 12  # font sizes in points
LEAST, LARGEST = 1e-3, 30.0  # of an lr over its stable limit that is shown where it is


class Curve(NamedTuple):
    """The training loss of a run, in nats, at its recorded steps."""

    steps: Sequence[int]
    losses: Sequence[float]


class Epochs(NamedTuple):
    """The epochs of a run: steps done at their ends, errors of training and of validation after them as fractions of 1,
    and learning rates."""

    steps: Sequence[int]
    training: Sequence[float]
    validation: Sequence[float]
    rates: Sequence[float]


class Panel(NamedTuple):
    """One quantity that a probe measures in each layer: its key in the record, its title, and its scale."""

    key: str
    title: str
    logarithmic: bool


# By picture: its name, and its rows.
PANELS = {
    "outputs": (
        Panel("signal", "deviation over images", True),
        Panel("output", "deviation over images and units", True),
    ),
    "gradients": (
        Panel("gradient", "root mean square of the gradient", True),
        Panel("dead", "share of dead units", False),
    ),
}
TITLES = {
    "outputs": "how much the outputs of each layer differ",
    "gradients": "gradients to the weights of each layer, and its dead units",
}


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


class Look(NamedTuple):
    """How an arm is shown."""

    colour: str
    marker: str
    thickness: float
    front: float

    @property
    def named(self) -> bool:
        """Whether it is one of the arms in colour."""
        return self.colour != GREY


def look_of(arm: int) -> Look:
    """How arm number `arm` of a sweep is shown."""
    if arm < len(MARKERS):
        return Look(COLOURS[arm], MARKERS[arm], 1.8, 3 - 0.1 * arm)
    return Look(GREY, ".", 0.9, 2)


def draw_arms(
    curves: Mapping[str, Sequence[Curve]], errors: Mapping[str, Sequence[float]], title: str, batch: str
) -> Figure:
    """Training loss over the steps, and the validation error of each run.

    Args:
        curves: of the runs of each arm. An arm without runs of its own, which averages other runs, has none.
        errors: of the runs of each arm, as fractions of 1, in the order in which the arms are shown.
        batch: images in a step.
    """
    figure = Figure(figsize=(13, 2.4 + 0.3 * max(8, len(errors))), dpi=SWEEP_DPI, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(5, 3))
    highest = 0.0
    for i, (arm, values) in enumerate(errors.items()):
        colour, marker, thickness, front = look_of(i)
        for curve in map(_smooth, curves.get(arm, ())):
            left.plot(*curve, color=colour, lw=thickness, zorder=front, marker=marker, markevery=[-1], ms=6)
            highest = max([highest, *filter(np.isfinite, curve.losses)])
        right.plot([100 * value for value in values], [i] * len(values), marker, color=colour, ms=7, alpha=0.8)
        if values:
            mean = 100 * float(np.mean(values))
            right.plot(mean, i, "|", color="black", ms=15 * (len(values) > 1), mew=1.4)
            right.annotate(f"{mean:.1f} %", (1.02, i), xycoords=("axes fraction", "data"), va="center", fontsize=LABEL)
    left.set(xlabel=f"step ({batch} images)", ylabel=f"training loss (nats, means of up to {SMOOTHED} steps)")
    left.set(xlim=(0, None), ylim=(0, (1 + ROOM) * min(highest, LOSS) or 1))
    shown = [100 * value for values in errors.values() for value in values] or [0.0]
    room = ROOM * (max(shown) - min(shown)) or 1.0
    right.set(xlabel="top-1 validation error (%); | and number: mean of the runs", ylim=(len(errors) - 0.4, -0.6))
    right.set_xlim(min(shown) - room, max(shown) + room)
    _name(right, list(errors))
    plain(left, right)
    _title(figure, f"{title}: training loss and validation error of {len(errors)} arms")
    return figure


def draw_epochs(arms: Mapping[str, Sequence[Epochs]], title: str) -> Figure:
    """Errors of training and of validation after each epoch, side by side on one scale, a line for each run; where a
    run divides its learning rate, a dotted line with the rate that follows."""
    figure = Figure(figsize=(13, 4.6), dpi=SWEEP_DPI, layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for i, runs in enumerate(arms.values()):
        colour, _, thickness, front = look_of(i)
        for run in runs:
            for axes, errors in zip(panels, (run.training, run.validation), strict=True):
                axes.plot(run.steps, [100 * error for error in errors], color=colour, lw=thickness, zorder=front)
            for (step, before), (_, rate) in pairwise(zip(run.steps, run.rates, strict=True)):
                if rate != before:
                    for axes in panels:
                        axes.axvline(step, color=colour, lw=1, ls=":")
                    panels[0].text(step, 0.99, f" {rate:g}", transform=panels[0].get_xaxis_transform(), va="top")
    for axes, text in zip(panels, ("training, with its dropout and random crops", "validation"), strict=True):
        axes.set(xlabel="step", xlim=(0, None), ylim=(0, 100))
        axes.set_title(text, fontsize=LABEL + 1)
        plain(axes)
    panels[0].set_ylabel("top-1 error after each epoch (%)")
    _legend(figure, list(arms))
    _title(figure, f"{title}: errors of {len(arms)} arm{'s' * (len(arms) > 1)}, epoch by epoch")
    return figure


def draw_layers(arms: Sequence[str], probes: Sequence[Probed], picture: str, title: str) -> Figure:
    """One of `PANELS`: a row for each quantity, a column for each probed step, a line for each arm through the layers.
    On a logarithmic axis a value of 0 is a gap, as one that was not measured is."""
    panels = PANELS[picture]
    figure = Figure(figsize=(13, 1.3 + 2.7 * len(panels)), dpi=SWEEP_DPI, layout="constrained")
    cells = figure.subplots(len(panels), len(probes), squeeze=False, sharex=True, sharey="row")
    for panel, row in zip(panels, cells, strict=True):
        row[0].set_ylabel(panel.title, fontsize=LABEL)
        if panel.logarithmic:
            row[0].set_yscale("log")
        else:
            row[0].set_ylim(-ROOM, 1 + ROOM)
        for probe, cell in zip(probes, row, strict=True):
            values = probe.values[panel.key]
            for i, line in enumerate(np.where(values > 0, values, np.nan) if panel.logarithmic else values):
                colour, marker, thickness, front = look_of(i)
                cell.plot(line, color=colour, lw=thickness, zorder=front, marker=marker, ms=5)
            cell.set_xticks(range(len(probe.layers)), list(probe.layers), fontsize=LABEL - 1)
            plain(cell)
    for probe, cell in zip(probes, cells[0], strict=True):
        cell.set_title(f"before step {probe.step}", fontsize=LABEL + 1)
    _legend(figure, arms)
    _title(figure, f"{title}: {TITLES[picture]}")
    return figure


def draw_ratios(arms: Sequence[str], probes: Sequence[Probed], title: str) -> Figure:
    """The learning rate of each arm over the largest at which descent is stable in the last layer, at each probed step.
    One above its limit is a red cross; one that is off the picture is an arrow at its edge."""
    figure = Figure(figsize=(13, 1.5 + 0.26 * max(6, len(arms))), dpi=SWEEP_DPI, layout="constrained")
    cells = figure.subplots(1, len(probes), squeeze=False, sharey=True)[0]
    for probe, cell in zip(probes, cells, strict=True):
        for i, ratio in enumerate(probe.ratios):
            if np.isnan(ratio):
                continue
            marker = "X" if ratio > 1 else look_of(i).marker
            if not LEAST < ratio < LARGEST:
                marker = ">" if ratio > 1 else "<"
            colour = RED if ratio > 1 else look_of(i).colour
            cell.plot(np.clip(ratio, LEAST, LARGEST), i, marker, color=colour, ms=8, clip_on=False)
        cell.axvline(1, color="black", lw=1, ls="--")
        cell.set(xscale="log", xlim=(LEAST, LARGEST), ylim=(len(arms) - 0.5, -0.5))
        cell.set_xticks([0.001, 0.01, 0.1, 1, 10], ["0.001", "0.01", "0.1", "1", "10"])
        cell.minorticks_off()
        cell.set_title(f"before step {probe.step}", fontsize=LABEL + 1)
        cell.set_xlabel("lr / largest stable lr", fontsize=LABEL)
        plain(cell)
    _name(cells[0], arms)
    _title(
        figure, f"{title}: learning rate against its limit in the last layer (SGD); above 1, ✗, descent is not stable"
    )
    return figure


def _title(figure: Figure, text: str) -> None:
    text = wrap(f"Experiment {text}", figure.get_figwidth(), HEAD)
    figure.suptitle(text, x=0.01, ha="left", fontsize=HEAD, fontweight="bold", parse_math=False)


def _name(axes: Axes, arms: Sequence[str]) -> None:
    """Rows with the names of the arms, in their colours."""
    names = [fit(arm, NAME, LABEL, "bold") for arm in arms]
    for i, tick in enumerate(axes.set_yticks(range(len(arms)), names, fontsize=LABEL, parse_math=False)):
        if look_of(i).named:
            tick.label1.set(color=look_of(i).colour, fontweight="bold")


def _legend(figure: Figure, arms: Sequence[str]) -> None:
    """The arms in colour, and how many others there are, beside the axes."""
    looks = [look_of(i) for i in range(min(len(arms), len(MARKERS) + 1))]
    handles = [Line2D([], [], color=each.colour, marker=each.marker, lw=each.thickness) for each in looks]
    labels = [fit(arm, NAME, LABEL) for arm in arms[: len(MARKERS)]]
    if more := len(arms) - len(labels):
        labels.append(f"{more} other{'s' * (more > 1)}")
    legend = figure.legend(
        handles, labels, loc="outside lower left", ncols=len(labels), fontsize=LABEL, frameon=False, handlelength=2.5
    )
    for text, each in zip(legend.get_texts(), looks, strict=True):
        text.set(color=each.colour, parse_math=False)


def _smooth(curve: Curve) -> Curve:
    """Means of about `SMOOTHED` steps, each at the last of them; of a run shorter than two of these, each record."""
    if not curve.steps or curve.steps[-1] < 2 * SMOOTHED:
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
