"""The curves of a run, read from its record line by line and thinned to what a screen can show."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from dist_train.rundir import record
from pipelines.valid import Count, Finite, Invalid, Torn, object_of, parsed

BUCKETS = 400  # of a curve: its line has so many points and a few, its extremes twice as many
ALL, FEWEST = 2000, 100  # of the same curve of all runs of a page, and of one of many runs
MOST = 2_000_000  # lines that are read, whose numbers take 160 MB: 90 epochs of ImageNet are 45,000
RECENT = 50  # lines of steps that tell what limits the speed now
SPIKE = 20  # times the median: a value so high makes an axis logarithmic
HUGE = 1e4  # of a loss or gradient that diverges, for which no linear axis has room
DIGITS = 7  # significant ones of a number in the page
MISSING, GAP = float("nan"), float("inf")  # a key that a line does not have; a value that is not finite
MACHINE = ("images_per_s", "data_wait", "data_wait_worst")
# Curves, and their keys in a line; MACHINE stand under "machine".
STEP = {name: name for name in ("loss", "train_error", "lr", "grad_norm", *MACHINE)}
VALIDATION = {"validation_loss": "loss", "top1_error": "top1_error", "top5_error": "top5_error"}


@dataclass
class MachineDrawn:
    """What is drawn of "machine" in a line."""

    images_per_s: float | None = None
    data_wait: float | None = None
    data_wait_worst: float | None = None


@dataclass
class LineDrawn(MachineDrawn):
    """What is drawn of a line. Older versions have the machine's numbers beside the others."""

    kind: str = ""
    step: Count = 0
    epoch: Count = 0
    progress: Finite = 0.0
    images: Count | None = None
    loss: float | None = None
    train_error: float | None = None
    lr: float | None = None
    grad_norm: float | None = None
    top1_error: float | None = None
    top5_error: float | None = None
    machine: MachineDrawn = field(default_factory=MachineDrawn)


class Point(NamedTuple):
    """A recorded value. `value` is None if it was not finite."""

    images: float
    step: int
    epoch: float
    value: float | None


class DrawnLines:
    """The lines of one kind as columns of numbers.

    Args:
        keys: curves and their keys in a line.
    """

    def __init__(self, keys: dict[str, str]) -> None:
        self._keys = keys
        self._places = [array("d") for _ in range(3)]  # images, step, epoch
        self._values = {name: array("d") for name in keys}

    def take(self, line: LineDrawn, epoch: float) -> None:
        images = line.step if line.images is None else line.images  # the first version does not say
        for column, place in zip(self._places, (images, line.step, epoch), strict=True):
            column.append(place)
        for name, key in self._keys.items():
            value = getattr(line.machine, key) if name in MACHINE else None
            value = getattr(line, key) if value is None else value
            self._values[name].append(MISSING if value is None else value if abs(value) < GAP else GAP)

    def thinned(self, name: str, buckets: int) -> tuple[list[Point], list[Point]]:
        """The line of a curve, and the extremes that it leaves out. Of each of so many buckets of equally many points
        the line has the one with the median value, and the first that is not finite; and the first and the last of all.
        The extremes are the lowest and the highest point of each bucket. So each point was recorded."""
        values = np.asarray(self._values[name])
        present = np.flatnonzero(~np.isnan(values))
        if len(present) <= buckets:
            return self._points(present.tolist(), values), []
        line, ends = [int(present[0]), int(present[-1])], []
        for bucket in np.array_split(present, buckets):
            found = values[bucket]
            finite = bucket[found < GAP]
            line += bucket[found == GAP][:1].tolist()
            if len(finite):
                order = finite[np.argsort(values[finite], kind="stable")]
                line.append(int(order[len(order) // 2]))
                ends += [int(order[0]), int(order[-1])]
        return self._points(line, values), self._points(ends, values)

    def _points(self, rows: Iterable[int], values: Any) -> list[Point]:
        images, step, epoch = self._places
        found = ((row, float(values[row])) for row in sorted(set(rows)))
        return [Point(images[r], int(step[r]), epoch[r], value if value < GAP else None) for r, value in found]


@dataclass
class Recorded:
    """What the record of a run says.

    Attributes:
        curves: by their names, the keys of STEP and VALIDATION; those without a point are left out.
        extremes: of those curves that are thinned.
        recent: the last lines of steps, at most RECENT.
        validation: the last line of a validation, if there is one.
        damaged: what is wrong with the first line that is none of a record, and how many there are.
    """

    curves: dict[str, list[Point]] = field(default_factory=dict)
    extremes: dict[str, list[Point]] = field(default_factory=dict)
    recent: list[dict[str, Any]] = field(default_factory=list)
    validation: dict[str, Any] | None = None
    damaged: tuple[str, int] = ("", 0)

    @property
    def images(self) -> float:
        """Shown so far."""
        return max((points[-1].images for points in self.curves.values()), default=0.0)

    @property
    def per_step(self) -> float:
        """Images of a step; 1 if the record does not say."""
        last = max((points[-1] for points in self.curves.values()), key=lambda point: point.step, default=None)
        return last.images / last.step if last and last.step else 1.0


def recorded(run: Path, runs: int = 1) -> Recorded:
    """Reads a record, of which only the numbers are kept. `runs`: of the page. Raises OSError."""
    buckets = max(FEWEST, min(BUCKETS, ALL // runs))
    steps, checks = DrawnLines(STEP), DrawnLines(VALIDATION)
    recent, validation = deque[bytes](maxlen=RECENT), b""
    latest, wrong, first = 0, 0, ""
    for number, text in enumerate(islice(record.streamed(run), MOST), 1):
        try:
            line = parsed(LineDrawn, text)
        except Torn:  # by a kill, or still being written
            continue
        except Invalid as error:
            wrong, first = wrong + 1, first or f"line {number}, {error}"
            continue
        if line.step < latest:
            wrong, first = wrong + 1, first or f"line {number}, its step is lower than one before"
            continue
        if line.kind == "step":
            steps.take(line, line.progress)
            recent.append(text)
        elif line.kind == "validation":
            checks.take(line, line.epoch + 1.0)
            validation = text
        latest = line.step
    found = Recorded(damaged=(first, wrong), recent=[line for text in recent for line in _whole(text)])
    found.validation = next(iter(_whole(validation)), None)
    for columns, keys in ((steps, STEP), (checks, VALIDATION)):
        for name in keys:
            line_, ends = columns.thinned(name, buckets)
            found.curves |= {name: line_} if line_ else {}
            found.extremes |= {name: ends} if ends else {}
    return found


def logarithmic(values: Iterable[float | None]) -> bool:
    """Whether an axis for these values should be: one of them spikes, as a diverging loss does."""
    known = [value for value in values if value is not None]
    if not known or min(known) <= 0:
        return False
    return max(known) > SPIKE * median(known) or max(known) > HUGE


def number(value: Any) -> float | None:
    """A finite number, else None; a stranger may have written the line."""
    good = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if good and abs(value) < 1e300 else None  # NaN is not less


def short(value: float | None) -> float | int | None:
    """To DIGITS significant digits; whole numbers without a point."""
    if value is None or not value:
        return value if value is None else 0
    return int(value) if value == int(value) and abs(value) < 1 << 53 else float(f"{value:.{DIGITS}g}")


def _whole(text: bytes) -> list[dict[str, Any]]:
    """A line with all that it holds, if it is one of a record."""
    try:
        return [object_of(record.RecordLine, text)] if text else []
    except Invalid:
        return []
