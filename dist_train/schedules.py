"""Learning-rate schedules. Imports no torch."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field

from dist_train import choices
from dist_train.config import Config, ConfigError, ScheduleConfig
from dist_train.outcomes import NoRate
from dist_train.packaged import DEFAULT
from pipelines import resolve, yamls
from pipelines.valid import Count, Invalid, made_of

# Errors and summed losses of epochs on which a schedule is tried: they fall, rise, and stay.
TRIAL = [(0.9, 90.0), (0.8, 80.0), (0.85, 85.0), (0.85, 84.0), (0.85, 84.0), (0.7, 84.0), (0.9, 99.0), (0.6, 50.0)]


class Schedule:
    """Base class of learning-rate schedules. Its constructor takes `schedule.options` as keyword arguments.

    Attributes:
        settings: the other fields of `schedule`.
        base: `optim.lr`.
        epochs: `train.epochs`.
        saved: names of the attributes that a checkpoint holds: numbers, strings, or lists and dicts of these. All
            others must follow from the settings.
        forms: types of some of these, for `pipelines.valid`: what a checkpoint says is compared with them.
        exhausted: true when nothing is to be gained any more; `schedule.stop_early` then ends the run.
    """

    settings: ScheduleConfig
    base: float
    epochs: int
    saved: ClassVar[tuple[str, ...]] = ()
    forms: ClassVar[dict[str, Any]] = {}
    exhausted: bool = False

    def rate(self, lr: float, epoch: int, step: int, steps: int) -> float:
        """Learning rate at step `step` of an epoch of `steps` steps, both counted from 0.

        Args:
            lr: `optim.lr`, or during the warm-up the part of it that has been reached.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no rate(lr, epoch, step, steps)")

    def end_epoch(self, error: float, loss: float, epoch: int, steps: int) -> float | None:
        """Takes the results of an epoch of `steps` steps, after its validation. Returns the number by which this
        divides the learning rate, for the report; 1 or None if it does not.

        Args:
            error: top-1 validation error, 0..1.
            loss: training loss of the epoch: cross-entropy in nats, summed over its samples, each as its step saw it.
        """
        return None

    def later(self, steps: int) -> str:
        """What to do if a division came before the net was better than chance, in epochs of `steps` steps."""
        return "divide it later"

    def lr(self, epoch: int, step: int, steps: int) -> float:
        """`rate` with the warm-up, which rises linearly from base / warm-up steps. Raises NoRate for what is no
        learning rate."""
        warmup = self.settings.warmup_epochs * steps
        share = min(1.0, (epoch * steps + step + 1) / warmup) if warmup >= 1 else 1.0
        lr: Any = self.rate(self.base * share, epoch, step, steps)
        lr = lr.item() if hasattr(lr, "item") else lr  # of numpy or torch
        if not (isinstance(lr, float | int) and 0 <= lr < math.inf):
            raise NoRate(
                f"schedule.name {self.settings.name} gives {lr} as the learning rate of epoch {epoch + 1}, step "
                f"{step + 1}: it must be a number of 0 or more"
            )
        return float(lr)

    def ended(self, error: float, loss: float, epoch: int, steps: int) -> float:
        """`end_epoch`; 1 for None. Raises NoRate if it returns what is no divisor."""
        divisor = self.end_epoch(error, loss, epoch, steps)
        if divisor is None:
            return 1.0
        if not (isinstance(divisor, float | int) and 0 < divisor < math.inf):
            raise NoRate(
                f"schedule.name {self.settings.name} says after epoch {epoch + 1} that it divides the learning rate by "
                f"{divisor}: end_epoch must return a number above 0, or nothing"
            )
        return divisor

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint, with the numbers of numpy and torch as Python's. Raises TypeError for what is no
        number, string, list, or dict with strings as keys."""
        state = {name: getattr(self, name) for name in self.saved}
        plain: dict[str, Any] = json.loads(json.dumps(state, default=_number))
        if odd := [
            key for value in state.values() if isinstance(value, dict) for key in value if not isinstance(key, str)
        ]:
            raise TypeError(f"keys of dicts in a checkpoint are strings, and {odd[0]!r} is none")
        return plain

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` returned. Raises ValueError for what cannot be."""
        for name, form in self.forms.items():
            if name in state:
                try:
                    made_of(form, state[name])
                except Invalid as error:
                    raise ValueError(f"{name} of the schedule: {error}") from error
        vars(self).update({name: state[name] for name in self.saved if name in state})


