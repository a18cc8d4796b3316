"""Writes small files beside training, so that no step waits for the disk. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from threading import Condition, Thread


class Writer:
    """Runs requested work in a thread of its own, one item at a time."""

    def __init__(self) -> None:
        self._asked: dict[str, Callable[[], None]] = {}
        self._changed = Condition()
        self._thread: Thread | None = None
        self._busy = False

    def ask(self, name: str, work: Callable[[], None]) -> None:
        """Do `work` soon, replacing a request of the same name that has not begun. `work` reports its own errors."""
        with self._changed:
            self._asked[name] = work
            if self._thread is None:
                self._thread = Thread(target=self._go_on, name="writer", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def wait(self) -> None:
        """Wait until all requests so far are done; the watch limits how long that may take."""
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
            with suppress(Exception):  # later requests are done all the same
                work()
