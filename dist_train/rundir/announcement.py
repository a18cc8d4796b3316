"""The entry in status.json of a start that has not claimed its run yet. Imports no torch."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any

from dist_train.ranks import launcher
from dist_train.rundir import status
from dist_train.rundir.errors import Failure
from pipelines.files import read_file

FIRST = ".failed.tmp"  # made by the first rank that fails before the run is claimed; the claim removes it


class Announcement:
    """The entry in status.json of a start that has not claimed the run yet, and may be refused: that it is starting,
    and what it waits for. A run that is done, or in which another start is alive, is not overwritten.

    Args:
        writes: whether this is rank 0; the others only report why they cannot start.

    Attributes:
        before: content of status.json when this start began.
    """

    def __init__(self, run: Path, *, writes: bool) -> None:
        self._run, self._writes, self._since = run, writes, time.time()
        self.before = status.known(run)
        self._before: bytes | None = None
        self._changed = 0  # when, in ns
        self._ours = b""
        self._lock, self._over = Lock(), False  # the watch may retract while this writes
        self._made: list[Path] = []  # directories created here
        self._failed = ""  # why the start before failed

    def say(self, what: str) -> None:
        """Announce the start, or update what it is waiting for."""
        with self._lock, suppress(OSError):  # the claim will report it
            if self._writes and not self._over and (self._still_ours() if self._ours else self._begin()):
                self._put("starting", what + self._failed)

    def retract(self) -> None:
        """Restore the previous state of the directory: the start was refused."""
        with self._lock, suppress(OSError):
            path, self._over = self._run / status.FILE, True
            if not self._ours or not self._still_ours():
                return
            if self._before is None:
                path.unlink()
                for folder in self._made:
                    folder.rmdir()
            else:
                status.place(self._run, self._before)
                os.utime(path, ns=(self._changed, self._changed))

    def fail(self, reason: str, **about: Any) -> bool:
        """Record why the start ended before it could claim the run. Returns whether this rank is to report it: no other
        rank has, and no other start is alive; rank 0 is, if the file system does not answer."""
        with self._lock:
            try:
                found = status.known(self._run)
                told = self.failed() is not None or (about.get("error") == "Lost" and found.get("state") == "failed")
                if told or not (self._ours or not status.taken(self._run)):
                    return False
                if self._run.is_dir():
                    self._put("failed", reason, **about)
                    return launcher.attended() or self._is_first()  # the mark matters only to those that send messages
            except OSError:
                pass
            return launcher.rank() == 0

    def _is_first(self) -> bool:
        """Whether this rank is the first of this start to fail; if several fail at once, the file system decides."""
        for _ in range(2):
            try:
                (self._run / FIRST).touch(exist_ok=False)
                return True
            except FileExistsError:
                if not self._remove_stale():
                    break
        return False

    def _remove_stale(self) -> bool:
        """Remove the mark of an earlier start's failure. Returns whether there was one."""
        path = self._run / FIRST
        with suppress(FileNotFoundError):
            if path.stat().st_mtime < self._since:
                path.unlink()
                return True
        return False

    def failed(self) -> Failure | None:
        """Failure that another rank of this start has recorded, if any."""
        found = status.known(self._run)
        if found.get("state") != "failed" or found.get("heartbeat", 0) < self._since:
            return None
        with suppress(KeyError):  # written by slurm.job, which knows no rank
            return Failure(found["rank"], found["node"], found["error"], found["reason"])
        return None

    def _still_ours(self) -> bool:
        """Whether no other rank has failed since."""
        return read_file(self._run / status.FILE) == self._ours

    def _begin(self) -> bool:
        path = self._run / status.FILE
        if status.taken(self._run):
            return False
        found = status.known(self._run)
        if found.get("state") == "failed":
            self._failed = f"; the start before this one failed: {found['reason']}"
        if path.exists():
            self._before, self._changed = read_file(path), path.stat().st_mtime_ns
        self._remove_stale()
        self._made = [folder for folder in (self._run, *self._run.parents) if not folder.exists()]
        self._run.mkdir(parents=True, exist_ok=True)
        return True

    def _put(self, state: str, reason: str, **about: Any) -> None:
        kept = {key: value for key, value in status.known(self._run).items() if key in status.STAYS}
        self._ours = status.text_of(state, reason, **{"announced": self._since, **kept}, **about)
        status.place(self._run, self._ours)
