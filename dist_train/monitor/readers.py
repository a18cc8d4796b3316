"""The readers of the record of a run while it grows, and the one way in which they are called.

A reader is a class and an entry in READERS. It is given the lines of metrics.jsonl (they have a "kind") and of
events.jsonl (they have an "event") as they come, in its own thread: whatever it waits for or raises, training goes on.
A line that it could not take is given to it again with the next one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from threading import Condition, Thread
from typing import Any

from dist_train.monitor.notify import Notifier
from dist_train.monitor.page import PageRun
from dist_train.monitor.reader import Anew, Hurried, RecordReader, Shown, lines, one_line
from dist_train.monitor.tensorboard import TensorBoardRun
from dist_train.monitor.wandb import WandbRun
from dist_train.rundir import events, record

SHORT = 3.0  # seconds; a wait so short is not halved
HURRIED = 1.5  # seconds left to the readers once the user is impatient
LOOK = 0.2  # seconds between two looks at readers that are waited for


# By name: makes the reader, or None if it is not wanted. What it raises is reported, once.
READERS: dict[str, Callable[[Shown], RecordReader | None]] = {
    "wandb": WandbRun.wanted,
    "tensorboard": TensorBoardRun.wanted,
    "notify": Notifier.wanted,
    "page": PageRun.wanted,
}


class Readers:
    """The readers of one start, each in its own thread. Only on rank 0."""

    def __init__(self, shown: Shown) -> None:
        self._shown = shown
        self._followers: list[_Follower] = []

    def open(self) -> None:
        """Starts all readers. Never raises."""
        self._followers = [_Follower(name, make, self._shown) for name, make in READERS.items()]

    def wake(self) -> None:
        """Tells the readers that there are new lines on disk."""
        for follower in self._followers:
            follower.wake()

    def close(self, seconds: float, patient: Callable[[], bool] = lambda: True) -> None:
        """Lets the readers show the remaining lines and end. Returns after so many seconds at most.

        Args:
            patient: polled meanwhile; once it returns False, HURRIED seconds are left.
        """
        for follower in self._followers:
            follower.end()
        began, until, told = time.monotonic(), time.monotonic() + seconds, False
        half = began + seconds / 2 if seconds > SHORT else until
        while (slow := self._slow()) and (now := time.monotonic()) < until:
            if not told and now > began + SHORT:
                names = " and ".join(follower.name for follower in slow)
                self._shown.say(f"waiting for {names}, {seconds:.0f} s at most (Ctrl-C ends that)")
                told = True
            if half < now:
                self._hurry(last=False)
                half = until
            time.sleep(LOOK)
            if not patient():
                until = min(until, time.monotonic() + HURRIED)
        for follower in self._slow():
            took = time.monotonic() - began
            self._shown.say(f"{follower.name} has not ended within {took:.0f} s: the run ends without it")
        self._hurry(last=True)
        self._shown.pictures.end()

    def abandon(self) -> None:
        """Ends the readers at once: another start has taken over the run, and shows it."""
        self._hurry(last=True)
        self._shown.pictures.end()

    def _hurry(self, *, last: bool) -> None:
        for follower in self._slow():
            follower.hurry(last=last)

    def _slow(self) -> list[_Follower]:
        return [follower for follower in self._followers if follower.is_alive()]


class _Follower(Thread):
    """The thread of one reader, which follows the files as they grow."""

    def __init__(self, name: str, make: Callable[[Shown], RecordReader | None], shown: Shown) -> None:
        super().__init__(name=name, daemon=True)
        self._make, self._shown = make, shown
        self._changed = Condition()
        self._news, self._over, self._told = True, False, False
        self._reader: RecordReader | None = None
        self._sources: list[_Source] = []
        self.start()

    def wake(self) -> None:
        with self._changed:
            self._news = True
            self._changed.notify()

    def end(self) -> None:
        with self._changed:
            self._over = True
            self._changed.notify()

    def hurry(self, *, last: bool) -> None:
        reader: object = self._reader
        if isinstance(reader, Hurried):
            try:
                reader.hurry(last=last)
            except Exception as error:  # the others are still to be hurried
                self._tell(error)

    def run(self) -> None:
        try:
            self._reader = reader = self._make(self._shown)
            if reader is None:
                return
            self._sources = [
                _Source(self._shown.run / record.FILE, record.RecordLine, int(reader.begin())),
                _Source(self._shown.run / events.FILE, events.Event, self._shown.events_bytes),
            ]
        except BaseException as error:  # of wandb, sys.exit
            self._tell(error)
            return
        over = False
        while not over:
            with self._changed:
                self._changed.wait_for(lambda: self._news or self._over)
                self._news, over = False, self._over
            self._catch_up(reader)
        self._catch_up(reader)  # no next line will bring again what could not be taken
        self._try(reader, reader.close)

    def _catch_up(self, reader: RecordReader) -> None:
        while self._follow(reader):
            pass

    def _follow(self, reader: RecordReader) -> bool:
        """Passes on what is new. Returns whether to try again at once: some lines were taken, but not all."""
        before = [source.place for source in self._sources]
        well = [self._try(reader, partial(source.pass_on, reader.take)) for source in self._sources]
        return not all(well) and any(source.place > place for source, place in zip(self._sources, before, strict=True))

    def _try(self, reader: RecordReader, work: Callable[[], None]) -> bool:
        """Does `work`. Returns False after an error."""
        try:
            try:
                work()
            except Anew:
                self._sources[0].place = int(reader.begin())
                self._sources[0].pass_on(reader.take)
                work()
        except BaseException as error:
            self._tell(error)
            return False
        return True

    def _tell(self, error: BaseException) -> None:
        if not self._told:
            self._shown.say(f"{self.name} does not show the run ({one_line(error)}): training goes on")
        self._told = True


class _Source:
    """A file of lines of one format, read from a byte on."""

    def __init__(self, path: Path, kind: type[Any], place: int) -> None:
        self._path, self._kind, self.place = path, kind, place

    def pass_on(self, take: Callable[[dict[str, Any]], None]) -> None:
        """Passes on the new whole lines; the place moves behind those that were taken."""
        for end, values in lines(self._path, self._kind, self.place):
            if values is not None:
                take(values)
            self.place = end
