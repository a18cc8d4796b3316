"""metrics.jsonl, the record of a run: one line a logged step, one a validation. Imports no torch.

What depends on the machine (rates, waits, memory, durations) stands under the key "machine"; all else is the same, bit
for bit, however often a run was stopped.
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
    """All lines of a run's record."""
    return read_jsonl(run / FILE)


def rate(line: dict[str, Any]) -> float | None:
    """Images per second of a step's line; earlier programs have it beside the loss."""
    found = line.get(MACHINE, line).get("images_per_s")
    return None if found is None else float(found)


class Record(Lines):
    """The record of a run while it grows; see `Lines`.

    Attributes:
        told: called with each new line, at once.
    """

    def __init__(self, lease: Lease, say: Callable[[str], None], writer: Writer) -> None:
        super().__init__(lease.run / FILE, lease, say, writer)
        self.told: Callable[[dict[str, Any]], None] = lambda _: None

    def open(self, size: int) -> None:
        """Begin or continue: what lies behind byte `size`, the restored state's, is cut off. Raises OSError."""
        kept = self.path.read_bytes()[:size] if self.path.exists() else b""
        if len(kept) < size:
            self._say(f"{FILE} has {len(kept)} bytes of the {size} that the checkpoint speaks of: lines are missing")
        # A new file: a stale process that still has the old one open cannot add to it.
        write_atomically(self.path, kept)
        self.begin()

    def append(self, kind: str, **values: Any) -> None:
        """Add one line: {"kind": begun | step | validation | probe | changed, "step": ..., ...}."""
        line = {"kind": kind, **values}
        self.add(line)
        self.told(line)
