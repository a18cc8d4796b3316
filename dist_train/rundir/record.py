"""metrics.jsonl, the record of a run: one line a logged step, one a validation. Imports no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any

from dist_train.rundir.lease import Lease
from pipelines.files import read_jsonl, write_atomically

FILE = "metrics.jsonl"


def read(run: Path) -> list[dict[str, Any]]:
    """All lines of a run's record."""
    return read_jsonl(run / FILE)


class Record:
    """The record of a run while it grows. A disk that is full for a while delays lines, and loses none.

    Args:
        lease: checked before every write.
        say: shows the user a line.

    Attributes:
        error: why the last line could not be written, until it could.
    """

    def __init__(self, lease: Lease, say: Callable[[str], None]) -> None:
        self.path = lease.run / FILE
        self.error: OSError | None = None
        self._lease, self._say = lease, say
        self._file: FileIO | None = None
        self._size = 0
        self._unwritten: list[bytes] = []

    def open(self, size: int) -> None:
        """Begin or continue: what lies behind byte `size`, the restored state's, is cut off."""
        kept = self.path.read_bytes()[:size] if self.path.exists() else b""
        write_atomically(
            self.path, kept
        )  # a new file: a stale process that still has the old one open cannot add to it
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115  (open as long as the run)
        self._size = len(kept)

    def append(self, kind: str, **values: Any) -> None:
        """Add one line: {"kind": begun | step | validation | probe | changed, "step": ..., ...}. Nothing on other
        ranks, where it is not open."""
        if self._file is not None:
            self._unwritten.append((json.dumps({"kind": kind, **values}) + "\n").encode())
            self._write(self._file)

    def size(self) -> int:
        """Bytes of the record that are on the disk."""
        if self._file is not None:
            self._write(self._file)
            with suppress(OSError):
                os.fsync(self._file.fileno())
        return self._size

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _write(self, file: FileIO) -> None:
        """Write what is not yet written. If that fails, say so once and keep it for the next time."""
        try:
            if not self._lease.holds():
                return
            while self._unwritten:
                file.write(self._unwritten[0])
                self._size += len(self._unwritten.pop(0))
            self.error = None
        except OSError as error:
            if self.error is None:
                self._say(f"{FILE} cannot be written ({error}): the records are kept and written later")
            self.error = error
            with suppress(OSError):
                file.truncate(self._size)  # a full disk leaves half a line
