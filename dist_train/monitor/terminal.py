"""What a run shows in the terminal: one live line, or plain lines if the output is not a terminal."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from dist_train.config import TrainConfig
from dist_train.rundir.ledger import clock
from dist_train.rundir.record import MACHINE
from dist_train.rundir.state import Progress
from pipelines.speech import COLUMNS, bar, say, watched

if TYPE_CHECKING:
    from tqdm import tqdm

LINES = 30.0  # seconds between two plain lines, at least
ROOM = 12  # columns that the bar keeps, with its borders
# Numbers of `_parts`, the most important first: in a narrow line each that still has room. The learning rate, which the
# schedule knows, is the last.
FIRST = ("left", "loss", "error", "rate", "wait", "worst", "lr")
BEHIND = 0.05  # how much more of its time than the mean a rank waits for data if it is named


class Terminal:
    """Shows a run on stderr, from its records, as they are made; silent on ranks other than 0."""

    def __init__(self, *, is_first: bool) -> None:
        self._shows = is_first
        self._bar: tqdm[Any] | None = None
        self._shown = 0.0
        self._epochs, self._steps, self._last = 1, 1, 0
        self._done, self._total, self._of = 0, 1, ""

    def say(self, text: str) -> None:
        """Prints one line."""
        if self._shows:
            say(text)

    def begin_epoch(self, progress: Progress, train: TrainConfig, steps: int) -> None:
        """Begins a live line; an epoch has so many `steps`, unless `train.max_steps` ends it before."""
        self._epochs, self._steps, self._last = train.epochs, steps, train.max_steps
        total = min(steps, self._last - progress.step + progress.step_in_epoch) if self._last else steps
        self._begin(progress.step_in_epoch, total, f"steps of epoch {progress.epoch + 1}/{train.epochs}")

    def begin_validation(self, progress: Progress, batches: int) -> None:
        """Begins a live line in place of the epoch's."""
        self._begin(0, batches, f"batches of validation {progress.epoch + 1}/{self._epochs}")

    def end_epoch(self) -> None:
        """Removes the live line."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def tick(self) -> None:
        """One step is done."""
        self._done += 1
        if self._bar is not None:
            self._bar.update()

    def validated(self) -> None:
        """One batch of the validation is done."""
        self.tick()
        self._plain("")

    def take(self, line: dict[str, Any]) -> None:
        """Shows a line of the record."""
        if line["kind"] == "step":
            self._step(line)
        elif line["kind"] == "validation":
            self.end_epoch()
            self.say(
                f"epoch {line['epoch'] + 1}/{self._epochs}: top-1 error {line['top1_error']:.2%}, top-5 error "
                f"{line['top5_error']:.2%} on {line['samples']} images, training loss {line['train_loss']:.3f}, lr "
                f"{line['lr']:g}, {clock(line[MACHINE]['epoch_seconds'])}"
            )

    def _begin(self, done: int, total: int, of: str) -> None:
        self.end_epoch()
        self._done, self._total, self._of = done, total, of
        if self._shows and watched():
            self._bar = bar(total, "", "", initial=done, live=self._format(""))

    def _step(self, line: dict[str, Any]) -> None:
        parts = self._parts(line)
        self._draw(parts)
        self._plain(": " + ", ".join(parts.values()))

    def _plain(self, text: str) -> None:
        """A line without a terminal, if the last one is old enough."""
        if self._shows and self._bar is None and (now := time.monotonic()) - self._shown > LINES:
            self.say(f"{self._done} of {self._total} {self._of}{text}")
            self._shown = now

    def _draw(self, parts: dict[str, str]) -> None:
        """The live line with as many of the numbers as leave the bar its room."""
        if self._bar is None:
            return
        width = self._bar.format_dict["ncols"] or COLUMNS  # a terminal that is gone has none
        free = width - ROOM - len(f" {self._total} of {self._total} {self._of} ")
        kept = list[str]()
        for name in (name for name in FIRST if name in parts):
            if not kept or len(", ".join(parts[n] for n in (*kept, name))) <= free:
                kept.append(name)
        self._bar.bar_format = self._format(", ".join(text for name, text in parts.items() if name in kept))
        self._bar.refresh()

    def _format(self, text: str) -> str:
        return f"{{n_fmt}} of {{total_fmt}} {self._of} |{{bar}}| {text}"

    def _parts(self, line: dict[str, Any]) -> dict[str, str]:
        """The numbers of a step's line, the rank that waits for data much longer than the others, if there is one, and
        the time to the last step."""
        machine, steps = line[MACHINE], (self._epochs - line["progress"]) * self._steps
        if self._last:
            steps = min(steps, self._last - line["step"])
        seconds = steps * line["images"] / line["step"] / max(1e-9, machine["images_per_s"])
        parts = {
            "loss": f"loss {line['loss']:.3f}",
            "error": f"error {line['train_error']:.0%}",
            "lr": f"lr {line['lr']:g}",
            "rate": f"{machine['images_per_s']:.0f} images/s",
            "wait": f"data wait {machine['data_wait']:.0%}",
        }
        if (worst := machine["data_wait_worst"]) >= machine["data_wait"] + BEHIND:
            parts["worst"] = f"rank {machine['worst_rank']} on {machine['worst_node']} {worst:.0%}"
        return parts | {"left": f"{clock(seconds)} left"}