class Plateau(Schedule):
    """Section 5: "divide the learning rate by 10 when the validation error rate stopped improving with the current
    learning rate".

    Attributes:
        best: lowest validation error so far.
        bad_epochs: epochs since then at the current learning rate.
        divisions: number of divisions so far.
        exhausted: the error stopped improving after the last division.
    """

    saved = ("best", "bad_epochs", "divisions", "exhausted")
    forms: ClassVar[dict[str, Any]] = {
        "best": Annotated[float, Field(ge=0)],
        "bad_epochs": Count,
        "divisions": Count,
        "exhausted": bool,
    }
    best: float = math.inf
    bad_epochs: int = 0
    divisions: int = 0

    def rate(self, lr: float, epoch: int, step: int, steps: int) -> float:
        return lr / self.settings.factor**self.divisions

    def end_epoch(self, error: float, loss: float, epoch: int, steps: int) -> float:
        settings = self.settings
        if epoch + 1 <= settings.warmup_epochs:
            return 1.0
        if error < self.best - settings.min_improvement:
            self.best, self.bad_epochs = error, 0
            return 1.0
        self.bad_epochs += 1
        if self.bad_epochs < settings.patience or self.bad_epochs * steps < settings.patience_steps:
            return 1.0
        self.bad_epochs = 0
        if self.divisions == settings.max_divisions:
            self.exhausted = True
            return 1.0
        self.divisions += 1
        return settings.factor

    def later(self, steps: int) -> str:
        waited = max(self.settings.patience * steps, self.settings.patience_steps)
        return f"raise schedule.patience_steps above {waited}, the steps that it has waited for"


class Milestones(Schedule):
    """Divisions after given epochs, whatever the error."""

    def rate(self, lr: float, epoch: int, step: int, steps: int) -> float:
        return lr / self.settings.factor ** sum(epoch >= milestone for milestone in self.settings.milestones)

    def end_epoch(self, error: float, loss: float, epoch: int, steps: int) -> float:
        return self.settings.factor if epoch + 1 in self.settings.milestones else 1.0

    def later(self, steps: int) -> str:
        return f"move schedule.milestones {list(self.settings.milestones)} to later epochs"


class Cosine(Schedule):
    """Half a cosine, from the end of the warm-up down to 0 at the end of the last epoch: Loshchilov and Hutter, SGDR
    (2017), equation 5, without restarts."""

    def rate(self, lr: float, epoch: int, step: int, steps: int) -> float:
        warmup = self.settings.warmup_epochs
        done = (epoch + step / steps - warmup) / max(1 / steps, self.epochs - warmup)
        return lr * (1 + math.cos(math.pi * min(1.0, max(0.0, done)))) / 2


