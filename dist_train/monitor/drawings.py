"""The pictures of a run that goes on: begun when they are due, and drawn once for all readers that show them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from threading import Lock

from dist_train.monitor.portraits import LOOK, Drawing, What

EVERY = 600.0  # seconds between two pictures of the net
LAST, ENOUGH = 30.0, 10.0  # seconds: longest wait for pictures at the end, and least time left after it


def patience(seconds: float) -> float:
    """Seconds to wait for pictures at the end of a run, out of those that a stop may take: most of these may be needed
    for sending."""
    return min(LAST, max(0.0, seconds / 2 - ENOUGH))


class Pictures:
    """Draws pictures of a run beside its training: the net's inputs; its errors and first kernels after validations,
    every ten minutes at most. Readers call it from their own threads; what one has begun is not begun again for
    another.

    Args:
        say: prints, once, why something cannot be drawn.
    """

    def __init__(self, run: Path, say: Callable[[str], None]) -> None:
        self._run, self._say, self._told = run, say, False
        self._turn = Lock()
        self._inputs = False  # whether they were begun in this start
        self._validated, self._news = -1, False  # the last validation's step, and whether it is not drawn yet
        self._drawn = -EVERY  # when the last drawing of the net was begun
        self._under_way, self._ready = dict[What, Drawing](), dict[str, Path]()

    def validated(self, step: int) -> None:
        """Notes the validation at this step, after which the state is saved soon."""
        with self._turn:
            self._news |= step > self._validated
            self._validated = max(step, self._validated)

    def draw_inputs(self) -> None:
        """Begins the picture of the inputs, once in this start."""
        with self._turn:
            if not self._inputs:
                self._inputs = True
                self._begin("inputs")

    def draw(self, *, last: bool = False) -> None:
        """Begins what is due of the net.

        Args:
            last: the run is over: its newest state is drawn, however short ago an older one was.
        """
        with self._turn:
            if self._news and (last or time.monotonic() - self._drawn > EVERY):
                self._news, self._drawn = False, time.monotonic()
                self._begin("wrong")
                self._begin("kernels")
            self._look()

    def wait(self, seconds: float) -> None:
        """Returns once nothing is drawn any more, after so many seconds at most."""
        until = time.monotonic() + seconds
        while self._busy() and time.monotonic() < until:
            time.sleep(LOOK)

    def taken(self) -> dict[str, Path]:
        """The pictures drawn since the last call, as pictures/WHAT."""
        with self._turn:
            self._look()
            found, self._ready = self._ready, {}
            return found

    def end(self) -> None:
        """Stops all drawing."""
        ended, self._under_way = self._under_way, {}  # not waiting for a turn: a thread may hang in it
        for drawing in list(ended.values()):
            drawing.end()

    def _busy(self) -> bool:
        with self._turn:
            self._look()
            return bool(self._under_way)

    def _look(self) -> None:
        for what, drawing in list(self._under_way.items()):
            if picture := drawing.poll():
                self._ready[f"pictures/{what}"] = picture
            if drawing.failed and not self._told:
                self._say(f"no picture of {what} ({drawing.failed})")
                self._told = True
            if picture or drawing.failed:
                self._under_way.pop(what, None)

    def _begin(self, what: What) -> None:
        if what in self._under_way:  # it shows an older state
            self._under_way[what].end()
        self._under_way[what] = Drawing(self._run, what)
