"""curves.png: how a run has learned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any, NamedTuple

from dist_train.pictures.style import COLOURS, CURVES_DPI, GREY, plain
from dist_train.pictures.text import LEADING, POINTS, spread
from pipelines.files import write_atomically
from pipelines.misc import ceil_div
from pipelines.png import as_png, fit, width

if TYPE_CHECKING:  # not while a run starts: matplotlib takes its time
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 10.0, 6.0  # inches, as all of these
# Margins; in the right one stand the labels of the lines, in the upper one the learning rates below the title.
LEFT, RIGHT, TOP, BOTTOM, BETWEEN = 0.75, 1.95, 0.85, 0.6, 0.3
LABEL, HEAD = 9, 12  # font sizes in points
MOST = 500  # points of a line
FEW = 20  # points that are marked; of more, the line is enough
ROOM = 0.08  # of an axis, above the highest value
HUGE = 1e4  # nats: of a run that diverges, for which no other axis has room
SPIKE = 20  # times the median: a loss so high makes the axis logarithmic
TRAINING, VALIDATION, TOP5 = COLOURS[0], COLOURS[1], COLOURS[2]
Point = tuple[float, float]


class Line(NamedTuple):
    """A curve through points (x, y); `label` stands at its right end."""

    points: Sequence[Point]
    label: str
    colour: str
    thickness: float = 2.0


class Rate(NamedTuple):
    """A learning rate and the place on the x axis from which it was used."""

    x: float
    lr: float


def draw_curves(run: Path, records: Sequence[dict[str, Any]], chance: float | None = None) -> Path | None:
    """Write `curves.png`, the picture of `curves_figure`, into the directory of a run. Returns its path; None before
    the first recorded step. Raises OSError."""
    figure = curves_figure(records, run.name, chance)
    if figure is None:
        return None
    path = run / "curves.png"
    write_atomically(path, as_png(figure))
    return path


def curves_figure(records: Sequence[dict[str, Any]], name: str, chance: float | None = None) -> Figure | None:
    """Losses above errors, of training and validation, over one x axis, with the learning rates. None before the first
    recorded step.

    Args:
        chance: error of always naming the commonest class, as a fraction of 1, if it is known.
    """
    steps = [r for r in records if r.get("kind") == "step"]
    checks = [r for r in records if r.get("kind") == "validation"]
    if not steps:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=CURVES_DPI)
    above, below = figure.subplots(2, 1, sharex=True)
    left, right, bottom, top = LEFT / WIDTH, 1 - RIGHT / WIDTH, BOTTOM / HEIGHT, 1 - TOP / HEIGHT
    figure.subplots_adjust(left, bottom, right, top, hspace=2 * BETWEEN / (HEIGHT - TOP - BOTTOM - BETWEEN))
    per_epoch = round(steps[-1]["step"] / steps[-1]["progress"])
    scale = 1 if checks or steps[-1]["progress"] >= 1 else per_epoch  # less than one epoch is shown in steps
    epochs = checks[-1]["epoch"] + 1 if checks else 0
    _x_axis(below, max(epochs, steps[-1]["progress"] if scale == 1 else steps[-1]["step"]), scale, per_epoch)
    _loss(above, steps, checks, scale)
    _error(below, steps, checks, scale, chance)
    _rates(figure, rates(steps, scale))
    plain(above, below)
    title = fit(f"{name}: {_outcome(steps, checks)}", POINTS * (WIDTH - LEFT - 0.2), HEAD, "bold")
    figure.text(left, 1 - 0.2 / HEIGHT, title, fontsize=HEAD, fontweight="bold", va="top", parse_math=False)
    return figure


def rates(steps: Sequence[dict[str, Any]], scale: float = 1) -> list[Rate]:
    """The first learning rate, and each one to which it was changed. A rise at every step, the warm-up, is none."""
    found = [(scale * r["progress"], scale * r["epoch"], r["lr"]) for r in steps if "lr" in r]
    if not found:
        return []
    rising = next((i for i, (one, two) in enumerate(pairwise(found)) if two[2] <= one[2]), len(found) - 1)
    changes = [Rate(found[rising][0] if rising else 0.0, found[rising][2])]
    for (before, _, was), (_, epoch, lr) in pairwise(found[rising:]):
        if lr != was:
            changes.append(Rate(max(before, epoch), lr))  # at the beginning of an epoch, or where a start changed it
    return changes


def _outcome(steps: Sequence[dict[str, Any]], checks: Sequence[dict[str, Any]]) -> str:
    """What the curves come to, for the title."""
    if checks:
        return f"{100 * checks[-1]['top1_error']:.2f} % validation error after epoch {checks[-1]['epoch'] + 1}"
    return f"training loss {_nats(steps[-1]['loss'])} after step {steps[-1]['step']}, not validated yet"


def _x_axis(axes: Axes, end: float, scale: float, per_epoch: int) -> None:
    """From 0 to the end of the run, with ticks at whole epochs, or at steps."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(0, end)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    axes.set_xlabel(f"epoch ({per_epoch} steps each)" if scale == 1 else f"step ({per_epoch} make an epoch)")


