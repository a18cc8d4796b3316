"""events.jsonl, the event log of a run over all its starts: only ever appended to. Imports no torch.

    {"time": 1767323045.2, "event": "start", "start": "20260102-...", ...}

start        a start has claimed the run: step, checkpoint that it resumes from ("" at the beginning), nodes,
             world_size, device, versions, code (see `code.version`), environment (files: see `environment.py`), job
             (Slurm's number), restart (number of restarts by torchrun or Slurm), pid
killed       found by the next start: the previous one (of) ended without notice; its node, last heartbeat, step,
             epoch, and the reason if another process left one
requeued     Slurm has requeued the job: job, restart
changed      settings or code differ from the previous start's: step, settings {key: [was, is]}, code [was, is]; for
             code also exact_until: the step after which the bits are not promised to be those of an unchanged code
division     of the learning rate: step, epoch, lr (the new one), error
bad_samples  samples that could not be decoded: step, epoch, samples (in all)
alert        a sentence for the user: step, epoch, sentence
profile      steps were recorded: first, step (the last one), seconds, host and gpu, shares of the time; see `trace.py`
end          how this start ended: state, reason, code, step, epoch, requeued (Slurm requeues the job), and the
             ledger's entries; for a failure also rank, node and error
given_up     no further start is made: reason

"start" is the name of the start that an event belongs to, or "" if that has not claimed the run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dist_train.rundir import lines
from dist_train.rundir.lease import Lease
from dist_train.rundir.ledger import Seconds
from dist_train.rundir.lines import Lines
from dist_train.rundir.writer import Writer
from pipelines.valid import Count

FILE = "events.jsonl"
MOST = 1 << 24  # bytes of the file


@dataclass
class Event:
    """The format of a line: what is read of it; there is more."""

    event: str
    time: Seconds = 0.0
    start: str = ""
    step: Count = 0
    epoch: Count = 0
    state: str = ""
    reason: str = ""
    nodes: list[str] = field(default_factory=list)
    node: str = ""
    heartbeat: Seconds | None = None


def read(run: Path) -> list[dict[str, Any]]:
    """Returns all events of a run, without damaged lines."""
    return lines.readable(run / FILE, Event, MOST)[0]


def tell(run: Path, event: str, **values: Any) -> None:
    """Append one event at once; others may be writing too. Raises OSError."""
    lines.append(run / FILE, {"time": time.time(), "event": event, "start": "", **values})


class Events(Lines):
    """The event log of a run while it grows; see `Lines`."""

    def __init__(self, lease: Lease, say: Callable[[str], None], writer: Writer) -> None:
        super().__init__(lease.run / FILE, lease, say, writer)

    def append(self, event: str, **values: Any) -> None:
        """Append one of the events above."""
        self.add({"time": time.time(), "event": event, "start": self._lease.token, **values})

    def tell(self, event: str, **values: Any) -> None:
        """Append one event at once, from any rank, if this start still holds the lease. Raises OSError."""
        if self._lease.token and self._lease.holds():
            tell(self._lease.run, event, start=self._lease.token, **values)

    def _tear(self, written: int) -> None:
        """Keep the partial line, since others may have written behind it, and write the line again."""
        if written:
            self._unwritten[0] = b"\n" + self._unwritten[0].lstrip(b"\n")
