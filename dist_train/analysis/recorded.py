"""What the tables and pictures of an experiment are drawn from: NAME.jsonl beside them, one line per run. It is made
from the records of the runs, and takes their place where there are no runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from dist_train.analysis.arms import Arm, Experiment
from dist_train.analysis.trained import RunError, read_config
from dist_train.config import Config
from dist_train.probe import stable_lr
from dist_train.rundir import record, status
from dist_train.rundir.state import MEMORY
from pipelines.files import jsonl, read_json, read_jsonl


class StepLine(NamedTuple):
    """A recorded step of a run, with its loss in nats and the training error, a running mean of 0..1."""

    step: int
    loss: float
    error: float


class EpochLine(NamedTuple):
    """An epoch of a run: the steps done at its end, its learning rate, the loss of validation after it in nats, and the
    mean loss and the error, 0..1, of its training batches, with dropout and random crops."""

    step: int
    lr: float
    loss: float
    train_loss: float
    train_error: float


@dataclass(frozen=True)
class ArmRun:
    """One run of an arm, or with `averaged` one pair of runs whose predictions are averaged.

    Attributes:
        arm: its name in the sweep.
        seed: of the run; of a pair, the first.
        until_error: `train.until_error`.
        momentum: of SGD; None for other optimizers.
        errors: top-1 validation errors, 0..1, in the order of the epochs.
        epochs: what else is known of these; none in files and runs that are older.
        probes: what `dist_train.probe` measured, with `step` and `lr`.
    """

    arm: str
    seed: int
    averaged: bool = False
    diverged: bool = False
    batch: int = 0
    until_error: float = 0.0
    momentum: float | None = None
    steps: list[StepLine] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    epochs: list[EpochLine] = field(default_factory=list)
    probes: list[dict[str, Any]] = field(default_factory=list)

    @property
    def last_step(self) -> int:
        """The last recorded step; 0 if there is none."""
        return self.steps[-1].step if self.steps else 0

    def first_below(self, error: float) -> int | None:
        """First recorded step with a running training error below this one, once that looks back far enough."""
        return next((found.step for found in self.steps if found.step >= MEMORY and found.error < error), None)

    def validated_below(self, error: float) -> int | None:
        """Steps done at the end of the first epoch whose top-1 validation error is below this one."""
        ends = zip(self.epochs, self.errors, strict=False)  # an older file has errors alone
        return next((epoch.step for epoch, found in ends if found < error), None)

    def probe(self, step: int) -> dict[str, Any] | None:
        """Measurements before a step; None if there are none."""
        return next((probe for probe in self.probes if probe["step"] == step), None)

    def stable_lr(self, probe: Mapping[str, Any]) -> float | None:
        """Largest stable learning rate of the last layer; None for optimizers other than SGD."""
        return None if self.momentum is None else stable_lr(probe["curvature"], self.momentum)


def running_errors(steps: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, float]]:
    """Recorded steps, each with the training error as `Progress.train_error` remembers it, from the means of windows.
    Older programs recorded that error itself."""
    mean, before = 0.0, 0
    for line in steps:
        step, error = line["step"], line["train_error"]
        if record.MACHINE in line:
            many = step - before
            weight = many / step if step <= MEMORY else 1 - (1 - 1 / MEMORY) ** many
            mean += (error - mean) * weight
        else:
            mean = error
        before = step
        yield step, mean


def of_runs(experiment: Experiment) -> list[ArmRun]:
    """The runs of an experiment that have been started, and the pairs that have been evaluated. Raises RunError."""
    runs = []
    for arm in experiment.trained:
        for seed in arm.seeds:
            directory = arm.run(experiment.root, seed)
            if status.read(directory) and (directory / "config.yaml").exists():
                runs.append(_load(arm, seed, directory))
    for arm in experiment.ensembles:
        for seed, pair in zip(arm.seeds, experiment.pairs(arm), strict=False):
            if pair.result.exists():
                runs.append(ArmRun(arm.name, seed, averaged=True, errors=[read_json(pair.result)["top1_error"]]))
    return runs


def of_file(path: Path) -> list[ArmRun]:
    """What a file of `as_file` holds; nothing if there is none. Raises UserError if it is damaged."""

    def made(line: dict[str, Any]) -> ArmRun:
        lines = {"steps": [StepLine(*row) for row in line["steps"]]}
        return ArmRun(**line | lines | {"epochs": [EpochLine(*row) for row in line.get("epochs", ())]})

    return [made(line) for line in read_jsonl(path)]


def as_file(runs: Sequence[ArmRun]) -> bytes:
    """The runs as JSON lines."""
    return jsonl([asdict(run) for run in runs])


def _load(arm: Arm, seed: int, directory: Path) -> ArmRun:
    """The run in a directory, numbers with six digits. Raises RunError."""
    try:
        return _of_lines(arm, seed, read_config(directory), record.read(directory), status.read(directory)["state"])
    except KeyError as missing:
        raise RunError(
            f"{directory / record.FILE} has a line without {missing}: restore it, or move the run away"
        ) from missing


def _of_lines(arm: Arm, seed: int, config: Config, records: list[dict[str, Any]], state: str) -> ArmRun:
    """The run of these records, which ended in this state. Raises KeyError."""
    steps, checks, probes = ([r for r in records if r["kind"] == kind] for kind in ("step", "validation", "probe"))
    errors = dict(running_errors(steps))
    if state == "done" and _reached(config, steps, checks):
        end = steps[-1]["step"]
        errors[end] = min(errors[end], config.train.until_error - 1e-6)
    known = all("train_error" in check for check in checks)
    return ArmRun(
        arm.name,
        seed,
        diverged=state == "diverged",
        batch=config.train.global_batch,
        until_error=config.train.until_error,
        momentum=config.optim.momentum if config.optim.name == "sgd" else None,
        steps=[StepLine(line["step"], _short(line["loss"]), _short(errors[line["step"]])) for line in steps],
        errors=[_short(check["top1_error"]) for check in checks],
        epochs=[EpochLine(*(_short(check[key]) for key in EpochLine._fields)) for check in checks if known],
        probes=[_short({key: value for key, value in probe.items() if key != record.MACHINE}) for probe in probes],
    )


def _reached(config: Config, steps: list[dict[str, Any]], checks: list[dict[str, Any]]) -> bool:
    """Whether a run that is done ended by `train.until_error`, and so below it: from the means of windows, its running
    error can be a ten-thousandth too high."""
    train = config.train
    if not (train.until_error and steps and checks) or steps[-1]["step"] != checks[-1]["step"]:
        return False
    return not 0 < train.max_steps <= steps[-1]["step"] and bool(steps[-1]["progress"] < train.epochs)


def _short(value: Any) -> Any:
    """A number, or all in a mapping, with six digits."""
    if isinstance(value, dict):
        return {key: _short(inner) for key, inner in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value
