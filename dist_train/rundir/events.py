"""events.jsonl, the story of a run over all its starts: added to, and never cut back. Imports no torch.

    {"time": 1767323045.2, "event": "start", "start": "20260102-...", ...}

start        a start has claimed the run: step, checkpoint that it goes on from ("" at the beginning), nodes,
             world_size, device, versions, code, job (Slurm's number), restart (how often torchrun or Slurm has
             started it anew), pid
killed       found by the next start: the one before it (of) ended without a word; its node, last heartbeat, step,
             epoch, and the reason if another has left one
requeued     Slurm has brought the job back: job, restart
changed      settings, or the code, differ from those of the start before: step, settings {key: [was, is]},
             code [was, is]
division     of the learning rate: step, epoch, lr (the new one), error
bad_samples  samples that could not be decoded: step, epoch, samples (in all)
alert        a sentence for whoever looks: step, epoch, sentence
end          how this start ended: state, reason, code, step, epoch, requeued (Slurm brings the job back), and what the
             ledger says; of a failure also rank, node and error
given_up     no further start is made: reason

"start" is the name of the start that an event is of, or "" if it is of none that has claimed the run.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dist_train.rundir.lease import Lease
from dist_train.rundir.lines import Lines
from dist_train.rundir.writer import Writer
from pipelines.files import HeldFile, no_link, readable_jsonl

FILE = "events.jsonl"


def read(run: Path) -> list[dict[str, Any]]:
    """All events of a run, without lines that are damaged."""
    return readable_jsonl(run / FILE)[0]


def tell(run: Path, event: str, **values: Any) -> None:
    """Add one event at once, whoever else writes. Raises OSError."""
    line = (json.dumps({"time": time.time(), "event": event, "start": "", **values}) + "\n").encode()
    path = run / FILE
    with HeldFile(path, "ab", opener=no_link) as file:
        if size := os.fstat(file.fileno()).st_size:
            with open(path, "rb") as old:
                old.seek(size - 1)
                line = line if old.read(1) == b"\n" else b"\n" + line  # half of one that a kill has left
        file.write(line)


class Events(Lines):
    """The story of a run while it goes on; see `Lines`."""

    def __init__(self, lease: Lease, say: Callable[[str], None], writer: Writer) -> None:
        super().__init__(lease.run / FILE, lease, say, writer)

    def append(self, event: str, **values: Any) -> None:
        """Add one event of those above."""
        self.add({"time": time.time(), "event": event, "start": self._lease.token, **values})

    def tell(self, event: str, **values: Any) -> None:
        """Add one event at once, from any rank, if the run is still this start's. Raises OSError."""
        if self._lease.token and self._lease.holds():
            tell(self._lease.run, event, start=self._lease.token, **values)

    def _tear(self, written: int) -> None:
        """What stands there stays, since others may have written behind it; the line is begun anew."""
        if written:
            self._unwritten[0] = b"\n" + self._unwritten[0].lstrip(b"\n")
