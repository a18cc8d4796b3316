"""The open tars of a set: no more than this process may have, and opened anew where a file system fails for a while."""

from __future__ import annotations

import errno
import resource
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import ClassVar, TypeVar
from weakref import WeakSet

from pipelines.files import HeldFile
from pipelines.speech import say

T = TypeVar("T")
OPEN, FEWEST = 256, 8  # tars of a set that stay open, where the process may have many files open, and few
RESERVE = 128  # files that all else in a process has open, about: sockets, pipes, libraries, the devices of a GPU
HIGHEST = 65536  # open files that a process asks for
PATIENCE = 60.0  # seconds for which a read that fails is tried again
FULL = 2.0  # the same, where it fails since too many files are open
QUIET = 1.0  # of them, in which nothing is said
FIRST, LONGEST = 0.1, 5.0  # seconds between two tries: each time twice as many
TOO_MANY = (errno.EMFILE, errno.ENFILE)
# What passes, on file systems that come over a network above all. ENOENT: of a tar that was there before.
PASSING = (
    *TOO_MANY,
    *(errno.EIO, errno.ESTALE, errno.ENOENT, errno.EAGAIN, errno.EREMOTEIO, errno.ENODEV, errno.ENXIO, errno.ETIMEDOUT),
    *(errno.ENOTCONN, errno.ESHUTDOWN, errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED),
    *(errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH),
)


class ReadError(OSError):
    """A tar cannot be read, and not for a moment only. It may be whole: another try, or another node, may read it."""


def raise_limit() -> None:
    """Let this process, and those that it starts, have as many files open as the system allows them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = HIGHEST if hard == resource.RLIM_INFINITY else min(hard, HIGHEST)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):  # then it is as it was
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class OpenTars:
    """The open tars of a set, those that were used last; any thread may ask for one.

    Args:
        open_tar: opens the tar of a number. Raises OSError, and what says that it is not the right one.
        path: of the tar of a number.
        patience: seconds for which a read that fails is tried again.
        hurried: whether that is not waited for any more.
    """

    # Of all sets: each may have to close those of another.
    _lock: ClassVar = Lock()
    _all: ClassVar[WeakSet[OpenTars]] = WeakSet()

    def __init__(
        self,
        open_tar: Callable[[int], HeldFile],
        path: Callable[[int], Path],
        patience: float,
        hurried: Callable[[], bool],
    ) -> None:
        self._open, self._path, self._patience, self._hurried = open_tar, path, patience, hurried
        self._files: OrderedDict[int, HeldFile] = OrderedDict()
        self._told = False  # that reading has stopped
        self._since = 0.0  # when reading has stopped: who comes later waits no longer than the first one
        with self._lock:
            self._all.add(self)

    def get(self, tar: int) -> HeldFile:
        """The open file of a tar, which is to be held while it is read: another thread may drop it here, and so close
        it. Raises what opening it raises."""
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
        """What `work` returns for the open file of a tar. Where the file system fails, the file is opened anew and the
        work done again, for so long as `patience` says. Raises ReadError then, or at once for what does not pass, and
        what opening raises."""
        failing, pause = 0.0, FIRST
        while True:
            try:
                result = work(self.get(tar))
            except OSError as error:
                now = time.monotonic()
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
                    self._tell(f"{self._path(tar).parent} can be read again: reading goes on", stopped=False)
                return result
            self._pause(min(pause, left))
            pause = min(2 * pause, LONGEST)

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and not self._hurried():
            time.sleep(min(left, FIRST))

    def _let_go(self, tar: int, *, everywhere: bool) -> None:
        """Drop what is to be opened anew; with `everywhere` the older half of what this process has open, too."""
        with self._lock:
            self._files.pop(tar, None)
            for opened in list(self._all) if everywhere else ():
                opened._keep(len(opened._files) // 2)

    def _keep(self, count: int) -> None:
        while len(self._files) > count:
            self._files.popitem(last=False)

    def _tell(self, text: str, *, stopped: bool) -> None:
        """Once for all threads, when reading stops and when it goes on."""
        with self._lock:
            told, self._told = self._told, stopped
        if told != stopped:
            say(text)

    def _failure(self, tar: int, error: OSError, seconds: float) -> ReadError:
        if error.errno in TOO_MANY:
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            return ReadError(
                f"{self._path(tar)} cannot be opened, since this process may have no more than {limit} files open: "
                f"raise that by `ulimit -n`, or let who runs the machine raise its hard limit"
            )
        how_long = f" for {seconds:.0f} s" if seconds >= 1 else ""
        return ReadError(
            f"{self._path(tar)} could not be read{how_long} ({error.strerror}): see that its file system is well, then "
            f"repeat the command"
        )


def room(sets: int) -> int:
    """How many tars each of so many sets may keep open."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return OPEN if limit == resource.RLIM_INFINITY else max(FEWEST, min(OPEN, (limit - RESERVE) // max(1, sets)))
