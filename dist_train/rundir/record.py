"""metrics.jsonl, the record of a run: one line a logged step, one a validation. Imports no torch."""

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
from pipelines.files import HeldFile, read_jsonl, write_atomically

FILE = "metrics.jsonl"


def read(run: Path) -> list[dict[str, Any]]:
    """All lines of a run's record."""
    return read_jsonl(run / FILE)


class Record:
    """The record of a run while it grows. A disk that is slow, or full for a while, delays lines, and loses none.

    Args:
        lease: checked before every write.
        say: shows the user a line.
        writer: writes beside training.

    Attributes:
        size: of all lines, in bytes, those included that are not on the disk yet.
        error: why the last line could not be written, until it could.
    """

    def __init__(self, lease: Lease, say: Callable[[str], None], writer: Writer) -> None:
        self.path = lease.run / FILE
        self.size = 0
        self.error: OSError | None = None
        self._lease, self._say, self._writer = lease, say, writer
        self._file: HeldFile | None = None
        self._unwritten: deque[bytes] = deque()
        self._written, self._settled = 0, 0  # bytes in the file, and of these on the disk for good
        self._lock = Lock()  # of the file: two threads write

    def open(self, size: int) -> None:
        """Begin or continue: what lies behind byte `size`, the restored state's, is cut off. Raises OSError."""
        kept = self.path.read_bytes()[:size] if self.path.exists() else b""
        if len(kept) < size:
            self._say(f"{FILE} has {len(kept)} bytes of the {size} that the checkpoint speaks of: lines are missing")
        write_atomically(
            self.path, kept
        )  # a new file: a stale process that still has the old one open cannot add to it
        self._file = HeldFile(self.path, "ab")
        self.size = self._written = self._settled = len(kept)

    def append(self, kind: str, **values: Any) -> None:
        """Add one line: {"kind": begun | step | validation | probe | changed, "step": ..., ...}. Nothing on other
        ranks, where it is not open."""
        if self._file is not None:
            line = (json.dumps({"kind": kind, **values}) + "\n").encode()
            self._unwritten.append(line)
            self.size += len(line)
            self._writer.ask(FILE, self._try)

    def settle(self) -> None:
        """Have all lines on the disk. Raises OSError."""
        if self._file is not None:
            self._try()
            if self.error:
                raise self.error
            written = self._written
            if self._settled < written:
                os.fsync(self._file.fileno())  # without the lock: lines, and status.json behind them, go on
                self._settled = written

    def _try(self) -> None:
        """Write what is not yet written. If that fails, say so once and keep it for the next time."""
        with self._lock:
            try:
                self._write()
                self.error = None
            except OSError as error:
                if self.error is None:
                    self._say(f"{FILE} cannot be written ({error}): the records are kept and written later")
                self.error = error

    def _write(self) -> None:
        assert self._file is not None
        if not self._unwritten or not self._lease.holds():
            return
        try:
            while self._unwritten:
                line = self._unwritten[0]
                if self._file.write(line) < len(line):  # there was room for so much
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self._written += len(line)
                self._unwritten.popleft()
        except OSError:
            with suppress(OSError):
                self._file.truncate(self._written)  # a full disk leaves half a line
            raise
