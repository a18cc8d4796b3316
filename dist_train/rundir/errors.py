"""errors/<start>/: the failure of each rank of a start, and which came first.

    rank-3.txt    a sentence, then the traceback, or the stacks of all threads
    first.json    rank, node, kind and sentence of the first failure, as in status.json

Imports no torch.
"""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from secrets import token_hex

from dist_train.rundir.lease import Lease
from pipelines.files import folder, new_file, read_file, regular, write_atomically
from pipelines.valid import Count, Invalid, parsed

FOLDER, FIRST = "errors", "first.json"
HEAD = re.compile(r"rank (\d+) on (.*) is at step (\d+), in (.*)")


@dataclass(frozen=True)
class Failure:
    """Why a rank cannot continue.

    Attributes:
        kind: class of the exception, or one of Hang, Lost (another rank is gone, perhaps with a reason given), Refused
            (by another rank), Forced (a stop without a save) and Stopped (before there was anything to save).
        reason: one sentence.
    """

    rank: Count
    node: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Standstill:
    """Where a rank is stuck: step, counted from 1, and line of the program."""

    rank: int
    node: str
    step: int
    line: str

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.node} is at step {self.step}, in {self.line}"


class Errors:
    """The errors of one start. Nothing is written before the run is claimed, or after its lease is lost."""

    def __init__(self, lease: Lease) -> None:
        self._lease = lease

    @property
    def folder(self) -> Path:
        return self._lease.run / FOLDER / self._lease.token

    def first(self) -> Failure | None:
        """First failure of any rank, if there is one. Raises OSError."""
        path = self.folder / FIRST
        if not self._lease.token or not path.exists():
            return None
        with suppress(Invalid):
            return parsed(Failure, read_file(path, 1 << 20))
        return None

    def enter(self, failure: Failure) -> Failure:
        """Record a failure as the first unless another rank was faster. Returns the first failure. Raises OSError."""
        if not self._lease.token or not self._lease.holds():
            return failure
        self._make()
        whole = self.folder / f".{FIRST}.{token_hex(8)}"
        try:
            with new_file(whole) as file:
                file.write(_as_json(failure))
            os.link(whole, self.folder / FIRST)  # the file system decides which rank succeeds
        except FileExistsError:
            return self.first() or failure
        finally:
            whole.unlink(missing_ok=True)
        return failure

    def _make(self) -> None:
        for path in (self.folder.parent, self.folder):
            folder(path)

    def amend(self, failure: Failure) -> None:
        """Replace the first failure, of which its rank has found out more. Raises OSError."""
        write_atomically(self.folder / FIRST, _as_json(failure), durable=False)

    def write(self, rank: int, text: str) -> None:
        """Write the full report of a rank. Raises OSError."""
        if self._lease.token and self._lease.holds():
            self._make()
            write_atomically(self.folder / f"rank-{rank}.txt", text.encode(errors="backslashreplace"), durable=False)

    def places(self) -> list[Standstill]:
        """Where the ranks are stuck, for those that have reported it. Raises OSError."""
        found = []
        for path in self.folder.glob("rank-*.txt"):
            with open(path, encoding="utf-8", errors="replace", opener=regular) as file:
                if head := HEAD.match(file.readline().rstrip("\n")):
                    found.append(Standstill(int(head[1]), head[2], int(head[3]), head[4]))
        return sorted(found, key=lambda place: place.rank)


def _as_json(failure: Failure) -> bytes:
    return json.dumps(asdict(failure)).encode()
