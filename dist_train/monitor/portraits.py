"""Pictures of a run while it trains, drawn by a process beside it, and what its validation has counted."""

from __future__ import annotations

import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dist_train.ranks import beside
from dist_train.rundir import confusion

What = Literal["inputs", "wrong", "kernels"]
FOLDER = "pictures"  # in the run directory
LIMIT = 600.0  # seconds that a drawing may take: of CPUs that are busy it gets little
LOOK = 0.1  # seconds between two looks at one that is waited for
PATIENCE = 0.5  # seconds that a killed one may take to go: one in a file system that hangs does not
IMAGES = 12  # in the picture of wrong ones


class Drawing:
    """A picture that is being drawn into RUN/pictures by `python -m dist_train figures RUN --only WHAT`, in a process
    that is niced, has one thread and no GPU, and ends with the thread that began this. Never raises.

    inputs    what the net is shown, augmented; needs no checkpoint
    wrong     validation images that the newest good checkpoint gets wrong, with the five most probable classes
    kernels   those of the first convolution in the newest good checkpoint

    What that costs was measured with `python -m dist_train --train.epochs 1 --train.max_steps 200` (Fashion-MNIST) on
    two cores of an AMD EPYC, where training went on: 2.9, 3.5 and 2.7 seconds of CPU and 0.6 to 0.9 GB of memory, in 20
    to 36 seconds. Wrong ones of the whole net at 227 pixels take 6 seconds of CPU and 1.6 GB.

    Args:
        limit: seconds after which it is ended, when it is polled.

    Attributes:
        failed: why there is no picture, else empty.
    """

    def __init__(self, run: Path, what: What, limit: float = LIMIT) -> None:
        self.failed = ""
        self._path, self._limit, self._until = run / FOLDER / f"{what}.png", limit, time.monotonic() + limit
        self._before, self._drawn = self._stamp(), False
        self._process: subprocess.Popen[bytes] | None = None
        options = ("--only", what, "--out", str(run / FOLDER), "--device", "cpu", "--images", str(IMAGES))
        try:
            self._said = tempfile.TemporaryFile()  # noqa: SIM115, closed when it is over
            try:
                self._process = beside.start("dist_train", ("figures", str(run), *options), self._said)
            except OSError:
                self._said.close()
                raise
        except OSError as error:
            self.failed = f"nothing can be started ({error})"

    def poll(self) -> Path | None:
        """The picture, once it is there. None as long as it is drawn, and if that has failed."""
        if process := self._process:  # which another thread may end
            code = process.poll()
            if code is not None:
                self._conclude(code)
            elif time.monotonic() > self._until:
                self._kill(f"it was not done within {self._limit:.0f} s")
        return self._path if self._drawn else None

    def wait(self, seconds: float) -> Path | None:
        """As `poll`, after so many seconds, or as soon as it is over."""
        until = time.monotonic() + seconds
        while self.poll() is None and self._process is not None and time.monotonic() < until:
            time.sleep(LOOK)
        return self.poll()

    def end(self) -> None:
        """Give it up, if it is still drawn."""
        self.poll()
        self._kill("it was given up")

    def _conclude(self, code: int) -> None:
        self._process = None
        self._drawn = code == 0 and self._stamp() not in (None, self._before)
        if not self._drawn:
            self.failed = f"it was ended by {signal.Signals(-code).name}" if code < 0 else self._last_line()
        self._said.close()

    def _kill(self, why: str) -> None:
        if process := self._process:
            self._process, self.failed = None, why
            process.kill()
            with suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE)
            self._said.close()

    def _last_line(self) -> str:
        """Of what it has said: a sentence, or the last line of a traceback."""
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").split("\n")
        return next((line.removeprefix("error: ") for line in reversed(lines) if line.strip()), "it said nothing")

    def _stamp(self) -> tuple[int, int] | None:
        """Tells a picture from another one in its place."""
        with suppress(OSError):
            found = self._path.stat()
            return found.st_ino, found.st_mtime_ns
        return None


@dataclass(frozen=True)
class ClassCounts:
    """What a run's last validation has counted.

    Attributes:
        names: of the classes.
        samples: images of each, int64 [classes].
        top1, top5: of these, whose class is the most probable, and among the five most probable; likewise.
        pairs: (class, what it was taken for, how often), the most frequent first, equally frequent ones in the order of
            the classes. Without those that were right, and those taken for an output that stands for no class. Empty if
            there are more than `confusion.MOST` classes.
    """

    names: list[str]
    samples: NDArray[np.int64]
    top1: NDArray[np.int64]
    top5: NDArray[np.int64]
    pairs: list[tuple[int, int, int]]

    def matrix(self) -> NDArray[np.int64]:
        """How often a class, the row, was taken for one, the column: int64 [classes, classes]. Where `pairs` are not
        counted, the diagonal alone."""
        found = np.diag(self.top1)
        for label, predicted, count in self.pairs:
            found[label, predicted] = count
        return found


def classes(run: Path) -> ClassCounts:
    """How a run's last validation went, class by class. Raises ConfusionError, a UserError, without one."""
    counts, names = confusion.read(run)
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
