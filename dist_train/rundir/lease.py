"""One writer per run: the right of one start to write a run directory. Imports no torch."""

from __future__ import annotations

import uuid
from datetime import datetime
from pathlib import Path

from dist_train.outcomes import Ended, LeaseLost, NotSaved
from pipelines.files import read_file, write_atomically

FILE = "owner"
TAKEN, GONE = 1, 2  # how a lease is lost


class Lease:
    """One start's right to write a run directory; lost for good when a later start acquires it.

    Attributes:
        token: name of the start, known to all its ranks; empty before the run is claimed.
        lost: TAKEN if `holds` found another start's token, GONE if it found none, else 0. All ranks learn of it from
            the vote at the next step.
    """

    def __init__(self, run: Path) -> None:
        self.run, self.lost = run, 0
        self.token = ""

    def acquire(self) -> None:
        """Take the run over from whoever holds it. Raises OSError."""
        token = f"{datetime.now():%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:8]}"
        write_atomically(self.run / FILE, token.encode())
        self.token = token

    def holds(self) -> bool:
        """Whether this start still owns the run; checked before every write and rename. Raises OSError if the file
        system does not answer."""
        if not self.lost:
            try:
                self.lost = TAKEN * (read_file(self.run / FILE, 1 << 10).decode(errors="replace") != self.token)
            except FileNotFoundError:
                self.lost = GONE
        return not self.lost

    def loss(self, how: int) -> Ended:
        """Exception for all ranks to raise once one of them has found the lease lost; `how`: as in `lost`."""
        if how == GONE:
            return NotSaved(f"the state could not be saved: {self.run} was moved or removed while the run went on")
        return LeaseLost(f"another start has taken over {self.run}: this one exits")
