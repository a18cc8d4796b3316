"""Small files are written beside training: a step waits for no disk. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from threading import Condition, Thread


class Writer:
    """Does what it is asked in a thread of its own, one thing after the other."""

    def __init__(self) -> None:
        self._asked: dict[str, Callable[[], None]] = {}
        self._changed = Condition()
        self._thread: Thread | None = None
        self._busy = False

    def ask(self, name: str, work: Callable[[], None]) -> None:
        """Do `work` soon, in place of what was asked under this name before and is not begun. It tells its errors
        itself."""
        with self._changed:
            self._asked[name] = work
            if self._thread is None:
                self._thread = Thread(target=self._go_on, name="writer", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def wait(self) -> None:
        """Until all is done that was asked so far. How long that may take is the watch's to say."""
        with self._changed:
            self._changed.wait_for(lambda: not self._asked and not self._busy)

    def _go_on(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: bool(self._asked))
                work = self._asked.pop(next(iter(self._asked)))
                self._busy = True
            with suppress(Exception):  # what comes after it is done all the same
                work()
