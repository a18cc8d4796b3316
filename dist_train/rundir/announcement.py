"""What status.json says of a start that has not claimed its run yet. Imports no torch."""

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

FIRST = ".failed.tmp"  # the mark of the rank that was first to fail before the run was claimed; the claim removes it


class Announcement:
    """What status.json says of a start that has not claimed the run yet, and may be refused: that it begins, and what
    it waits for. It writes nothing over a run that is done, nor over one that another start is alive in.

    Args:
        writes: whether this is rank 0; the others only tell why they cannot begin.

    Attributes:
        before: what status.json said when this start began.
    """

    def __init__(self, run: Path, *, writes: bool) -> None:
        self._run, self._writes, self._since = run, writes, time.time()
        self.before = status.known(run)
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
        """The start is over before it could claim the run, and the next one, or a person, is to know why. Returns
        whether no other rank has said so, nor another start is alive; what does not answer, rank 0 has said."""
        with self._lock:
            try:
                found = status.known(self._run)
                told = self.failed() is not None or (about.get("error") == "Lost" and found.get("state") == "failed")
                if told or not (self._ours or not status.taken(self._run)):
                    return False
                if self._run.is_dir():
                    self._put("failed", reason, **about)
                    return launcher.attended() or self._is_first()  # the mark is for those that tell others
            except OSError:
                pass
            return launcher.rank() == 0

    def _is_first(self) -> bool:
        """Whether this rank is the first of this start to fail: several may at once, and the file system decides."""
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
        """Why another rank of this start cannot begin, if it has said so."""
        found = status.known(self._run)
        if found.get("state") != "failed" or found.get("heartbeat", 0) < self._since:
            return None
        with suppress(KeyError):  # of the cluster's, which knows no rank
            return Failure(found["rank"], found["node"], found["error"], found["reason"])
        return None

    def _still_ours(self) -> bool:
        """Whether no other rank has failed since."""
        return (self._run / status.FILE).read_bytes() == self._ours

    def _begin(self) -> bool:
        path = self._run / status.FILE
        if status.taken(self._run):
            return False
        found = status.known(self._run)
        if found.get("state") == "failed":
            self._failed = f"; the start before this one failed: {found['reason']}"
        if path.exists():
            self._before, self._changed = path.read_bytes(), path.stat().st_mtime_ns
        self._remove_stale()
        self._made = [folder for folder in (self._run, *self._run.parents) if not folder.exists()]
        self._run.mkdir(parents=True, exist_ok=True)
        return True

    def _put(self, state: str, reason: str, **about: Any) -> None:
        kept = {key: value for key, value in status.known(self._run).items() if key in status.STAYS}
        self._ours = status.text_of(state, reason, **{"announced": self._since, **kept}, **about)
        status.place(self._run, self._ours)
