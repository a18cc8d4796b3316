"""What a run shows in the terminal: a progress bar, or plain lines where the output is not a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dist_train.rundir.state import Progress
from pipelines.speech import bar, say, watched

if TYPE_CHECKING:
    from tqdm import tqdm

BAR, LINES = 0.5, 30.0  # seconds between two updates of the bar's text, and between two plain lines


class Terminal:
    """Shows a run on stderr; on ranks other than 0 it is silent."""

    def __init__(self, *, is_first: bool) -> None:
        self._shows = is_first
        self._bar: tqdm[Any] | None = None
        self._shown = 0.0

    def say(self, text: str) -> None:
        """One line for the user."""
        if self._shows:
            say(text)

    def begin_epoch(self, progress: Progress, epochs: int, steps: int) -> None:
        if self._shows and watched():
            self._bar = bar(steps, f"epoch {progress.epoch + 1}/{epochs}", "step", initial=progress.step_in_epoch)

    def end_epoch(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def step(self, where: str, line: Callable[[], str]) -> None:
        """A step is done. `line` says how training goes; it is asked only if it is shown."""
        if not self._shows:
            return
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update()
            if now - self._shown > BAR:
                self._bar.set_postfix_str(line())
                self._shown = now
        elif now - self._shown > LINES:
            self.say(f"{where}: {line()}")
            self._shown = now