def _loss(axes: Axes, steps: Sequence[dict[str, Any]], checks: Sequence[dict[str, Any]], scale: float) -> None:
    """Losses of training and validation. What is not finite cannot be shown and is counted."""
    training = _means([(scale * r["progress"], r["loss"]) for r in steps if math.isfinite(r["loss"])])
    tested = [(r["epoch"] + 1.0, r["loss"]) for r in checks if math.isfinite(r.get("loss", math.nan))]
    lines = [Line(training, f"training\n{_nats(training[-1][1])}", TRAINING, 1.2)] if training else []
    if tested:
        lines.append(Line(tested, f"validation\n{_nats(tested[-1][1])}", VALIDATION))
    axes.set_ylabel("loss (nats)")
    if missing := sum(not math.isfinite(r["loss"]) for r in steps):
        note = f"{missing} of {len(steps)} recorded losses are not finite and cannot be shown"
        axes.text(0.98, 0.92, note, transform=axes.transAxes, ha="right", va="top", fontsize=LABEL)
    values = [y for line in lines for _, y in line.points]
    if not values:
        return
    low, high = min(values), max(values)
    if low > 0 and (high > SPIKE * median(values) or high > HUGE):
        axes.set(yscale="log", ylabel="loss (nats, logarithmic)", ylim=(low / 1.5, high * 1.5))
    else:
        axes.set_ylim(_limits(values))
    _draw(axes, lines)


def _error(
    axes: Axes,
    steps: Sequence[dict[str, Any]],
    checks: Sequence[dict[str, Any]],
    scale: float,
    chance: float | None,
) -> None:
    """Errors of training and validation, the best of validation, and that of always naming the commonest class."""
    training = _means([(scale * r["progress"], 100 * r["train_error"]) for r in steps if "train_error" in r])
    lines = [Line(training, f"training\n{training[-1][1]:.1f} %", TRAINING, 1.2)] if training else []
    epochs = [r["epoch"] + 1.0 for r in checks]
    if checks:
        top1, top5 = ([100 * r[key] for r in checks] for key in ("top1_error", "top5_error"))
        best = min(range(len(top1)), key=top1.__getitem__)
        last = ", the best" if best == len(top1) - 1 else f"\nbest {top1[best]:.2f} %, epoch {epochs[best]:.0f}"
        lines.append(
            Line(list(zip(epochs, top1, strict=True)), f"validation, top-1\n{top1[-1]:.2f} %{last}", VALIDATION)
        )
        if any(top5):  # of five classes or fewer it is 0
            lines.append(Line(list(zip(epochs, top5, strict=True)), f"validation, top-5\n{top5[-1]:.2f} %", TOP5))
        axes.plot(
            epochs[best], top1[best], "o", ms=13, mfc="none", mec=VALIDATION, mew=1.6, label="best", clip_on=False
        )
    values = [y for line in lines for _, y in line.points] or [0.0]
    if chance is not None:
        note, level = f"always naming the\ncommonest class\n{100 * chance:.2f} %", 100 * chance
        if level > 2 * max(values) > 0:  # as a line it would leave most of the picture empty
            level, note = _limits(values)[1], f"↑ {note}"
        else:
            axes.axhline(level, color=GREY, ls="--", lw=1.2)
            values.append(level)
        lines.append(Line([(axes.get_xlim()[1], level)], note, "#666666", 0))
    axes.set(ylabel="error (%)", ylim=_limits(values))
    _draw(axes, lines)


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """Limits of an axis with room above these values, and below them unless it begins at 0."""
    low, high = min(values), max(values)
    room = ROOM * (high - low) or 0.1 * abs(high) or 1.0
    if 0 <= low <= high / 2:
        return 0, (1 + ROOM) * high or 1
    return low - room, high + room


def _nats(loss: float) -> str:
    return f"{loss:.2f}" if 0.1 <= loss < 1e4 else f"{loss:.2g}"


def _means(points: Sequence[Point]) -> list[Point]:
    """At most `MOST` points, each the mean of equally many, the last ones fewer, at the last of them."""
    n = max(1, ceil_div(len(points), MOST))
    groups = [points[i : i + n] for i in range(0, len(points), n)]
    return [(group[-1][0], fmean(y for _, y in group)) for group in groups]


def _draw(axes: Axes, lines: Sequence[Line]) -> None:
    """Draw the lines, with markers if they have few points, and their labels beside their right ends. The limits of the
    axes are set."""
    height = POINTS * (HEIGHT - TOP - BOTTOM - BETWEEN) / 2
    to_axes = axes.transData + axes.transAxes.inverted()
    ends, sizes = [], []
    for line in lines:
        if line.thickness:
            xs, ys = zip(*line.points, strict=True)
            marker = "o" if len(xs) < FEW else None
            # Not clipped: the last marker stands on the edge.
            axes.plot(xs, ys, color=line.colour, lw=line.thickness, marker=marker, ms=5, clip_on=False)
        ends.append(height * float(to_axes.transform(line.points[-1])[1]))
        sizes.append(LABEL * (LEADING * line.label.count("\n") + 1.6))
    for line, centre in zip(lines, spread(ends, sizes, height), strict=True):
        axes.text(
            1.025, centre / height, line.label, transform=axes.transAxes, va="center", fontsize=LABEL, color=line.colour
        )


def _rates(figure: Figure, changes: Sequence[Rate]) -> None:
    """A dotted line where the learning rate was changed, and each rate above its line, in two rows if they are close.
    What fits in neither row has its line only."""
    axes = figure.axes[0]
    end, inches = axes.get_xlim()[1], WIDTH - LEFT - RIGHT
    free = [0.0, 0.0]  # from where on, in points
    for i, (x, lr) in enumerate(changes):
        if i:
            for each in figure.axes:
                each.axvline(x, color="#444444", ls=":", lw=1.2)
        at, text = POINTS * inches * x / end, f"lr {lr:g}"
        row = next((row for row, start in enumerate(free) if start <= at), None)
        if row is not None:
            free[row] = at + width(text, LABEL) + 6
            axes.annotate(
                text, (x, 1), (0, 3 + 12 * row), xycoords=("data", "axes fraction"), textcoords="offset points",
                fontsize=LABEL, color="#444444",
            )  # fmt: skip
