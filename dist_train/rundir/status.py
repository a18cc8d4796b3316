"""status.json: how a run is. The only module that reads or writes it; imports no torch."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dist_train.rundir.lease import Lease
from pipelines.files import read_json, write_atomically

FILE = "status.json"
PERIOD = 10.0  # seconds between two heartbeats


def read(run: Path) -> dict[str, Any]:
    """What was written last; empty before the first start. Raises UserError for a damaged file."""
    path = run / FILE
    body: dict[str, Any] = read_json(path) if path.exists() else {}
    return body


def write(run: Path, state: str, reason: str = "", **where: Any) -> None:
    """`state`: running, stopped, done, diverged or failed; `where`: step and epoch. Raises OSError."""
    body = {"state": state, "reason": reason, **where, "heartbeat": time.time(), "pid": os.getpid()}
    write_atomically(run / FILE, (json.dumps(body, indent=1) + "\n").encode())


class Status:
    """The status of one start, which keeps the place that it has come to.

    Args:
        lease: checked before every write.
        say: shows the user a line.
        writes: whether this is rank 0; the others write nothing.
    """

    def __init__(self, lease: Lease, say: Callable[[str], None], *, writes: bool) -> None:
        self._lease, self._say, self._writes = lease, say, writes
        self._where: dict[str, int] = {}
        self._written = 0.0

    def set(self, state: str, reason: str = "", **where: int) -> None:
        """`state` as for `write`; `where`: step and epoch, kept for the next time."""
        self._where |= where
        self._written = time.monotonic()
        if not self._writes:
            return
        try:
            if self._lease.holds():
                write(self._lease.run, state, reason, **self._where)
        except OSError as error:
            self._say(f"{FILE} cannot be written ({error})")

    def heartbeat(self, **where: int) -> None:
        """The run is alive: freshen the file now and then."""
        self._where |= where
        if time.monotonic() - self._written > PERIOD:
            self.set("running")
