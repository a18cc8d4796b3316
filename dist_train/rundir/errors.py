"""errors/<start>/: what each rank of a start had to say when it could not go on, and which of them was the first.

    rank-3.txt    a sentence, then the traceback, or the stacks of all threads
    first.json    rank, node, kind and sentence of the first one: what status.json says too

Imports no torch.
"""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from dist_train.rundir.lease import Lease

FOLDER, FIRST = "errors", "first.json"
HEAD = re.compile(r"rank (\d+) on (.*) is at step (\d+), in (.*)")


@dataclass(frozen=True)
class Failure:
    """Why a rank cannot go on.

    Attributes:
        kind: the class of the exception, or one of Hang, Lost (another rank, which may have said why), Refused
            (by another rank), Forced (a stop without a save) and Stopped (before there was anything to save).
        reason: one sentence.
    """

    rank: int
    node: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Standstill:
    """Where a rank stood still: a step, from 1, and a line of the program."""

    rank: int
    node: str
    step: int
    line: str

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.node} is at step {self.step}, in {self.line}"


class Errors:
    """The errors of one start. Nothing is written before the run is claimed, nor after it is lost."""

    def __init__(self, lease: Lease) -> None:
        self._lease = lease

    @property
    def folder(self) -> Path:
        return self._lease.run / FOLDER / self._lease.token

    def first(self) -> Failure | None:
        """The first failure of any rank, if there is one. Raises OSError."""
        path = self.folder / FIRST
        if not self._lease.token or not path.exists():
            return None
        with suppress(ValueError, TypeError):
            return Failure(**json.loads(path.read_text(encoding="utf-8")))
        return None

    def enter(self, failure: Failure) -> Failure:
        """Make a failure the first one if no rank was faster. Returns the first one. Raises OSError."""
        if not self._lease.token or not self._lease.holds():
            return failure
        self.folder.mkdir(parents=True, exist_ok=True)
        whole = self.folder / f".{FIRST}.{failure.rank}"
        try:
            whole.write_text(json.dumps(asdict(failure)), encoding="utf-8")
            os.link(whole, self.folder / FIRST)  # which one succeeds is decided by the file system
        except FileExistsError:
            return self.first() or failure
        finally:
            whole.unlink(missing_ok=True)
        return failure

    def amend(self, failure: Failure) -> None:
        """The first one has found out more. Raises OSError."""
        (self.folder / FIRST).write_text(json.dumps(asdict(failure)), encoding="utf-8")

    def write(self, rank: int, text: str) -> None:
        """What a rank says in full. Raises OSError."""
        if self._lease.token and self._lease.holds():
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / f"rank-{rank}.txt").write_text(text, encoding="utf-8", errors="backslashreplace")

    def places(self) -> list[Standstill]:
        """Where the ranks stood still, of those that have said it. Raises OSError."""
        found = []
        for path in self.folder.glob("rank-*.txt"):
            with open(path, encoding="utf-8", errors="replace") as file:
                if head := HEAD.match(file.readline().rstrip("\n")):
                    found.append(Standstill(int(head[1]), head[2], int(head[3]), head[4]))
        return sorted(found, key=lambda place: place.rank)
