"""One writer a run: the right of one start to write a run directory. Imports no torch."""

from __future__ import annotations

import uuid
from pathlib import Path

from dist_train.outcomes import LeaseLost
from pipelines.files import write_atomically

FILE = "owner"


class Lease:
    """One start's right to write a run directory; lost for good when a later start acquires it.

    Attributes:
        lost: `holds` has found another start's token. All ranks learn of it by the vote at the next step.
    """

    def __init__(self, run: Path) -> None:
        self.run, self.lost = run, False
        self._token = ""

    def acquire(self) -> None:
        """Take the run over from whoever has it. Raises OSError."""
        self._token = uuid.uuid4().hex
        write_atomically(self.run / FILE, self._token.encode())

    def holds(self) -> bool:
        """Whether the run is still this start's: asked before every write and rename. Raises OSError if the directory
        is gone."""
        if not self.lost:
            self.lost = (self.run / FILE).read_text() != self._token
        return not self.lost

    def loss(self) -> LeaseLost:
        """To be raised on all ranks once one of them has found the lease lost."""
        return LeaseLost(f"another start has taken over {self.run}: this one exits")
