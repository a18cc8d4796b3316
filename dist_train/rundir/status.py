"""status.json: how a run is. The only module that reads or writes it; imports no torch."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

from dist_train.ranks import launcher
from dist_train.rundir.errors import Errors, Failure
from dist_train.rundir.lease import Lease
from dist_train.rundir.writer import Writer
from pipelines.errors import UserError
from pipelines.files import HeldFile, read_json, write_atomically

FILE = "status.json"
PERIOD = 10.0  # seconds between two heartbeats
SILENT = 60.0  # seconds without one, after which nobody is there
TRIES, BETWEEN = 5, 1.0  # to write an end, and seconds
OVER = ("done", "stopped", "diverged", "failed")


def read(run: Path) -> dict[str, Any]:
    """What was written last; empty before the first start. Raises UserError for a damaged file."""
    path = run / FILE
    body: dict[str, Any] = read_json(path) if path.exists() else {}
    return body


def known(run: Path) -> dict[str, Any]:
    """As `read`; nothing of a damaged file, which is written anew."""
    with suppress(UserError, TypeError, ValueError):
        return dict(read(run))
    return {}


def write(run: Path, state: str, reason: str = "", **where: Any) -> None:
    """`state`: starting, running, stopped, done, diverged or failed; `where`: step, epoch and the like. Raises
    OSError."""
    _place(run, _text(state, reason, **where))


class Announcement:
    """What status.json says of a start that has not claimed the run yet, and may be refused: that it begins, and what
    it waits for. It writes nothing over a run that is done, nor over one that another start is alive in.

    Args:
        writes: whether this is rank 0; the others only tell why they cannot begin.
    """

    def __init__(self, run: Path, *, writes: bool) -> None:
        self._run, self._writes, self._since = run, writes, time.time()
        self._before: bytes | None = None
        self._changed = 0  # when, in ns
        self._ours = b""
        self._lock, self._over = Lock(), False  # the watch may take back what is just being written
        self._made: list[Path] = []  # directories
        self._failed = ""  # the start before

    def say(self, what: str) -> None:
        """Begin, or go on: what is waited for now."""
        with self._lock, suppress(OSError):  # the claim will tell
            if self._writes and not self._over and (self._still_ours() if self._ours else self._begin()):
                self._put("starting", what + self._failed)

    def retract(self) -> None:
        """The start is refused: all is as it was."""
        with self._lock, suppress(OSError):
            path, self._over = self._run / FILE, True
            if not self._ours or not self._still_ours():
                return
            if self._before is None:
                path.unlink()
                for folder in self._made:
                    folder.rmdir()
            else:
                _place(self._run, self._before)
                os.utime(path, ns=(self._changed, self._changed))

    def fail(self, reason: str, **about: Any) -> None:
        """The start is over before it could claim the run, and the next one, or a person, is to know why."""
        with self._lock, suppress(OSError):
            found = known(self._run)
            told = self.failed() is not None or (about.get("error") == "Lost" and found.get("state") == "failed")
            if self._run.is_dir() and not told and (self._ours or not _taken(self._run)):
                self._put("failed", reason, **about)

    def failed(self) -> Failure | None:
        """Why another rank of this start cannot begin, if it has said so."""
        found = known(self._run)
        if found.get("state") != "failed" or found.get("heartbeat", 0) < self._since:
            return None
        with suppress(KeyError):  # of the cluster's, which knows no rank
            return Failure(found["rank"], found["node"], found["error"], found["reason"])
        return None

    def _still_ours(self) -> bool:
        """Whether no other rank has failed since."""
        return (self._run / FILE).read_bytes() == self._ours

    def _begin(self) -> bool:
        path = self._run / FILE
        if _taken(self._run):
            return False
        found = known(self._run)
        if found.get("state") == "failed":
            self._failed = f"; the start before this one failed: {found['reason']}"
        if path.exists():
            self._before, self._changed = path.read_bytes(), path.stat().st_mtime_ns
        self._made = [folder for folder in (self._run, *self._run.parents) if not folder.exists()]
        self._run.mkdir(parents=True, exist_ok=True)
        return True

    def _put(self, state: str, reason: str, **about: Any) -> None:
        kept = {key: value for key, value in known(self._run).items() if key in ("step", "epoch")}
        self._ours = _text(state, reason, **kept, **about)
        _place(self._run, self._ours)


class Status:
    """The status of one start, which keeps the place that it has come to.

    Args:
        lease: checked before every write.
        say: shows the user a line.
        writer: writes beside training.
        writes: whether this is rank 0; the others write only that they have failed.

    Attributes:
        errors: of this start.
    """

    def __init__(self, lease: Lease, say: Callable[[str], None], writer: Writer, *, writes: bool) -> None:
        self.errors = Errors(lease)
        self._lease, self._say, self._writer, self._writes = lease, say, writer, writes
        self._where: dict[str, int] = {}
        self._state, self._asked = "", 0.0
        self._last: Callable[[], None] = lambda: None  # what was asked for last
        self._lock, self._failed = Lock(), False  # the writer may be about to say that the run is well
        self._told = False  # that nothing can be written: what was asked for last is not

    def set(self, state: str, reason: str = "", **where: int) -> None:
        """`state` as for `write`; `where`: step and epoch, kept for the next time."""
        self._where |= where
        self._state, self._asked = state, time.monotonic()
        if self._writes:
            self._last = partial(self._write, state, reason, dict(self._where))
            self._writer.ask(FILE, self._last)

    def heartbeat(self, **where: int) -> None:
        """The run is alive: freshen the file now and then."""
        self._where |= where
        if self._state != "running" or time.monotonic() - self._asked > PERIOD:
            self.set("running")

    def _write(self, state: str, reason: str, where: dict[str, int]) -> None:
        try:
            if state == "running" and self.errors.first():  # another rank has said that it is not
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
        """An end that could not be written is tried again, some times."""
        for _ in range(TRIES if self._writes else 0):
            self._writer.wait()
            if not self._told or self._state not in OVER:
                return
            time.sleep(BETWEEN)
            self._writer.ask(FILE, self._last)

    def failed(self) -> Failure | None:
        """The failure that another rank, or this one, has met first in this start. Raises OSError.

        That of status.json may be seen sooner: on NFS a file that was not there is not looked for at once, and one that
        is there is opened anew.
        """
        found = known(self._lease.run)
        if self._lease.token and found.get("start") == self._lease.token and "error" in found:
            return Failure(found["rank"], found["node"], found["error"], found["reason"])
        return self.errors.first()

    def fail(self, first: Failure) -> None:
        """A rank, this one or another, was the first that could not go on. An end that this start has come to before
        stays. Raises OSError."""
        if self._state in OVER or not self._lease.token or not self._lease.holds():
            return
        with self._lock:
            self._failed = True
            found = known(self._lease.run)
            if found.get("start") != self._lease.token or found.get("state") not in OVER:
                about = {"rank": first.rank, "node": first.node, "error": first.kind, "start": self._lease.token}
                state = "stopped" if first.kind == "Stopped" else "failed"
                write(self._lease.run, state, first.reason, **self._where, **about)


def _place(run: Path, text: bytes) -> None:
    """Each rank by a file of its own, since several may write at once. A stop has only so much time, and what comes
    after it goes by the checkpoint: only the other ends are worth the wait for the disk."""
    path, ends = run / FILE, any(f'"state": "{state}"'.encode() in text for state in OVER if state != "stopped")
    try:
        write_atomically(path, text, by=f".{launcher.rank()}", durable=False)
        if ends:  # by now it is there for all who do not lose power
            with HeldFile(path) as file:
                os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not path.exists():
            raise
        # In the place of the old one there is room on a full disk, too.
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_NOFOLLOW), "wb") as old:
            old.write(text)
            old.truncate()


def _text(state: str, reason: str, **where: Any) -> bytes:
    body = {"state": state, "reason": reason, **where, "heartbeat": time.time(), "pid": os.getpid()}
    return (json.dumps(body, indent=1) + "\n").encode()


def _taken(run: Path) -> bool:
    """Whether the run is done, or another start alive in it."""
    found = known(run)
    age = time.time() - found.get("heartbeat", 0)
    states = ("running",) if "start" not in found else ("starting", "running")
    alive = found.get("state") in states and age < SILENT and not launcher.restarted()  # its last attempt
    return found.get("state") == "done" or alive
