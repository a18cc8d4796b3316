"""The tars of a set that lies elsewhere: each is fetched whole into the cache of this node when it is needed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path
from threading import Thread
from typing import TypeVar

from pipelines.files import HeldFile
from pipelines.here import Here, Waiting
from pipelines.manifest import Shard
from pipelines.opened import FIRST, LONGEST, PATIENCE, TOO_MANY, Absent, ReadError
from pipelines.remote.cache import Cache, Wanted
from pipelines.remote.places import Distant
from pipelines.speech import say

T = TypeVar("T")
LOOK = 0.1  # seconds between two looks whether a shard has come
TELL = 1.0  # seconds between two calls of `waiting`
QUIET = 5.0  # seconds of waiting that are not spoken of


class Elsewhere(Here):
    """The tars of a set, in a cache.

    Args:
        patience: seconds that a shard is waited for while no byte of it comes.
    """

    scarce = True

    def __init__(self, place: Distant, cache: Cache, patience: float = PATIENCE) -> None:
        super().__init__(Path(), place.name)
        self.place, self.cache, self._patience = place, cache, patience
        self.spoken = Spoken()

    def command(self, verb: str, options: str = "") -> str:
        return f"`python -m pipelines {verb} DIR{options}` where {self.name} lies"

    def path(self, name: str) -> str:
        return self.place.path(name)

    def wanted(self, shard: Shard) -> Wanted:
        """A shard as the cache knows it."""
        return self.cache.shard(self.place, shard["name"], shard["bytes"], shard["sha256"])

    def open(self, shard: Shard, waiting: Waiting) -> HeldFile:
        try:
            file = brought(self.cache, self.wanted(shard), self._patience, waiting)
        except Absent as error:
            waiting(f"waiting for {self.path(shard['name'])}: {error.strerror}", error.came)
            raise
        except OSError as error:
            if isinstance(error, FileNotFoundError) or error.errno in TOO_MANY:
                raise
            why = f"{self.cache.directory} cannot keep it: {error.strerror}"
            raise Absent(why, passing=False, remedy="set data.cache to a directory that can") from error
        self.spoken.over(self.path(shard["name"]))
        return file

    def mended(self, shard: Shard) -> bool:
        self.cache.mend(self.wanted(shard))
        return True

    def check(self, shards: Sequence[Shard], *, sizes: bool) -> None:
        """Asks for the first and the last tar, unless they are here: each question takes its time."""
        for shard in (shards[0], shards[-1]):
            name = shard["name"]
            if not self.cache.holds(self.wanted(shard)):
                try:
                    size = patiently(partial(self.place.size, name), self.path(name), self._patience)
                except FileNotFoundError as error:
                    raise self.missing(name) from error
                if size != shard["bytes"]:
                    raise self.mismatch(name)


class Spoken:
    """Tells the user that a shard is waited for, if that takes long, and when that is over; for sets of which nobody
    else tells."""

    def __init__(self) -> None:
        self._since = self._last = 0.0
        self._told = False

    def __call__(self, text: str, moved: bool) -> None:
        """As `ShardSet.waiting`; from any thread."""
        now = time.monotonic()
        if now - self._last > 3 * TELL:
            self._since = now
        self._last = now
        if not self._told and now - self._since > QUIET:
            self._told = True
            say(text)

    def over(self, url: str) -> None:
        """To be called when a shard is there."""
        if self._told:
            self._told = False
            say(f"{url} has come: reading goes on")


def brought(cache: Cache, wanted: Wanted, patience: float, waiting: Waiting) -> HeldFile:
    """Opens a file of a cache, which is fetched if it is not there, by this process or by another. Raises OSError;
    Absent also if another process is fetching it and has got no byte for so many seconds."""
    work: Future[None] | None = None
    come, grown, told, moved = wanted.come, time.monotonic(), time.monotonic(), False
    while (file := cache.open(wanted)) is None:
        if work is None and (begun := cache.begin(wanted)):
            work = _beside(partial(cache.fill, begun, wanted))
        wait([work] if work else [Future()], LOOK)
        if work and work.done():
            work.result()
            work = None
        now = time.monotonic()
        if wanted.come != come:
            come, grown, moved = wanted.come, now, True
        if work is None and now - grown > patience:
            raise Absent(f"another process is fetching it, and no byte has come for {patience:.0f} s", passing=False)
        if now - told < TELL:
            waiting("", False)
            continue
        url = wanted.place.path(wanted.name)
        waiting(f"waiting for {url}, {come / 1e6:.1f} of {wanted.size / 1e6:.1f} MB", moved)
        told, moved = now, False
    return file


def patiently(work: Callable[[], T], url: str, patience: float = PATIENCE) -> T:
    """The result of a read, which is repeated while it fails for a reason that may pass, for so many seconds in which
    nothing comes. Raises ReadError, FileNotFoundError."""
    failing, pause, told = time.monotonic(), FIRST, False
    while True:
        try:
            return work()
        except Absent as error:
            now = time.monotonic()
            if error.came:
                failing, pause = now, FIRST
            if not error.passing or now - failing > patience:
                raise ReadError(f"{url} could not be read ({error.strerror}): {error.remedy}") from error
            if not told and now - failing > QUIET:
                told = True
                say(f"{url} cannot be read ({error.strerror}): trying again")
        time.sleep(pause)
        pause = min(2 * pause, LONGEST)


def _beside(work: Callable[[], None]) -> Future[None]:
    """Runs in a thread that nobody has to wait for: a stop leaves it behind."""
    done = Future[None]()

    def run() -> None:
        try:
            work()
            done.set_result(None)
        except BaseException as error:
            done.set_exception(error)

    Thread(target=run, name="fetch", daemon=True).start()
    return done
