"""metrics.jsonl, the record of a run: one line per logged step and per validation. Imports no torch.

Values that depend on the machine (rates, waits, memory, durations) are under the key "machine"; all others are the
same, bit for bit, however often a run was stopped.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dist_train.rundir.lease import Lease
from dist_train.rundir.lines import Lines
from dist_train.rundir.writer import Writer
from pipelines.files import read_jsonl, write_atomically

FILE = "metrics.jsonl"
MACHINE = "machine"


def read(run: Path) -> list[dict[str, Any]]:
    """Returns all lines of a run's record."""
    return read_jsonl(run / FILE)


def rate(line: dict[str, Any]) -> float | None:
    """Images per second from a step's line; older versions have it beside the loss."""
    found = line.get(MACHINE, line).get("images_per_s")
    return None if found is None else float(found)


class Record(Lines):
    """The record of a run while it grows; see `Lines`.

    Attributes:
        told: called with each new line, immediately.
    """

    def __init__(self, lease: Lease, say: Callable[[str], None], writer: Writer) -> None:
        super().__init__(lease.run / FILE, lease, say, writer)
        self.told: Callable[[dict[str, Any]], None] = lambda _: None

    def open(self, size: int) -> None:
        """Begin or continue; everything after byte `size`, that of the restored state, is cut off. Raises OSError."""
        kept = self.path.read_bytes()[:size] if self.path.exists() else b""
        if len(kept) < size:
            self._say(f"{FILE} has {len(kept)} of the {size} bytes that the checkpoint covers: lines are missing")
        # A new file, so that a stale process with the old one open cannot add to it.
        write_atomically(self.path, kept)
        self.begin()

    def append(self, kind: str, **values: Any) -> None:
        """Append one line: {"kind": begun | step | validation | probe | changed, "step": ..., ...}."""
        line = {"kind": kind, **values}
        self.add(line)
        self.told(line)
