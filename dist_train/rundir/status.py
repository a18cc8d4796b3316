"""status.json: the state of a run. The only module that reads or writes it; imports no torch."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, Literal

from dist_train.ranks import launcher
from dist_train.rundir.errors import Errors, Failure
from dist_train.rundir.lease import Lease
from dist_train.rundir.ledger import KEPT, Seconds
from dist_train.rundir.writer import Writer
from pipelines.errors import UserError
from pipelines.files import HeldFile, no_link, read_file, regular, write_atomically
from pipelines.valid import Count, Finite, Invalid, object_of

FILE = "status.json"
PERIOD = 10.0  # seconds between two heartbeats
SILENT = 60.0  # seconds without a heartbeat after which the process counts as gone
TRIES, BETWEEN = 5, 1.0  # attempts to write an end, and seconds between them
OVER = ("done", "stopped", "diverged", "failed")
GOING = ("starting", "running")
CRASH = "crash"  # set if a start under Slurm has noted how the previous one failed
MOST = 1 << 20  # bytes of the file
STAYS = (
    "step",
    "epoch",
    "orderly",
    "announced",
    *KEPT,
)  # kept by a start that has not claimed the run


@dataclass
class State:
    """The format of the file. All but the state may be missing; `rank`, `node` and `error` are of a failure."""

    state: Literal["starting", "running", "done", "stopped", "diverged", "failed"]
    reason: str = ""
    heartbeat: Seconds = 0.0
    step: Count = 0
    epoch: Count = 0
    pid: int = 0
    start: str = ""
    orderly: bool = False
    announced: Seconds = 0.0
    crash: bool = False
    began: Seconds = 0.0
    until: Seconds = 0.0
    seconds: dict[str, Seconds] = field(default_factory=dict)
    goodput: Finite = 0.0
    rank: Count = 0
    node: str = ""
    error: str = ""


def read(run: Path) -> dict[str, Any]:
    """Returns the latest content; empty before the first start. Raises OSError, and UserError for a damaged file."""
    path = run / FILE
    try:
        return object_of(State, read_file(path, MOST))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except Invalid as error:
        raise UserError(f"{path} is damaged ({error}): restore it, or move it away") from error


def known(run: Path) -> dict[str, Any]:
    """Like `read`, but empty for a damaged file, and what else a start replaces, or cannot. Raises OSError if the file
    system does not answer."""
    try:
        return read(run)
    except UserError:
        return {}
    except OSError as error:
        if error.errno != errno.ELOOP:  # a link to itself
            raise
        return {}


def write(run: Path, state: str, reason: str = "", **where: Any) -> None:
    """Write the file. `state`: starting, running, stopped, done, diverged or failed; `where`: step, epoch and the like.
    Raises OSError."""
    place(run, text_of(state, reason, **where))


class Status:
    """The status of one start, which remembers its last step and epoch.

    Args:
        lease: checked before every write.
        say: shows the user a line.
        writer: writes beside training.
        writes: whether this is rank 0; the others write only failures.
        ledger: returns the entries on time.

    Attributes:
        errors: of this start.
    """

    def __init__(
        self,
        lease: Lease,
        say: Callable[[str], None],
        writer: Writer,
        *,
        writes: bool,
        ledger: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        self.errors, self._ledger = Errors(lease), ledger
        self._lease, self._say, self._writer, self._writes = lease, say, writer, writes
        self._where: dict[str, int] = {}
        self._state, self._asked = "", 0.0
        self._last: Callable[[], None] = lambda: None  # the latest write requested
        self._lock, self._failed = Lock(), False  # the writer may be about to write "running"
        self._turn = Lock()  # one request after the other
        self._told = False  # that writing fails: the latest request is not on the disk

    def set(self, state: str, reason: str = "", **where: int) -> None:
        """`state` as for `write`; `where`: step and epoch, kept for the next time."""
        with self._turn:
            self._set(state, reason, **where)

    def waits(self, sentence: str) -> None:
        """Give what is waited for as the reason, unless the run has ended; from any thread."""
        with self._turn:
            if self._state in GOING:
                self._set(self._state, sentence)

    def _set(self, state: str, reason: str, **where: int) -> None:
        self._where |= where
        self._state, self._asked = state, time.monotonic()
        if self._writes:
            orderly = {"orderly": True} if state in ("done", "stopped") else {}  # tells how to count the time after it
            self._last = partial(self._write, state, reason, self._where | self._ledger() | orderly)
            self._writer.ask(FILE, self._last)

    def heartbeat(self, **where: int) -> None:
        """Note that the run is alive; rewrites the file every PERIOD seconds."""
        self._where |= where
        if self._state != "running" or time.monotonic() - self._asked > PERIOD:
            self.set("running")

    def _write(self, state: str, reason: str, where: dict[str, Any]) -> None:
        try:
            if state == "running" and self.errors.first():  # another rank has failed
                return
            with self._lock:
                if not self._failed and self._lease.holds():
                    write(self._lease.run, state, reason, **where, start=self._lease.token)
            self._told = False
        except OSError as error:
            if not self._told:
                self._say(f"{FILE} cannot be written ({error})")
            self._told = True

    def insist(self) -> None:
        """Retry, up to TRIES times, an end that could not be written."""
        for _ in range(TRIES if self._writes else 0):
            self._writer.wait()
            if not self._told or self._state not in OVER:
                return
            time.sleep(BETWEEN)
            self._writer.ask(FILE, self._last)

    def over(self) -> bool:
        """Whether status.json holds the end that was set."""
        found = known(self._lease.run)
        return self._state in OVER and (found.get("start"), found.get("state")) == (self._lease.token, self._state)

    def failed(self) -> Failure | None:
        """First failure of any rank in this start. Raises OSError.

        It may be visible sooner in status.json: NFS caches that a file is missing, but opens an existing one afresh.
        """
        found = known(self._lease.run)
        if self._lease.token and found.get("start") == self._lease.token and "error" in found:
            return Failure(found["rank"], found["node"], found["error"], found["reason"])
        return self.errors.first()

    def fail(self, first: Failure) -> None:
        """Write the first failure, of this or another rank. An end that this start has already reached is kept. Raises
        OSError."""
        if self._state in OVER or not self._lease.token or not self._lease.holds():
            return
        with self._lock:
            self._failed = True
            found = known(self._lease.run)
            if found.get("start") != self._lease.token or found.get("state") not in OVER:
                about = {"rank": first.rank, "node": first.node, "error": first.kind, "start": self._lease.token}
                state = "stopped" if first.kind == "Stopped" else "failed"
                stays = {key: found[key] for key in STAYS if key in found}
                write(self._lease.run, state, first.reason, **(stays | self._where), **about)


def place(run: Path, text: bytes) -> None:
    """Replace the file. Only ends other than a stop wait for the disk: a stop has little time, and the next start
    relies on the checkpoint."""
    path, ends = run / FILE, any(f'"state": "{state}"'.encode() in text for state in OVER if state != "stopped")
    try:
        write_atomically(path, text, durable=False)
        if ends:  # it already survives anything but a loss of power
            with HeldFile(path, opener=regular) as file:
                os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not path.exists():
            raise
        # Overwriting the old file needs no more room on a full disk.
        with open(path, "r+b", opener=no_link) as old:
            old.write(text)
            old.truncate()


def text_of(state: str, reason: str, **where: Any) -> bytes:
    body = {"state": state, "reason": reason, **where, "heartbeat": time.time(), "pid": os.getpid()}
    return (json.dumps(body, indent=1) + "\n").encode()


def taken(run: Path) -> bool:
    """Whether the run is done, or another start is alive in it."""
    found = known(run)
    age = time.time() - found.get("heartbeat", 0)
    states = ("running",) if "start" not in found else ("starting", "running")
    alive = found.get("state") in states and age < SILENT and not launcher.restarted()  # its last attempt
    return found.get("state") == "done" or alive
