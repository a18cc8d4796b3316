"""What an experiment shows: a table and pictures of its arms, from the records of their runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_train.analysis.arms import Arm, Experiment
from dist_train.analysis.trained import read_config
from dist_train.config import Config
from dist_train.pictures.sweeps import PANELS, Curve, Probed, draw_arms, draw_layers
from dist_train.probe import stable_lr
from dist_train.rundir import record, status
from dist_train.rundir.state import MEMORY
from pipelines.files import read_json, write_atomically
from pipelines.png import as_png

# A training error that says that a net has begun to learn: it is right twice as often as guessing among ten classes,
# which all of configs/experiments have.
BEGUN = 0.8


@dataclass(frozen=True)
class ArmRun:
    """One run of an arm: its settings, whether it diverged, and its records."""

    config: Config
    diverged: bool
    steps: list[dict[str, Any]]
    checks: list[dict[str, Any]]
    probes: list[dict[str, Any]]

    @property
    def last_step(self) -> int:
        """The last recorded step; 0 if there is none."""
        return int(self.steps[-1]["step"]) if self.steps else 0

    def first_below(self, error: float) -> int | None:
        """The first recorded step whose running training error lies below, once that looks back far enough."""
        means = running_errors(self.steps)
        return next((step for step, mean in means if step >= MEMORY and mean < error), None)

    def probe(self, step: int) -> dict[str, Any] | None:
        """What was measured before a step, if it was."""
        return next((probe for probe in self.probes if probe["step"] == step), None)

    def stable_lr(self, probe: dict[str, Any]) -> float | None:
        """The largest stable learning rate of the last layer; None for another optimizer than SGD."""
        optim = self.config.optim
        return stable_lr(probe["curvature"], optim.momentum) if optim.name == "sgd" else None


Runs = Mapping[str, Sequence[ArmRun]]  # by the name of the arm
Errors = Mapping[str, Sequence[float]]  # of validation, of the runs or pairs of each arm


def running_errors(steps: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, float]]:
    """Each recorded step, and the training error as `Progress.train_error` remembers it, from the means of windows.
    Older programs have recorded that itself."""
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


def report(experiment: Experiment, out: Path) -> list[Path]:
    """Write NAME.md and NAME.png, and NAME-layers.png if layers were probed. Returns the paths: none if nothing was
    run."""
    runs = {label(experiment, arm): found for arm in experiment.trained if (found := _runs(experiment, arm))}
    if not runs:
        return []
    errors = {name: [run.checks[-1]["top1_error"] for run in found if run.checks] for name, found in runs.items()}
    for arm in experiment.ensembles:
        results = [pair.result for pair in experiment.pairs(arm) if pair.result.exists()]
        errors[label(experiment, arm)] = [read_json(path)["top1_error"] for path in results]
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"{experiment.name}.md", out / f"{experiment.name}.png"]
    write_atomically(paths[0], table(runs, errors).encode())
    curves = {
        name: [Curve([r["step"] for r in run.steps], [r["loss"] for r in run.steps]) for run in found]
        for name, found in runs.items()
    }
    write_atomically(paths[1], as_png(draw_arms(curves, errors, experiment.name, _batches(runs))))
    probed = {name: found[0] for name, found in runs.items() if found[0].probes}
    if probed:
        paths.append(out / f"{experiment.name}-layers.png")
        write_atomically(paths[2], as_png(draw_layers(list(probed), measured(list(probed.values())))))
    return paths


def label(experiment: Experiment, arm: Arm) -> str:
    """The name of an arm, with its seeds if another one has the same name."""
    if sum(other.name == arm.name for other in experiment.arms) == 1:
        return arm.name
    return f"{arm.name}, seed {', '.join(map(str, arm.seeds))}"


def table(runs: Runs, errors: Errors) -> str:
    """Markdown, a row for each arm; over its seeds the mean, and in brackets the least and the greatest."""
    every = [run for found in runs.values() for run in found]
    levels = [BEGUN]
    if stop := max(run.config.train.until_error for run in every):
        levels.append(stop)
    probed = sorted({probe["step"] for run in every for probe in run.probes})
    head = ["arm", "runs", f"training error below {levels[0]:.0%} at step"]
    head += [f"below {level:.0%} at step" for level in levels[1:]]
    head += ["top-1 error, validation", "steps"]
    head += [f"largest stable lr at step {step}" for step in probed]
    rows = [_row(name, runs.get(name, ()), values, levels, probed) for name, values in errors.items()]
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _row(
    name: str, runs: Sequence[ArmRun], errors: Sequence[float], levels: Sequence[float], probed: Sequence[int]
) -> list[str]:
    outcomes = []
    if errors:
        outcomes.append(_span(errors, "{:.2%}".format))
    if diverged := sum(run.diverged for run in runs):
        outcomes.append(f"{diverged} of {len(runs)} diverged")
    row = [name, str(len(runs) or len(errors))]
    row += [_when(runs, level) for level in levels]
    row += ["; ".join(outcomes), _span([run.last_step for run in runs], "{:.0f}".format)]
    return row + [_stable(runs, step) for step in probed]


def _when(runs: Sequence[ArmRun], error: float) -> str:
    """The step at which the training error of the runs first lay below, and how many never came there."""
    if not runs:
        return ""
    found = [step for run in runs if (step := run.first_below(error)) is not None]
    steps = _span(found, "{:.0f}".format)
    if len(found) == len(runs):
        return steps
    never = f"never in {min(run.last_step for run in runs)}"
    return f"{steps}; {len(runs) - len(found)} of {len(runs)} {never}" if found else never


def _stable(runs: Sequence[ArmRun], step: int) -> str:
    """The largest stable learning rate at a step; nothing if it is not known, or not finite, for each run."""
    limits = [run.stable_lr(probe) or 0.0 for run in runs for probe in run.probes if probe["step"] == step]
    if not limits or not all(0 < limit < float("inf") for limit in limits):
        return ""
    return _span(limits, "{:.2g}".format)


def _span(values: Sequence[float], show: Callable[[float], str]) -> str:
    """The mean, and if there are several values the least and the greatest."""
    if not values:
        return ""
    mean = show(float(np.mean(values)))
    return mean if len(values) == 1 else f"{mean} ({show(min(values))} to {show(max(values))})"


def measured(runs: Sequence[ArmRun]) -> list[Probed]:
    """What the probes of these runs have measured, for each probed step."""
    probes = []
    for step in sorted({probe["step"] for run in runs for probe in run.probes}):
        found = [run.probe(step) for run in runs]
        tables: list[dict[str, Any]] = [probe["layers"] if probe else {} for probe in found]
        layers = max((list(table) for table in tables), key=len)
        values = {panel.key: _matrix(tables, layers, panel.key) for panel in PANELS}
        ratios = [_ratio(run, probe) for run, probe in zip(runs, found, strict=True)]
        probes.append(Probed(step, layers, values, np.array(ratios)))
    return probes


def _matrix(tables: Sequence[dict[str, Any]], layers: Sequence[str], key: str) -> NDArray[np.float64]:
    """One quantity of each run and layer, float64 [runs, layers]; NaN if it is missing, or was not finite."""
    values = np.array([[table.get(layer, {}).get(key, np.nan) for layer in layers] for table in tables], np.float64)
    values[~np.isfinite(values)] = np.nan  # of a run that diverged
    return values


def _ratio(run: ArmRun, probe: dict[str, Any] | None) -> float:
    """The learning rate over the largest stable one; NaN if it is not known."""
    limit = run.stable_lr(probe) if probe else None
    return float("nan") if probe is None or limit is None else float(probe["lr"]) / limit


def _batches(runs: Runs) -> str:
    """Images in a step, of all arms."""
    return " or ".join(map(str, sorted({run.config.train.global_batch for found in runs.values() for run in found})))


def _runs(experiment: Experiment, arm: Arm) -> list[ArmRun]:
    """The runs of an arm that have begun."""
    directories = [arm.run(experiment.root, seed) for seed in arm.seeds]
    return [_load(path) for path in directories if status.read(path) and (path / "config.yaml").exists()]


def _load(directory: Path) -> ArmRun:
    """The run in a directory. Raises RunError."""
    records = record.read(directory)
    steps, checks, probes = ([r for r in records if r["kind"] == kind] for kind in ("step", "validation", "probe"))
    return ArmRun(read_config(directory), status.read(directory)["state"] == "diverged", steps, checks, probes)
