"""One writer a run: the right of one start to write a run directory. Imports no torch."""

from __future__ import annotations

import uuid
from datetime import datetime
from pathlib import Path

from dist_train.outcomes import LeaseLost
from pipelines.files import write_atomically

FILE = "owner"


class Lease:
    """One start's right to write a run directory; lost for good when a later start acquires it.

    Attributes:
        token: the name of the start, which all its ranks know; empty before the run is claimed.
        lost: `holds` has found another start's token. All ranks learn of it by the vote at the next step.
    """

    def __init__(self, run: Path) -> None:
        self.run, self.lost = run, False
        self.token = ""

    def acquire(self) -> None:
        """Take the run over from whoever has it. Raises OSError."""
        self.token = f"{datetime.now():%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:8]}"
        write_atomically(self.run / FILE, self.token.encode())

    def holds(self) -> bool:
        """Whether the run is still this start's: asked before every write and rename. Raises OSError if the directory
        is gone."""
        if not self.lost:
            self.lost = (self.run / FILE).read_text(encoding="utf-8") != self.token
        return not self.lost

    def loss(self) -> LeaseLost:
        """To be raised on all ranks once one of them has found the lease lost."""
        return LeaseLost(f"another start has taken over {self.run}: this one exits")
