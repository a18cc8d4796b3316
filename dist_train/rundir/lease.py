"""One writer a run, and no endless restarts."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path

from pipelines.files import write_atomically

OWNER, STARTS = "owner", "starts.json"
RESTARTS = 3  # automatic ones in a row that begin at the same step


class Superseded(Exception):
    """Another start has taken over the run directory."""


class Owner:
    """The claim of one start on a run directory. The newest start wins; a stale process that finds another's token
    leaves."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.token = directory, ""

    def claim(self) -> None:
        self.token = uuid.uuid4().hex
        write_atomically(self.directory / OWNER, self.token.encode())

    def check(self) -> None:
        """Raises Superseded where another start has claimed the run, and OSError where the directory is gone."""
        if (self.directory / OWNER).read_text() != self.token:
            raise Superseded(f"another start has taken over {self.directory}: this one leaves it alone")


class NoProgress(Exception):
    """The run was restarted again and again at the same step."""


def check_progress(directory: Path, step: int) -> None:
    """Note that a start begins at `step`. Raises NoProgress where it is the third restart in a row to begin there.

    torchrun's restarts count; a start by hand begins anew. Under Slurm `slurm.job` counts, since there a start may fail
    before this.
    """
    path = directory / STARTS
    automatic = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    before = json.loads(path.read_text()) if path.exists() else {}
    count = before["count"] + 1 if automatic and before.get("step") == step else int(automatic)
    write_atomically(path, json.dumps({"step": step, "count": count}).encode())
    if count >= RESTARTS:
        raise NoProgress(f"{count} automatic restarts began at step {step} without progress: see the log")
