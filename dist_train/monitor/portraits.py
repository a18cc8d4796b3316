"""Pictures of a run while it trains, drawn by a separate process."""

from __future__ import annotations

import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Literal

from dist_train.ranks import beside
from pipelines.resolve import FLAG

What = Literal["inputs", "wrong", "kernels"]
FOLDER = "pictures"  # in the run directory
LIMIT = 600.0  # seconds per drawing: it has a low priority, so busy CPUs leave it little
LOOK = 0.1  # seconds between two polls while waiting
PATIENCE = 0.5  # seconds to wait for a killed process: in a hanging file system it does not end
IMAGES = 12  # in wrong.png


class Drawing:
    """A picture being drawn into RUN/pictures by `python -m dist_train figures RUN --only WHAT`, in a niced process
    with one thread and no GPU, which ends with the thread that started it. Never raises.

    inputs    augmented training images, as the net is shown them; needs no checkpoint
    wrong     validation images that the newest good checkpoint misclassifies, with the five most probable classes
    kernels   kernels of the first convolution in the newest good checkpoint

    The cost was measured with `python -m dist_train --train.epochs 1 --train.max_steps 200` (Fashion-MNIST) on two
    cores of an AMD EPYC while training went on: 2.9, 3.5 and 2.7 seconds of CPU and 0.6 to 0.9 GB of memory, in 20 to
    36 seconds. For the full net at 227 pixels, `wrong` takes 6 seconds of CPU and 1.6 GB.

    Args:
        limit: seconds after which polling ends the process.

    Attributes:
        failed: why there is no picture; empty if there is one or it is still being drawn.
    """

    def __init__(self, run: Path, what: What, limit: float = LIMIT) -> None:
        self.failed = ""
        self._path, self._limit, self._until = run / FOLDER / f"{what}.png", limit, time.monotonic() + limit
        self._before, self._drawn = self._stamp(), False
        self._process: subprocess.Popen[bytes] | None = None
        options = ("--only", what, "--out", str(run / FOLDER), "--device", "cpu", "--images", str(IMAGES), FLAG)
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
        """Path of the picture once it is drawn; None while it is being drawn, and if drawing failed."""
        if process := self._process:  # another thread may end it
            code = process.poll()
            if code is not None:
                self._conclude(code)
            elif time.monotonic() > self._until:
                self._kill(f"it was not done within {self._limit:.0f} s")
        return self._path if self._drawn else None

    def wait(self, seconds: float) -> Path | None:
        """Like `poll`, but waits until the drawing is over, this many seconds at most."""
        until = time.monotonic() + seconds
        while self.poll() is None and self._process is not None and time.monotonic() < until:
            time.sleep(LOOK)
        return self.poll()

    def end(self) -> None:
        """End the process if it is still drawing."""
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
        """Last line of its output: a sentence, or the end of a traceback."""
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").split("\n")
        return next((line.removeprefix("error: ") for line in reversed(lines) if line.strip()), "it said nothing")

    def _stamp(self) -> tuple[int, int] | None:
        """Inode and modification time of the picture, to notice that it was replaced; None if there is none."""
        with suppress(OSError):
            found = self._path.stat()
            return found.st_ino, found.st_mtime_ns
        return None
