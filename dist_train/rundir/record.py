"""metrics.jsonl, the record of a run: one line per logged step and per validation. Imports no torch.

Values that depend on the machine (rates, waits, memory, durations) are under the key "machine"; all others are the
same, bit for bit, however often a run was stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from dist_train.rundir import lines
from dist_train.rundir.lease import Lease
from dist_train.rundir.lines import Lines
from dist_train.rundir.writer import Writer
from pipelines.files import regular, replacing
from pipelines.valid import MOST, Count, Finite, Invalid

FILE = "metrics.jsonl"
PIECE = 1 << 20  # bytes that are copied at once
MACHINE = "machine"
Amount = Annotated[float, Field(ge=0, lt=MOST, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


@dataclass
class Rates:
    """The format of "machine": what is read of it."""

    images_per_s: Amount = 0.0


@dataclass
class RecordLine:
    """The format of a line: what is read of it; there is more. A loss may be NaN."""

    kind: str
    step: Count = 0
    epoch: Count = 0
    progress: Amount = 0.0
    images: Count = 0
    loss: float = 0.0
    lr: Finite = 0.0
    train_error: Finite = 0.0
    top1_error: Share = 0.0
    top5_error: Share = 0.0
    images_per_s: Amount = 0.0  # of older versions
    machine: Rates = field(default_factory=Rates)


def read(run: Path) -> list[dict[str, Any]]:
    """Returns all lines of a run's record, without those that a kill has torn. Raises UserError for a line that is none
    of a record."""
    return lines.read(run / FILE, RecordLine)


def readable(run: Path) -> tuple[list[dict[str, Any]], dict[int, Invalid]]:
    """Returns the lines of a run's record, and what is wrong with others, by their number."""
    return lines.readable(run / FILE, RecordLine)


def streamed(run: Path) -> Iterator[bytes]:
    """The lines of a run's record one by one, unchecked; see `lines.streamed`. Raises OSError."""
    return lines.streamed(run / FILE)


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
        kept = 0
        with replacing(self.path) as new:  # a new file, so that a stale process with the old one open cannot add to it
            if self.path.exists():
                with open(self.path, "rb", opener=regular) as old:
                    while piece := old.read(min(PIECE, size - kept)):
                        kept += new.write(piece)
        if kept < size:
            self._say(f"{FILE} has {kept} of the {size} bytes that the checkpoint covers: lines are missing")
        self.begin()

    def append(self, kind: str, **values: Any) -> None:
        """Append one line: {"kind": begun | step | validation | probe | changed, "step": ..., ...}."""
        line = {"kind": kind, **values}
        self.add(line)
        self.told(line)
