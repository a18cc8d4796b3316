"""`python -m pipelines.remote.fetcher`: fetches shards as `Ahead` says on its stdin, by JSON lines, until that ends.

    {"follow": [{"place", "cache", "budget", "directory", "shards"}, ...]}    what will be needed, in this order
    {"reached": [directory, shard]}                                           a shard is in use now

A shard may take the place of others in the cache, but not of those that are needed before it. Whatever is to be said is
a line on stdout.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Condition, Lock, Thread
from typing import Any

from pipelines.errors import UserError, first_line
from pipelines.files import HeldFile
from pipelines.manifest import Manifest
from pipelines.opened import FIRST, LONGEST, Absent
from pipelines.remote.cache import Cache, Full, Wanted
from pipelines.remote.places import Distant, place_of
from pipelines.speech import begin, show

THREADS = 8  # shards that are fetched at a time
FULL = 0.3  # seconds between two looks whether there is room
LONG = 10.0  # seconds of failing that are not spoken of


@dataclass
class _Coming:
    """A shard that will be needed, and whether somebody is fetching it, or has."""

    cache: Cache
    wanted: Wanted
    taken: bool = False


class Fetcher:
    """Threads that fetch the shards of a list, in the order in which they are needed."""

    def __init__(self) -> None:
        self._turn = Lock()  # to begin: what is needed first gets the first room
        self._changed = Condition()  # holds the lock of all that follows
        self._list: list[_Coming] = []
        self._places: dict[tuple[str, int], int] = {}  # of each shard, the first in the list
        self._position = 0  # in the list, behind the furthest shard that is in use
        self._not_before, self._failing, self._pause, self._told = 0.0, 0.0, FIRST, False
        for number in range(THREADS):
            Thread(target=self._work, name=f"fetch-{number}", daemon=True).start()

    def follow(self, sets: list[dict[str, Any]]) -> None:
        """Replaces the list."""
        coming, places = list[_Coming](), dict[tuple[str, int], int]()
        for one in sets:
            kept, place = _cache(one["cache"], one["budget"]), _place(one["place"])
            shards = _shards(one["directory"])
            for number in one["shards"]:
                places.setdefault((one["directory"], number), len(coming))
                name, size, sha256 = shards[number]
                coming.append(_Coming(kept, kept.shard(place, name, size, sha256)))
        with self._changed:
            self._list, self._places, self._position, self._not_before = coming, places, 0, 0.0
            self._changed.notify_all()

    def reached(self, directory: str, shard: int) -> None:
        """Notes that a shard is in use."""
        with self._changed:
            if (place := self._places.get((directory, shard))) is not None:
                self._list[place].taken = True
                self._position = max(self._position, place + 1)

    def _work(self) -> None:
        while True:
            with self._turn:
                one, before = self._take()
                file = self._begun(one, before)
            if file:
                try:
                    one.cache.fill(file, one.wanted)
                    self._went()
                except Exception as error:  # of any library
                    self._failed(one, error)

    def _begun(self, one: _Coming, before: set[str]) -> HeldFile | None:
        try:
            return one.cache.begin(one.wanted, before)  # None: it is there, or a rank is fetching it
        except Full:
            self._again(one, FULL)
        except OSError as error:
            self._failed(one, error)
        return None

    def _take(self) -> tuple[_Coming, set[str]]:
        """The first shard that nobody is fetching, and the files that are needed before it."""
        with self._changed:
            while True:
                late = self._not_before - time.monotonic()
                for place, one in enumerate(self._list) if late <= 0 else ():
                    if not one.taken:
                        one.taken = True
                        return one, {other.wanted.kept.name for other in self._list[self._position : place]}
                self._changed.wait(max(late, 0) or None)

    def _again(self, one: _Coming, seconds: float) -> None:
        with self._changed:
            one.taken, self._not_before = False, time.monotonic() + seconds

    def _went(self) -> None:
        with self._changed:
            self._failing, self._pause, self._told = 0.0, FIRST, False

    def _failed(self, one: _Coming, error: Exception) -> None:
        """If the error may pass, lets all threads wait, longer each time; whoever needs the shard will say more."""
        with self._changed:
            now = time.monotonic()
            self._failing = self._failing or now
            passing = isinstance(error, Absent) and error.passing
            if tell := not self._told and not (passing and now - self._failing < LONG):
                self._told = True
            self._pause = min(2 * self._pause, LONGEST)
        if passing:
            self._again(one, self._pause)
        if tell:
            why = getattr(error, "strerror", "") or first_line(error)
            show(f"{one.wanted.place.path(one.wanted.name)} cannot be fetched ahead of need ({why})")


@cache
def _cache(directory: str, budget: int) -> Cache:
    return Cache(Path(directory), budget / 1e9)


@cache
def _place(root: str) -> Distant:
    return place_of(root)


@cache
def _shards(directory: str) -> list[tuple[str, int, str]]:
    """Name, size and SHA-256 of the shards of a set."""
    shards = Manifest.read(Path(directory)).shards
    return [(shard["name"], shard["bytes"], shard["sha256"]) for shard in shards]


def main() -> None:
    begin()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # they are meant for the ranks, with whose end this ends
    fetcher = Fetcher()
    for line in sys.stdin.buffer:
        message = json.loads(line)
        try:
            if "follow" in message:
                fetcher.follow(message["follow"])
            else:
                fetcher.reached(*message["reached"])
        except (OSError, UserError) as error:
            show(f"no shards are fetched ahead of need ({first_line(error)})")
    os._exit(0)  # the threads are in the middle of a shard, which the next one will continue


if __name__ == "__main__":
    main()
