"""What is recorded, and shown, of a step and of a validation."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from dist_train.config import Config
from dist_train.monitor.terminal import Terminal
from dist_train.rundir.directory import RunDirectory
from dist_train.rundir.state import Progress, Step
from dist_train.validate import Scores
from pipelines.loader import Loader


class Reporter:
    """Turns steps and validations into records, and shows the same numbers.

    Args:
        loader: of the training set, for the seconds that were waited for data.
    """

    def __init__(self, config: Config, run: RunDirectory, terminal: Terminal, loader: Loader) -> None:
        self._config, self._run, self._terminal, self._loader = config, run, terminal, loader
        self._began, self._images = time.monotonic(), 0  # of this epoch, for the rates

    def begin_epoch(self, progress: Progress) -> None:
        self._terminal.begin_epoch(progress, self._config.train.epochs, self._loader.steps)
        self._began, self._images, self._loader.waited = time.monotonic(), 0, 0.0

    def step(self, step: Step, loss: float, progress: Progress, *, last: bool) -> None:
        """A step whose sums are known.

        Args:
            loss: mean over the global batch, nats.
            last: the run ends with it, so it is recorded whether or not it is one of every `log_every`.
        """
        batch = self._config.train.global_batch
        self._images += batch
        if step.number % self._config.monitor.log_every == 0 or last:
            fraction = step.epoch + (step.step_in_epoch + 1) / self._loader.steps
            values: dict[str, Any] = {"progress": fraction, "images": step.number * batch, "loss": loss}
            values |= {"train_error": progress.train_error, "lr": step.lr}
            if progress.bad_samples:
                values["bad_samples"] = progress.bad_samples
            self._run.record.append("step", step=step.number, epoch=step.epoch, **values, **self._rates())
        where = f"epoch {step.epoch + 1} step {step.number}"
        self._terminal.step(where, lambda: self._line(loss, step))
        self._run.status.heartbeat(step=step.number, epoch=step.epoch)

    def validation(self, scores: Scores, progress: Progress, lr: float) -> None:
        """The validation of an epoch; `lr`: of its last step."""
        self._terminal.end_epoch()
        self._append("validation", progress, lr=lr, **asdict(scores))
        self._run.say(
            f"epoch {progress.epoch + 1}/{self._config.train.epochs}: top-1 error {scores.top1_error:.2%}, "
            f"top-5 error {scores.top5_error:.2%} on {scores.samples} images, lr {lr:g}"
        )

    def division(self, error: float, chance: float) -> None:
        """The learning rate is divided after a validation error of `error`; `chance`: that of a net that always names
        the most common class."""
        text = f"learning rate divided by {self._config.schedule.factor:g}"
        if error >= chance:
            text += (
                f", but the net is still no better than always naming the most common class ({chance:.2%}): raise "
                f"schedule.patience, or move schedule.milestones"
            )
        self._run.say(text)

    def probe(self, values: dict[str, Any], progress: Progress, lr: float) -> None:
        """What `dist_train.probe` measured before a step."""
        self._append("probe", progress, lr=lr, **values)

    def _append(self, kind: str, progress: Progress, **values: Any) -> None:
        images = progress.step * self._config.train.global_batch
        self._run.record.append(kind, step=progress.step, epoch=progress.epoch, images=images, **values)

    def _rates(self) -> dict[str, float]:
        elapsed = max(1e-9, time.monotonic() - self._began)
        return {"images_per_s": self._images / elapsed, "data_wait": self._loader.waited / elapsed}

    def _line(self, loss: float, step: Step) -> str:
        rates = self._rates()
        train = self._config.train
        left = (train.epochs * self._loader.steps - step.done) * train.global_batch
        seconds = int(left / rates["images_per_s"])
        return (
            f"loss {loss:.3f}, lr {step.lr:g}, {rates['images_per_s']:.0f} images/s, "
            f"data wait {rates['data_wait']:.0%}, {seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d} left"
        )
