"""Open tars of a set: no more than this process may have, reopened if the file system fails for a while."""

from __future__ import annotations

import errno
import resource
import time
from collections import OrderedDict
from collections.abc import Callable, Collection
from contextlib import suppress
from threading import Lock
from typing import ClassVar, TypeVar
from weakref import WeakSet

from pipelines.files import HeldFile, lost
from pipelines.speech import say

T = TypeVar("T")
OPEN, FEWEST = 256, 8  # tars kept open per set: at most, and at least under a low limit
RESERVE = 128  # open files left to the rest of the process: sockets, pipes, libraries, GPU devices
HIGHEST = 65536  # limit of open files that a process asks for
PATIENCE = 60.0  # seconds for which a failing read is retried
FULL = 2.0  # the same if too many files are open
QUIET = 1.0  # the first of these seconds, in which nothing is reported
FIRST, LONGEST = 0.1, 5.0  # seconds between tries: doubled each time
TOO_MANY = (errno.EMFILE, errno.ENFILE)
# Transient errors, above all of network file systems. ENOENT: of a tar that was there before.
PASSING = (
    *TOO_MANY,
    *(errno.EIO, errno.ESTALE, errno.ENOENT, errno.EAGAIN, errno.EREMOTEIO, errno.ENODEV, errno.ENXIO, errno.ETIMEDOUT),
    *(errno.ENOTCONN, errno.ESHUTDOWN, errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED),
    *(errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH),
)


class ReadError(OSError):
    """A lasting failure to read a tar. The tar may be intact: a later try or another node may read it."""


class Absent(OSError):
    """A file that lies elsewhere and did not come; `strerror` says why.

    Attributes:
        passing: whether it may come if it is asked for again.
        came: whether some of it did come.
        remedy: what the user can do.
    """

    def __init__(
        self, why: str, *, passing: bool, came: bool = False, remedy: str = "check its server, then repeat the command"
    ) -> None:
        super().__init__(errno.EREMOTEIO if passing else errno.EREMOTE, why)
        self.passing, self.came, self.remedy = passing, came, remedy


def raise_limit() -> None:
    """Raises the soft limit of open files of this process and its children as far as the hard limit allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = HIGHEST if hard == resource.RLIM_INFINITY else min(hard, HIGHEST)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):  # keep the limit as it was
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class OpenTars:
    """The most recently used open tars of a set. Thread-safe.

    Args:
        open_tar: opens a tar by number. Raises OSError, or another error if it is the wrong tar.
        name: of the set, in messages.
        path: returns the path of a tar by number, in messages.
        patience: seconds for which a failing read is retried.
        hurried: returns True if retries must end at once.
    """

    # Shared by all sets: each may have to close the tars of another.
    _lock: ClassVar = Lock()
    _all: ClassVar[WeakSet[OpenTars]] = WeakSet()

    def __init__(
        self,
        open_tar: Callable[[int], HeldFile],
        name: str,
        path: Callable[[int], str],
        patience: float,
        hurried: Callable[[], bool],
    ) -> None:
        self._open, self._name, self._path = open_tar, name, path
        self._patience, self._hurried = patience, hurried
        self._files: OrderedDict[int, HeldFile] = OrderedDict()
        self._told = False  # True once it is reported that reading has stopped
        self._since = 0.0  # when reading stopped: threads that come later wait no longer than the first
        with self._lock:
            self._all.add(self)

    def get(self, tar: int) -> HeldFile:
        """Open file of a tar. The caller must hold a reference while reading: another thread may drop it here, which
        would close it. Raises whatever opening raises."""
        with self._lock:
            if file := self._files.get(tar):
                self._files.move_to_end(tar)
                return file
        file = self._open(tar)
        with self._lock:
            self._files[tar] = file
            self._keep(room(len(self._all)))
        return file

    def read(self, tar: int, work: Callable[[HeldFile], T]) -> T:
        """Result of `work` on the open file of a tar. If the file system fails, the file is reopened and the work
        repeated for `patience` seconds, which begin anew if some of a tar has come from elsewhere. Raises ReadError
        after that, or at once if the error is not transient; and whatever opening raises."""
        failing, pause = 0.0, FIRST
        while True:
            try:
                result = work(self.get(tar))
            except OSError as error:
                now = time.monotonic()
                if isinstance(error, Absent) and error.came:
                    failing, pause, self._since = 0.0, FIRST, 0.0
                self._since = self._since or now
                failing = failing or self._since
                full = error.errno in TOO_MANY
                self._let_go(tar, everywhere=full)
                left = failing + (min(FULL, self._patience) if full else self._patience) - now
                if left <= 0 or error.errno not in PASSING or self._hurried():
                    raise self._failure(tar, error, now - failing) from error
                if now - failing > QUIET:
                    self._tell(f"{self._path(tar)} cannot be read ({error.strerror}): trying again", stopped=True)
            else:
                self._since = 0.0
                if failing:
                    self._tell(f"{self._name} can be read again: reading resumes", stopped=False)
                return result
            self._pause(min(pause, left))
            pause = min(2 * pause, LONGEST)

    def drop(self, tar: int) -> None:
        """Has a tar opened anew."""
        self._let_go(tar, everywhere=False)

    def keep(self, tars: Collection[int]) -> None:
        """Closes all tars but these."""
        with self._lock:
            for tar in self._files.keys() - set(tars):
                del self._files[tar]

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and not self._hurried():
            time.sleep(min(left, FIRST))

    def _let_go(self, tar: int, *, everywhere: bool) -> None:
        """Drops a tar so that it is reopened; with `everywhere`, also the older half of each set's open tars."""
        with self._lock:
            self._files.pop(tar, None)
            for opened in list(self._all) if everywhere else ():
                opened._keep(len(opened._files) // 2)

    def _keep(self, count: int) -> None:
        while len(self._files) > count:
            self._files.popitem(last=False)

    def _tell(self, text: str, *, stopped: bool) -> None:
        """Reports once for all threads that reading stopped, and once that it resumed."""
        with self._lock:
            told, self._told = self._told, stopped
        if told != stopped:
            say(text)

    def _failure(self, tar: int, error: OSError, seconds: float) -> ReadError:
        if error.errno in TOO_MANY:
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            return ReadError(
                f"{self._path(tar)} cannot be opened, since this process may have no more than {limit} files open: "
                f"raise the limit with `ulimit -n`, or ask the administrator for a higher hard limit"
            )
        if gone := lost(self._path(tar)):
            return ReadError(gone)
        how_long = f" for {seconds:.0f} s" if seconds >= 1 else ""
        remedy = error.remedy if isinstance(error, Absent) else "check its file system, then repeat the command"
        return ReadError(f"{self._path(tar)} could not be read{how_long} ({error.strerror}): {remedy}")


def room(sets: int) -> int:
    """Number of tars that each of `sets` sets may keep open."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return OPEN if limit == resource.RLIM_INFINITY else max(FEWEST, min(OPEN, (limit - RESERVE) // max(1, sets)))
