"""What a run shows in the terminal: a progress bar, or plain lines where the output is not a terminal."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from dist_train.rundir.ledger import clock
from dist_train.rundir.record import MACHINE
from dist_train.rundir.state import Progress
from pipelines.speech import bar, say, watched

if TYPE_CHECKING:
    from tqdm import tqdm

LINES = 30.0  # seconds between two plain lines, at least


class Terminal:
    """Shows a run on stderr, from its records, as they are made; on ranks other than 0 it is silent."""

    def __init__(self, *, is_first: bool) -> None:
        self._shows = is_first
        self._bar: tqdm[Any] | None = None
        self._shown = 0.0
        self._epochs, self._steps = 1, 1

    def say(self, text: str) -> None:
        """One line for the user."""
        if self._shows:
            say(text)

    def begin_epoch(self, progress: Progress, epochs: int, steps: int) -> None:
        self._epochs, self._steps = epochs, steps
        if self._shows and watched():
            self._bar = bar(steps, f"epoch {progress.epoch + 1}/{epochs}", "step", initial=progress.step_in_epoch)

    def end_epoch(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def tick(self) -> None:
        """A step is done."""
        if self._bar is not None:
            self._bar.update()

    def take(self, line: dict[str, Any]) -> None:
        """A line of the record."""
        if line["kind"] == "step":
            self._step(line)
        elif line["kind"] == "validation":
            self.end_epoch()
            self.say(
                f"epoch {line['epoch'] + 1}/{self._epochs}: top-1 error {line['top1_error']:.2%}, top-5 error "
                f"{line['top5_error']:.2%} on {line['samples']} images, training loss {line['train_loss']:.3f}, lr "
                f"{line['lr']:g}, {clock(line[MACHINE]['epoch_seconds'])}"
            )

    def _step(self, line: dict[str, Any]) -> None:
        now = time.monotonic()
        if self._bar is not None:
            self._bar.set_postfix_str(self._text(line))
        elif self._shows and now - self._shown > LINES:
            self.say(f"epoch {line['epoch'] + 1} step {line['step']}: {self._text(line)}")
            self._shown = now

    def _text(self, line: dict[str, Any]) -> str:
        machine = line[MACHINE]
        images = (self._epochs - line["progress"]) * self._steps * line["images"] / line["step"]
        return (
            f"loss {line['loss']:.3f}, error {line['train_error']:.0%}, lr {line['lr']:g}, "
            f"{machine['images_per_s']:.0f} images/s, data wait {machine['data_wait']:.0%}, "
            f"{clock(images / max(1e-9, machine['images_per_s']))} left"
        )
