"""What the page tells of a run besides its curves, as plain values for the template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dist_train.config import Config
from dist_train.flat import as_dict
from dist_train.page.wording import percent, plainly, spoken, whole
from dist_train.rundir import confusion
from dist_train.rundir.ledger import PHASES
from dist_train.rundir.overview import Overview

NAMES = {  # of the phases of the ledger
    "data": "data wait",
    "startup": "start-up",
}
GRID = 50  # classes up to which the whole matrix is shown
NUMBERED = 20  # and up to which it has its numbers
ROWS = 20  # of the tables of other confusions, and of the worst classes
HEATS = 9  # shades of a matrix
LONGEST = 60  # characters of a name in the title of a cell
WIDTH = 1000.0  # of the bar of the wall time, in units of its drawing


class Phase(NamedTuple):
    """A part of the wall time. `x` and `width` in the drawing of the bar."""

    key: str
    name: str
    time: str
    share: str
    x: float
    width: float


class Cell(NamedTuple):
    """A cell of the confusion matrix: shade 0 to HEATS, number of images, and what it means."""

    heat: int
    images: int
    title: str


@dataclass(frozen=True)
class Confused:
    """The last validation by class.

    Attributes:
        names: of the classes.
        rows: of the matrix, one per class with the counts of predictions; empty above GRID classes.
        pairs: (class, predicted class, images, share of the class), the most frequent first.
        worst: (class, images, top-1 error, top-5 error, most often taken for), the worst first.
    """

    names: list[str]
    rows: list[list[Cell]]
    pairs: list[tuple[str, str, str, str]]
    worst: list[tuple[str, str, str, str, str]]
    numbered: bool


def phases(seconds: Mapping[str, float]) -> list[Phase]:
    """The phases of the ledger that took any time, in its order."""
    sum_, x = sum(seconds.values()), 0.0
    found = []
    for key in PHASES:
        share = seconds.get(key, 0.0) / sum_ if sum_ else 0.0
        if share > 0:
            name = NAMES.get(key, key)
            found.append(Phase(key, name, spoken(seconds[key]), percent(share), round(x, 2), round(WIDTH * share, 2)))
            x += WIDTH * share
    return found


def reached(found: Overview) -> list[tuple[str, str]]:
    """What a run has reached, in numbers: (name, value)."""
    epochs = f" of {found.epochs}" if found.epochs else ""
    progress = found.progress if found.progress is not None else found.epoch
    if found.state == "done" and found.epoch is not None:
        progress = found.epoch  # the last line may be some steps before the end
    epoch = f"{progress:.2f}".rstrip("0").rstrip(".") + epochs if progress is not None else "–"
    return [
        ("epoch", epoch),
        ("step", whole(found.step)),
        ("best error", percent(found.best_error, 2)),
        ("last error", percent(found.last_error, 2)),
        ("images/s", whole(found.images_per_s)),
        ("wall time", spoken(found.elapsed) if found.elapsed is not None else "–"),
        ("of it training", percent(found.goodput, 0)),
        ("restarts", whole(found.restarts)),
    ]


def differing(found: Sequence[Overview]) -> list[tuple[str, list[str]]]:
    """The settings in which runs differ: (key, their values)."""
    defaults = as_dict(Config())
    keys = sorted({key for each in found for key in each.differs})
    rows = []
    for key in keys:
        values = [plainly(_setting(each.differs.get(key, defaults.get(key)))) for each in found]
        if len(set(values)) > 1:
            rows.append((plainly(key), values))
    return rows


def confused(run: Path) -> Confused:
    """The counts of the last validation. Raises ConfusionError."""
    counts = confusion.classes(run)
    names = [plainly(name) for name in counts.names]
    wrong = (counts.samples - counts.top1).tolist()
    samples, top5 = counts.samples.tolist(), counts.top5.tolist()
    often: dict[int, str] = {}
    for label, predicted, count in counts.pairs:
        often.setdefault(label, f"{names[predicted]} ({whole(count)})")
    order = sorted((i for i, n in enumerate(samples) if n), key=lambda i: (-wrong[i] / samples[i], i))
    worst = [
        (
            names[i],
            whole(samples[i]),
            percent(wrong[i] / samples[i]),
            percent(1 - top5[i] / samples[i]),
            often.get(i, ""),
        )
        for i in order[:ROWS]
    ]
    pairs = [
        (names[label], names[predicted], whole(count), percent(count / samples[label] if samples[label] else None))
        for label, predicted, count in counts.pairs[:ROWS]
    ]
    small = len(names) <= GRID and (bool(counts.pairs) or not any(wrong))
    return Confused(names, _matrix(counts, names) if small else [], pairs, worst, len(names) <= NUMBERED)


def _matrix(counts: confusion.ClassCounts, names: Sequence[str]) -> list[list[Cell]]:
    rows = []
    for i, row in enumerate(counts.matrix().tolist()):
        n = max(1, int(counts.samples[i]))
        cells = []
        for j, count in enumerate(row):
            # By the root: confusions of a good net are a few in a hundred, and should be seen.
            heat = min(HEATS, round(HEATS * (count / n) ** 0.5 + 0.49)) if count else 0
            name, other = names[i][:LONGEST], names[j][:LONGEST]
            title = f"{name} taken for {other}: {count} of {n}" if i != j else f"{name}, right: {count} of {n}"
            cells.append(Cell(heat, count, title if count or i == j else ""))
        rows.append(cells)
    return rows


def _setting(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "none"}[value]
    if isinstance(value, list | tuple):
        return ", ".join(map(_setting, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value) or "none"
