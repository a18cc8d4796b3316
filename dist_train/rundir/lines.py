"""A file of a run that grows line by line, written beside training. Imports no torch."""

from __future__ import annotations

import errno
import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any

from dist_train.rundir.lease import Lease
from dist_train.rundir.writer import Writer
from pipelines.errors import UserError
from pipelines.files import MOST, HeldFile, appended, read_file, regular
from pipelines.valid import Invalid, Torn, objects_of

LONGEST = 1 << 20  # bytes of a line that is read by itself


def readable(path: Path, kind: type[Any], most: int = MOST) -> tuple[list[dict[str, Any]], dict[int, Invalid]]:
    """The lines of a file that have the format `kind`, and what is wrong with each other one, by its number, from 1.
    Both are empty if there is no such file. Raises OSError."""
    try:
        return objects_of(kind, read_file(path, most))
    except FileNotFoundError:
        return [], {}


def read(path: Path, kind: type[Any], most: int = MOST) -> list[dict[str, Any]]:
    """All lines of a file, without those that a kill has torn. Raises OSError, also for one of more than `most` bytes,
    and UserError for any other line that does not have the format `kind`."""
    found, wrong = readable(path, kind, most)
    for number, error in wrong.items():
        if not isinstance(error, Torn):
            raise UserError(f"{path} is damaged (line {number}: {error}): restore it, or move it away")
    return found


def streamed(path: Path) -> Iterator[bytes]:
    """The lines of a file one after the other, whatever they hold; none if there is no such file. Ends with the
    first LONGEST bytes of a line that is longer, as which a hole in the file reads. Raises OSError."""
    try:
        file = open(path, "rb", opener=regular)  # noqa: SIM115, closed below
    except FileNotFoundError:
        return
    with file:
        while line := file.readline(LONGEST):
            if line != b"\n":
                yield line
            if len(line) == LONGEST:
                return


def append(path: Path, values: dict[str, Any]) -> None:
    """Append one line at once; others may be writing too. It begins on a line of its own, whatever a kill has left
    behind. Raises OSError."""
    line = (json.dumps(values) + "\n").encode()
    with appended(path) as file:
        if size := os.fstat(file.fileno()).st_size:
            with open(path, "rb", opener=regular) as old:
                old.seek(size - 1)
                line = line if old.read(1) == b"\n" else b"\n" + line
        file.write(line)


class Lines:
    """A file with one JSON object per line. A disk that is slow, or full for a while, delays lines but loses none.

    Args:
        path: of the file, in the directory of the run.
        lease: checked before every write.
        say: shows the user a line.
        writer: writes beside training.

    Attributes:
        size: of all lines, in bytes, including those not on the disk yet.
        error: of the last write, until one succeeds.
        written: called by the writing thread when lines are in the file.
    """

    def __init__(self, path: Path, lease: Lease, say: Callable[[str], None], writer: Writer) -> None:
        self.path, self.size = path, 0
        self.error: OSError | None = None
        self.written: Callable[[], None] = lambda: None
        self._lease, self._say, self._writer = lease, say, writer
        self._file: HeldFile | None = None
        self._unwritten: deque[bytes] = deque()
        self._inside, self._settled = 0, 0  # bytes in the file, and those of them that are fsynced
        self._lock = Lock()  # guards the file: two threads write

    def begin(self) -> None:
        """Open for appending; half a line left by a kill is ended. Raises OSError."""
        self._file = appended(self.path)
        self.size = self._inside = self._settled = self.path.stat().st_size
        if self.size:
            with open(self.path, "rb", opener=regular) as file:
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":
                    self._file.write(b"\n")
                    self.size = self._inside = self.size + 1

    def add(self, values: dict[str, Any]) -> None:
        """Append one line. Does nothing on other ranks, where the file is not open."""
        if self._file is not None:
            line = (json.dumps(values) + "\n").encode()
            self._unwritten.append(line)
            self.size += len(line)
            self._writer.ask(self.path.name, self._try)

    def settle(self) -> None:
        """Bring all lines to the disk. Raises OSError."""
        if self._file is not None:
            self._try()
            if self.error:
                raise self.error
            inside = self._inside
            if self._settled < inside:
                os.fsync(self._file.fileno())  # without the lock, so that lines, and status.json after them, can go on
                self._settled = inside

    def _try(self) -> None:
        """Write the pending lines. If that fails, say so once and keep them for the next time."""
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
                if written < len(line):  # no room for the rest
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self._inside, written = self._inside + len(line), 0
                self._unwritten.popleft()
        except OSError:
            self._tear(written)
            raise

    def _tear(self, written: int) -> None:
        """Remove the `written` bytes of a line that a full disk cut short."""
        assert self._file is not None
        with suppress(OSError):
            self._file.truncate(self._inside)
