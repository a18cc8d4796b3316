"""Results of an experiment: a table and pictures of its arms, from the records of their runs."""

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
from dist_train.pictures.sweeps import PANELS, Curve, Probed, draw_arms, draw_layers, draw_ratios
from dist_train.probe import stable_lr
from dist_train.rundir import record, status
from dist_train.rundir.state import MEMORY
from pipelines.files import read_json, write_atomically
from pipelines.png import as_png

# Training error below which a net has begun to learn: right twice as often as a guess among ten classes, which all of
# configs/experiments have.
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
        """First recorded step with a running training error below this one, once that looks back far enough."""
        means = running_errors(self.steps)
        return next((step for step, mean in means if step >= MEMORY and mean < error), None)

    def probe(self, step: int) -> dict[str, Any] | None:
        """Measurements before a step; None if there are none."""
        return next((probe for probe in self.probes if probe["step"] == step), None)

    def stable_lr(self, probe: dict[str, Any]) -> float | None:
        """Largest stable learning rate of the last layer; None for optimizers other than SGD."""
        optim = self.config.optim
        return stable_lr(probe["curvature"], optim.momentum) if optim.name == "sgd" else None


Runs = Mapping[str, Sequence[ArmRun]]  # by the name of the arm
Errors = Mapping[str, Sequence[float]]  # of validation, of the runs or pairs of each arm


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


def report(experiment: Experiment, out: Path) -> list[Path]:
    """Write NAME.md and NAME.png, and if layers were probed NAME-outputs.png, NAME-gradients.png and NAME-lr.png.
    Returns the paths: none if nothing was run."""
    title = experiment.name
    runs = {label(experiment, arm): found for arm in experiment.trained if (found := _runs(experiment, arm))}
    if not runs:
        return []
    errors = {name: [run.checks[-1]["top1_error"] for run in found if run.checks] for name, found in runs.items()}
    for arm in experiment.ensembles:
        results = [pair.result for pair in experiment.pairs(arm) if pair.result.exists()]
        errors[label(experiment, arm)] = [read_json(path)["top1_error"] for path in results]
    curves = {
        name: [Curve([r["step"] for r in run.steps], [r["loss"] for r in run.steps]) for run in found]
        for name, found in runs.items()
    }
    files = {f"{title}.md": table(runs, errors).encode()}
    files[f"{title}.png"] = as_png(draw_arms(curves, errors, title, _batches(runs)))
    if probed := {name: found[0] for name, found in runs.items() if found[0].probes}:
        names, probes = list(probed), measured(list(probed.values()))
        for picture in PANELS:
            files[f"{title}-{picture}.png"] = as_png(draw_layers(names, probes, picture, title))
        files[f"{title}-lr.png"] = as_png(draw_ratios(names, probes, title))
    out.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_atomically(out / name, content)
    return [out / name for name in files]


def label(experiment: Experiment, arm: Arm) -> str:
    """Name of an arm, with its seeds if another arm has the same name."""
    if sum(other.name == arm.name for other in experiment.arms) == 1:
        return arm.name
    return f"{arm.name}, seed {', '.join(map(str, arm.seeds))}"


def table(runs: Runs, errors: Errors) -> str:
    """Markdown table, one row per arm: the mean over its seeds, with the least and the greatest in brackets."""
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
    """First step of the runs with a training error below this one, and how many of them never reached it."""
    if not runs:
        return ""
    found = [step for run in runs if (step := run.first_below(error)) is not None]
    steps = _span(found, "{:.0f}".format)
    if len(found) == len(runs):
        return steps
    never = f"never in {min(run.last_step for run in runs)}"
    return f"{steps}; {len(runs) - len(found)} of {len(runs)} {never}" if found else never


def _stable(runs: Sequence[ArmRun], step: int) -> str:
    """Largest stable learning rate at a step; empty unless it is known, and finite, for every run."""
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
    """Measurements of the probes of these runs, per probed step."""
    probes = []
    for step in sorted({probe["step"] for run in runs for probe in run.probes}):
        found = [run.probe(step) for run in runs]
        tables: list[dict[str, Any]] = [probe["layers"] if probe else {} for probe in found]
        layers = max((list(table) for table in tables), key=len)
        values = {panel.key: _matrix(tables, layers, panel.key) for panels in PANELS.values() for panel in panels}
        ratios = [_ratio(run, probe) for run, probe in zip(runs, found, strict=True)]
        probes.append(Probed(step, layers, values, np.array(ratios)))
    return probes


def _matrix(tables: Sequence[dict[str, Any]], layers: Sequence[str], key: str) -> NDArray[np.float64]:
    """One quantity per run and layer, float64 [runs, layers]; NaN if it is missing or not finite."""
    values = np.array([[table.get(layer, {}).get(key, np.nan) for layer in layers] for table in tables], np.float64)
    values[~np.isfinite(values)] = np.nan  # of a run that diverged
    return values


def _ratio(run: ArmRun, probe: dict[str, Any] | None) -> float:
    """Ratio of the learning rate to the largest stable one; NaN if that is not known."""
    limit = run.stable_lr(probe) if probe else None
    return float("nan") if probe is None or limit is None else float(probe["lr"]) / limit


def _batches(runs: Runs) -> str:
    """Images per step, of all arms."""
    return " or ".join(map(str, sorted({run.config.train.global_batch for found in runs.values() for run in found})))


def _runs(experiment: Experiment, arm: Arm) -> list[ArmRun]:
    """The started runs of an arm."""
    directories = [arm.run(experiment.root, seed) for seed in arm.seeds]
    return [_load(path) for path in directories if status.read(path) and (path / "config.yaml").exists()]


def _load(directory: Path) -> ArmRun:
    """The run in a directory. Raises RunError."""
    records = record.read(directory)
    steps, checks, probes = ([r for r in records if r["kind"] == kind] for kind in ("step", "validation", "probe"))
    return ArmRun(read_config(directory), status.read(directory)["state"] == "diverged", steps, checks, probes)
