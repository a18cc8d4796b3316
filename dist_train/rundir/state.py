"""The state of training, and its form in a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import nn

from dist_train import optim
from dist_train.numbers import Number, combined
from dist_train.ranks.tower_parallel import pair_of
from dist_train.rundir.fitting import check_weights
from dist_train.schedules import Schedule
from pipelines.valid import MOST, Count, Finite, made_of

MEMORY = 50  # approximate number of steps in the running mean of the training error
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Logged = dict[str, tuple[Literal["max", "min", "mean", "sum"], float, Count]]  # a `Number` each, which may be NaN


class Step(NamedTuple):
    """One step: epoch, steps of the epoch and of the run done before it, and learning rate."""

    epoch: int
    step_in_epoch: int
    done: int
    lr: float

    @property
    def number(self) -> int:
        """Number of the step counted from 1, as in records."""
        return self.done + 1


@dataclass
class Progress:
    """Progress of a run: `step_in_epoch` steps of `epoch` are done, `step` in total.

    `validated` is true between an epoch's validation and the first step of the next epoch. `bad_samples` counts those
    replaced on all ranks. `train_error` is a running mean of the top-1 training error, as a fraction of 1.
    """

    epoch: Count = 0
    step_in_epoch: Count = 0
    step: Count = 0
    validated: bool = False
    best_error: Annotated[float, Field(ge=0, le=1)] = 1.0
    best_epoch: Annotated[int, Field(ge=-1, lt=MOST)] = -1
    bad_samples: Count = 0
    train_error: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0

    def advance(self) -> None:
        self.step, self.step_in_epoch, self.validated = self.step + 1, self.step_in_epoch + 1, False

    def average(self, error: float, step: int) -> None:
        """Add the training error of the `step`-th step: plain mean over the first 50 steps, exponential moving average
        afterwards."""
        self.train_error += (error - self.train_error) / min(step, MEMORY)

    def next_epoch(self, error: float) -> None:
        """Finish the epoch, with its validation error."""
        if self.best_epoch < 0 or error < self.best_error:
            self.best_error, self.best_epoch = error, self.epoch
        self.epoch, self.step_in_epoch, self.validated = self.epoch + 1, 0, True

    def go_back(self, step: Step) -> None:
        """Return to before a step that was not taken."""
        self.epoch, self.step_in_epoch, self.step = step.epoch, step.step_in_epoch, step.done
        self.validated = step.epoch > 0 and step.step_in_epoch == 0

    def as_meta(self) -> dict[str, Any]:
        """Entries for meta.json."""
        return asdict(self)


@dataclass
class Window:
    """Sums over the steps since the last record, and over the epoch's: samples' losses in nats, wrong predictions,
    and gradient norms. `skipped` counts steps that were not taken because fp16 overflowed. `numbers`: those that were
    logged since the last record, by name, each as the fields of a `Number`."""

    steps: Count = 0
    loss: Finite = 0.0
    wrong: Finite = 0.0
    norm: Finite = 0.0
    skipped: Count = 0
    numbers: dict[str, list[Any]] = field(default_factory=dict)
    epoch_steps: Count = 0
    epoch_loss: Finite = 0.0
    epoch_wrong: Finite = 0.0

    def add(self, loss: float, wrong: float, norm: float, logged: Mapping[str, Number] | None = None) -> None:
        """Add the sums of a step over its batch, and the numbers that were logged in it."""
        self.steps, self.loss, self.wrong = self.steps + 1, self.loss + loss, self.wrong + wrong
        self.epoch_steps, self.epoch_loss = self.epoch_steps + 1, self.epoch_loss + loss
        self.epoch_wrong += wrong
        if math.isfinite(norm):
            self.norm += norm
        else:
            self.skipped += 1
        for name, number in (logged or {}).items():
            before = Number(*self.numbers.get(name, number._replace(elements=0)))
            if before.elements and before.over == number.over:  # else the code was changed in mid-window
                number = combined([before, number])
            self.numbers[name] = list(number)

    def means(self, batch: int) -> dict[str, Any]:
        """Means since the last record: per sample, for batches of this size; of the norm, per step taken."""
        images, taken = self.steps * batch, self.steps - self.skipped
        values: dict[str, Any] = {"loss": self.loss / images, "train_error": self.wrong / images}
        values["grad_norm"] = self.norm / taken if taken else None
        values |= {"skipped": self.skipped} if self.skipped else {}
        logged = {name: Number(*fields).result for name, fields in sorted(self.numbers.items())}
        return values | ({"numbers": logged} if logged else {})

    def epoch_means(self, batch: int) -> dict[str, float]:
        """Means per sample over those steps of the epoch that are known."""
        images = max(1, self.epoch_steps * batch)
        return {"train_loss": self.epoch_loss / images, "train_error": self.epoch_wrong / images}

    def clear(self) -> None:
        """Begin a new window, after a record."""
        self.steps, self.loss, self.wrong, self.norm, self.skipped, self.numbers = 0, 0.0, 0.0, 0.0, 0, {}

    def clear_epoch(self) -> None:
        self.epoch_steps, self.epoch_loss, self.epoch_wrong = 0, 0.0, 0.0


@dataclass
class Scale:
    """State of a `GradScaler`, under the names that it has there."""

    scale: Positive
    growth_factor: Positive
    backoff_factor: Positive
    growth_interval: Annotated[int, Field(ge=1, lt=MOST)]
    _growth_tracker: Count


class TrainState(NamedTuple):
    """Everything a checkpoint stores. None of it is per rank, so a run may resume at another world size."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    schedule: Schedule
    progress: Progress
    window: Window

    def state_dict(self) -> dict[str, Any]:
        """State of the whole net for a checkpoint: complete on rank 0. All ranks call it at the same point."""
        model, optimizer = self.model.state_dict(), self.optimizer.state_dict()
        if pair := pair_of(self.model):
            model, optimizer = pair.merge(model, optimizer)
        return {
            "model": model,
            "optimizer": optimizer,
            "scaler": self.scaler.state_dict(),
            "schedule": self.schedule.state_dict(),
            "state": asdict(self.progress),
            "window": asdict(self.window),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Load what `state_dict` returned. Raises one of `stored.WRONG` for what does not fit, before anything of it is
        used; what has been loaded by then stays."""
        model, optimizer = saved["model"], saved["optimizer"]
        if pair := pair_of(self.model):
            model, optimizer = pair.split(model, optimizer)
        check_weights(self.model, model)
        progress, window = made_of(Progress, saved["state"]), made_of(Window, saved.get("window", {}))
        window.numbers = {name: list(number) for name, number in made_of(Logged, window.numbers).items()}
        self.model.load_state_dict(model)
        optim.load_moments(self.optimizer, optimizer)
        if saved["scaler"]:  # empty if it was saved without fp16
            self.scaler.load_state_dict(asdict(made_of(Scale, saved["scaler"])))
        if "schedule" in saved:
            self.schedule.load_state_dict(saved["schedule"])
        vars(self.progress).update(vars(progress))
        vars(self.window).update(vars(window))  # older versions recorded single steps, and saved none
