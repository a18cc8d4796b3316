"""A file of a run that grows by lines, written beside training. Imports no torch."""

from __future__ import annotations

import errno
import json
import os
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any

from dist_train.rundir.lease import Lease
from dist_train.rundir.writer import Writer
from pipelines.files import HeldFile, no_link


class Lines:
    """A file of one JSON object a line. A disk that is slow, or full for a while, delays lines, and loses none.

    Args:
        path: of the file, in the directory of the run.
        lease: checked before every write.
        say: shows the user a line.
        writer: writes beside training.

    Attributes:
        size: of all lines, in bytes, those included that are not on the disk yet.
        error: why the last line could not be written, until it could.
        written: called, by the thread that writes, when lines are in the file.
    """

    def __init__(self, path: Path, lease: Lease, say: Callable[[str], None], writer: Writer) -> None:
        self.path, self.size = path, 0
        self.error: OSError | None = None
        self.written: Callable[[], None] = lambda: None
        self._lease, self._say, self._writer = lease, say, writer
        self._file: HeldFile | None = None
        self._unwritten: deque[bytes] = deque()
        self._inside, self._settled = 0, 0  # bytes in the file, and of these on the disk for good
        self._lock = Lock()  # of the file: two threads write

    def begin(self) -> None:
        """Go on behind what is there; half a line that a kill has left is ended. Raises OSError."""
        self._file = HeldFile(self.path, "ab", opener=no_link)
        self.size = self._inside = self._settled = self.path.stat().st_size
        if self.size:
            with open(self.path, "rb") as file:
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":
                    self._file.write(b"\n")
                    self.size = self._inside = self.size + 1

    def add(self, values: dict[str, Any]) -> None:
        """Add one line. Nothing on other ranks, where it is not open."""
        if self._file is not None:
            line = (json.dumps(values) + "\n").encode()
            self._unwritten.append(line)
            self.size += len(line)
            self._writer.ask(self.path.name, self._try)

    def settle(self) -> None:
        """Have all lines on the disk. Raises OSError."""
        if self._file is not None:
            self._try()
            if self.error:
                raise self.error
            inside = self._inside
            if self._settled < inside:
                os.fsync(self._file.fileno())  # without the lock: lines, and status.json behind them, go on
                self._settled = inside

    def _try(self) -> None:
        """Write what is not yet written. If that fails, say so once and keep it for the next time."""
        with self._lock:
            try:
                self._write()
                self.error = None
            except OSError as error:
                if self.error is None:
                    self._say(f"{self.path.name} cannot be written ({error}): the lines are kept and written later")
                self.error = error
        if not self._lease.lost:
            self.written()

    def _write(self) -> None:
        assert self._file is not None
        if not self._unwritten or not self._lease.holds():
            return
        written = 0
        try:
            while self._unwritten:
                line = self._unwritten[0]
                written = self._file.write(line)
                if written < len(line):  # there was room for so much
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self._inside, written = self._inside + len(line), 0
                self._unwritten.popleft()
        except OSError:
            self._tear(written)
            raise

    def _tear(self, written: int) -> None:
        """A full disk has left so many bytes of a line: they are taken back."""
        assert self._file is not None
        with suppress(OSError):
            self._file.truncate(self._inside)
