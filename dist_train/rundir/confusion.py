"""confusion.npz: which class was taken for which in the last validation. Imports no torch.

names                     of the classes, as UTF-8 of a JSON list
samples, top1, top5       images of each class; of these, whose label was the most probable, and among the first five
label, predicted, count   pairs that occurred, int32; the predicted is len(names) for an output that is no class;
                          empty if there are more than MOST classes
step, epoch               that were done
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
from pipelines.files import replacing

FILE = "confusion.npz"
MOST = 2000  # classes whose pairs are counted: on each device these are int64 [2000, 2002], 32 MB
Counted = NDArray[np.int64]


class ConfusionError(UserError):
    """There are no counts of a validation, or they cannot be read; the message says why."""


@dataclass(frozen=True)
class Confusion:
    """How often a validation has found which class to be taken for which.

    Attributes:
        samples: images of each class, int64 [classes].
        top1, top5: of these, whose label was the most probable, and among the five most probable; likewise.
        label, predicted, count: images of a class that were taken for one, for each pair that occurred, int64 [pairs].
            The predicted is `classes` for an output that stands for none. All empty above MOST classes.
    """

    samples: Counted
    top1: Counted
    top5: Counted
    label: Counted
    predicted: Counted
    count: Counted


class ConfusionFile:
    """Keeps the counts of the newest validation in a run directory, beside training. It is no failure of the run if
    that cannot be.

    Args:
        lease: checked before it is written.
        say: shows the user a line.
        writer: writes beside training.
        writes: whether this is rank 0; the others write nothing.
    """

    def __init__(self, lease: Lease, say: Callable[[str], None], writer: Writer, *, writes: bool) -> None:
        self._lease, self._say, self._writer, self._writes = lease, say, writer, writes

    def put(self, counts: Confusion, names: Sequence[str], step: int, epoch: int) -> None:
        """Write what the validation after this step has counted."""
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
    """The counts of a run's last validation, and the names of the classes. Raises ConfusionError."""
    path = run / FILE
    if not path.exists():
        raise ConfusionError(f"there is no {path}: it is written when the net is validated, after an epoch")
    try:
        with open(path, "rb") as held, np.load(held, allow_pickle=False) as file:
            names = [str(name) for name in json.loads(file["names"].tobytes())]
            counts = Confusion(**{k: file[k].astype(np.int64) for k in Confusion.__dataclass_fields__})
    except Exception as error:  # whatever numpy makes of garbage
        raise ConfusionError(f"{path} is damaged ({error}): the next validation writes it anew") from error
    return counts, names
