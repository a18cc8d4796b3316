"""confusion.npz: the confusion counts of the last validation. Imports no torch.

names                     of the classes, a JSON list in UTF-8
samples, top1, top5       images per class; of these, correct in the top 1 and in the top 5
label, predicted, count   pairs that occurred, int32; predicted is len(names) for an output that is no class;
                          empty if there are more than MOST classes
step, epoch               completed
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dist_train.rundir.lease import Lease
from dist_train.rundir.writer import Writer
from pipelines.errors import UserError
from pipelines.files import regular, replacing

FILE = "confusion.npz"
MOST = 2000  # classes up to which pairs are counted: int64 [2000, 2002] on each device, 32 MB
LARGEST = 1 << 28  # bytes of them, unpacked
Counted = NDArray[np.int64]


class ConfusionError(UserError):
    """The counts of a validation are missing or cannot be read; the message says why."""


@dataclass(frozen=True)
class Confusion:
    """Confusion counts of a validation.

    Attributes:
        samples: images per class, int64 [classes].
        top1, top5: of these, correct in the top 1 and in the top 5, int64 [classes].
        label, predicted, count: true class, predicted class and number of images, for each pair that occurred,
            int64 [pairs]. `predicted` is `classes` for an output that is no class. All empty above MOST classes.
    """

    samples: Counted
    top1: Counted
    top5: Counted
    label: Counted
    predicted: Counted
    count: Counted


class ConfusionFile:
    """Writes the counts of the latest validation to a run directory, beside training. A run does not fail if they
    cannot be written.

    Args:
        lease: checked before each write.
        say: shows the user a line.
        writer: writes beside training.
        writes: whether this is rank 0; the others write nothing.
    """

    def __init__(self, lease: Lease, say: Callable[[str], None], writer: Writer, *, writes: bool) -> None:
        self._lease, self._say, self._writer, self._writes = lease, say, writer, writes

    def put(self, counts: Confusion, names: Sequence[str], step: int, epoch: int) -> None:
        """Write the counts of the validation after this step."""
        if self._writes:
            self._writer.ask(FILE, lambda: self._try(counts, names, step, epoch))

    def _try(self, counts: Confusion, names: Sequence[str], step: int, epoch: int) -> None:
        values = {k: v.astype(np.int32) for k, v in vars(counts).items()}
        values["names"] = np.frombuffer(json.dumps(list(names)).encode(), np.uint8)
        values |= {"step": np.array(step), "epoch": np.array(epoch)}
        try:
            if self._lease.holds():
                with replacing(self._lease.run / FILE, durable=False) as file:
                    np.savez_compressed(file, **values)
        except OSError as error:
            self._say(f"{FILE} cannot be written ({error}): training goes on")


def read(run: Path) -> tuple[Confusion, list[str]]:
    """Returns the counts of a run's last validation, and the class names. Raises ConfusionError."""
    path = run / FILE
    if not path.exists():
        raise ConfusionError(f"there is no {path}: it is written when the net is validated, after an epoch")
    try:
        with open(path, "rb", opener=regular) as held, np.load(held, allow_pickle=False) as file:
            if sum(entry.file_size for entry in file.zip.infolist()) > LARGEST:
                raise ValueError(f"it unpacks to more than {LARGEST} bytes")
            names = [str(name) for name in json.loads(file["names"].tobytes())]
            counts = Confusion(**{k: file[k].astype(np.int64) for k in Confusion.__dataclass_fields__})
        _check(counts, len(names))
    except Exception as error:  # whatever numpy makes of garbage
        raise ConfusionError(f"{path} is damaged ({error}): the next validation rewrites it") from error
    return counts, names


def _check(counts: Confusion, classes: int) -> None:
    """Raises ValueError for counts that are not those of so many classes."""
    each, pairs = (counts.samples, counts.top1, counts.top5), (counts.label, counts.predicted, counts.count)
    if any(a.shape != (classes,) for a in each) or len({a.shape for a in pairs}) > 1 or counts.label.ndim != 1:
        raise ValueError(f"its counts are not those of its {classes} classes")
    if any(a.min(initial=0) < 0 for a in (*each, *pairs)):
        raise ValueError("it has a negative count")
    if counts.label.max(initial=0) >= max(1, classes) or counts.predicted.max(initial=0) > classes:
        raise ValueError("it names a class that is none of its own")


@dataclass(frozen=True)
class ClassCounts:
    """Per-class counts of a run's last validation.

    Attributes:
        names: class names.
        samples: images per class, int64 [classes].
        top1, top5: images per class whose label was the most probable, and among the five most probable; int64
            [classes].
        pairs: (class, predicted class, count), the most frequent first, ties in the order of the classes. Excludes
            correct predictions and outputs that stand for no class. Empty with more than `MOST` classes.
    """

    names: list[str]
    samples: Counted
    top1: Counted
    top5: Counted
    pairs: list[tuple[int, int, int]]

    def matrix(self) -> Counted:
        """Confusion matrix, int64 [classes, classes]: labels by row, predictions by column. Only the diagonal if
        `pairs` were not counted."""
        found = np.diag(self.top1)
        for label, predicted, count in self.pairs:
            found[label, predicted] = count
        return found


def classes(run: Path) -> ClassCounts:
    """Per-class counts of a run's last validation. Raises ConfusionError, a UserError, if there was none."""
    counts, names = read(run)
    pairs = [
        (label, predicted, count)
        for label, predicted, count in zip(
            counts.label.tolist(), counts.predicted.tolist(), counts.count.tolist(), strict=True
        )
        if label != predicted < len(names)
    ]
    return ClassCounts(
        names, counts.samples, counts.top1, counts.top5, sorted(pairs, key=lambda pair: (-pair[2], *pair[:2]))
    )