class BlogRule(Schedule):
    """The rule of docs/blog.md: once the summed training loss has been above its minimum for more than ten epochs in a
    row, every further such epoch divides the learning rate.

    As there, an epoch that equals the minimum ends the row, and a division does not. A minimum that is not a number is
    replaced after the next epoch; if that one is none either, and so on, nothing is ever divided. The loss is summed
    over samples here and over the means of batches there, which is the same where all batches are full.

    Attributes:
        minimum: of the summed training losses.
        worse: epochs above it in a row.
        divisions: number of divisions so far.
    """

    saved = ("minimum", "worse", "divisions")
    forms: ClassVar[dict[str, Any]] = {"minimum": float, "worse": Count, "divisions": Count}
    minimum: float = 1e9
    worse: int = 0
    divisions: int = 0

    def rate(self, lr: float, epoch: int, step: int, steps: int) -> float:
        return lr / self.settings.factor**self.divisions

    def end_epoch(self, error: float, loss: float, epoch: int, steps: int) -> float:
        if not self.minimum < loss:  # also if one of them is not a number
            self.minimum, self.worse = loss, 0
            return 1.0
        self.worse += 1
        if self.worse <= 10:
            return 1.0
        self.divisions += 1
        return self.settings.factor


def build(config: Config) -> Schedule:
    """The schedule called `schedule.name`. Raises UserError if there is none, or if a run could not be continued with
    it."""
    key = ("schedule.name", config.schedule.name)
    found = resolve.resolve(*key, choices.SCHEDULES)

    def made() -> Schedule:
        schedule = resolve.make(
            *key,
            found,
            options=config.schedule.options,
            kind=Schedule,
            remedy="it takes schedule.options, and derives from dist_train.schedules.Schedule",
        )
        for name in set(schedule.saved) - vars(schedule).keys():  # a list of the class would be shared
            setattr(schedule, name, copy.deepcopy(getattr(schedule, name)))
        schedule.settings, schedule.base, schedule.epochs = config.schedule, config.optim.lr, config.train.epochs
        return schedule

    most = min(len(TRIAL), config.train.epochs)
    try:
        resumes = all(_resumes(made, epochs, most) for epochs in range(most))
    except NoRate as error:
        raise ConfigError(str(error)) from error
    except resolve.NameProblem:
        raise
    except Exception as error:
        raise resolve.failed(*key, error, "failed when it was tried on some epochs") from error
    if not resumes:
        raise resolve.NameProblem(
            f"{' '.join(key)} goes on otherwise once its state was saved and loaded: name in `saved` what changes"
        )
    return made()


def _resumes(made: Callable[[], Schedule], epochs: int, most: int) -> bool:
    """Whether a schedule that is saved and loaded after so many of the first `most` epochs of TRIAL goes on as one that
    never was."""
    undisturbed, resumed = made(), made()

    def rates(schedule: Schedule, epochs: range) -> list[tuple[float, float, float]]:
        return [(schedule.lr(e, 0, 2), schedule.lr(e, 1, 2), schedule.ended(*TRIAL[e], e, 2)) for e in epochs]

    rates(undisturbed, range(epochs))
    resumed.load_state_dict(undisturbed.state_dict())
    rest = range(epochs, most)
    return rates(resumed, rest) == rates(undisturbed, rest) and resumed.exhausted == undisturbed.exhausted


def _number(value: Any) -> Any:
    """The number in a scalar of numpy or torch."""
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"a checkpoint holds numbers, strings, lists and dicts of these, and no {type(value).__name__}")


def remedy(config: Config, schedule: Schedule, steps: int) -> str:
    """What to do if the learning rate was divided before the net has begun to learn, and where the epochs of the
    division came from."""
    milestones = list(config.schedule.milestones)
    source, theirs = _made_for(DEFAULT)
    if isinstance(schedule, Milestones) and config.data.source != source and milestones == theirs:
        return (
            f"schedule.milestones {milestones} is the default of configs/{DEFAULT.name}, made for Fashion-MNIST; for "
            f"images of your own begin a run with --config configs/own.yaml"
        )
    return schedule.later(steps)


def _made_for(file: Path) -> tuple[str, list[int]]:
    """Source and milestones in a YAML file; none if it cannot be read, which must not end a run."""
    try:
        settings = yamls.load(yamls.read(file))
        return str(settings["data"]["source"]), list(settings["schedule"]["milestones"])
    except (OSError, ValueError, LookupError, TypeError):
        return "", []
