"""Results of an experiment: tables and pictures of its arms, from what its runs have recorded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dist_train.analysis.arms import Arm, Experiment
from dist_train.analysis.recorded import ArmRun, as_file, of_file, of_runs
from dist_train.pictures.sweeps import (
    PANELS,
    Curve,
    Epochs,
    Probed,
    draw_arms,
    draw_epochs,
    draw_layers,
    draw_ratios,
)
from pipelines.files import write_atomically
from pipelines.png import as_png

Runs = Mapping[str, Sequence[ArmRun]]  # by the label of the arm
EPOCHS = 10  # of a run at least, for a picture of its epochs
LAST = 10  # epochs that a mean is of
FIRST, LAST_HIDDEN = "conv1", "fc7"  # layers of the table of probes


def report(experiment: Experiment, out: Path) -> list[Path]:
    """Write NAME.md, NAME.png and NAME.jsonl; if the sweep has columns NAME-columns.md; if a run divided its learning
    rate NAME-rates.md; if one has epochs to look at NAME-epochs.png; if layers were probed NAME-layers.md,
    NAME-outputs.png, NAME-gradients.png and NAME-lr.png; without runs, from the NAME.jsonl that is there. Returns the
    paths: none if there is nothing to draw."""
    title, source = experiment.name, out / f"{experiment.name}.jsonl"
    found = of_runs(experiment) or of_file(source)
    runs = {label(experiment, arm): own for arm in experiment.arms if (own := _of(arm, found))}
    if not runs:
        return []
    trained = {name: own for name, own in runs.items() if not own[0].averaged}
    errors = {name: [run.errors[-1] for run in own if run.errors] for name, own in runs.items()}
    curves = {
        name: [Curve([step.step for step in run.steps], [step.loss for step in run.steps]) for run in own]
        for name, own in trained.items()
    }
    files = {source.name: as_file(found), f"{title}.md": table(runs, experiment).encode()}
    if experiment.columns:
        files[f"{title}-columns.md"] = side_by_side(trained, experiment.columns, experiment.begun).encode()
    if any(len({epoch.lr for epoch in run.epochs}) > 1 for run in found):
        files[f"{title}-rates.md"] = table_of_rates(trained).encode()
    if max(len(run.epochs) for run in found) >= EPOCHS:
        files[f"{title}-epochs.png"] = as_png(
            draw_epochs({name: [_epochs(run) for run in own if run.epochs] for name, own in trained.items()}, title)
        )
    files[f"{title}.png"] = as_png(draw_arms(curves, errors, title, _batches(trained)))
    if probed := {name: own[0] for name, own in trained.items() if own[0].probes}:
        names, probes = list(probed), measured(list(probed.values()))
        files[f"{title}-layers.md"] = table_of_layers(probed).encode()
        for picture in PANELS:
            files[f"{title}-{picture}.png"] = as_png(draw_layers(names, probes, picture, title))
        files[f"{title}-lr.png"] = as_png(draw_ratios(names, probes, title))
    out.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_atomically(out / name, content)
    return [out / name for name in files]


def _epochs(run: ArmRun) -> Epochs:
    epochs = run.epochs
    return Epochs([e.step for e in epochs], [e.train_error for e in epochs], run.errors, [e.lr for e in epochs])


def label(experiment: Experiment, arm: Arm) -> str:
    """Name of an arm, with its seeds if another arm has the same name."""
    if sum(other.name == arm.name for other in experiment.arms) == 1:
        return arm.name
    return f"{arm.name}, seed {', '.join(map(str, arm.seeds))}"


def _of(arm: Arm, runs: Sequence[ArmRun]) -> list[ArmRun]:
    return [run for run in runs if run.arm == arm.name and run.seed in arm.seeds]


def table(runs: Runs, experiment: Experiment) -> str:
    """Markdown table, one row per arm: the mean over its seeds, with the least and the greatest in brackets. Where no
    run stops at a training error, that of the last epoch is a column."""
    levels = [experiment.begun]
    if stop := max(run.until_error for own in runs.values() for run in own):
        levels.append(stop)
    head = ["arm", "runs", f"training error below {levels[0]:.0%} at step"]
    head += [f"below {level:.0%} at step" for level in levels[1:]]
    head += [f"validation error below {level:.0%} at step" for level in experiment.validated]
    ended = not stop and all(run.epochs for own in runs.values() for run in own)
    head += ["training error"] * ended + ["top-1 error, validation", "steps"]
    wanted = RowParts(levels, experiment.validated, ended)
    return _markdown(head, [_row(name, own, wanted) for name, own in runs.items()])


class RowParts(NamedTuple):
    """What a row of the table says besides the outcome: steps at these training and validation errors, and whether the
    last training error."""

    levels: Sequence[float]
    validated: Sequence[float]
    ended: bool


def table_of_rates(runs: Runs) -> str:
    """Markdown table, one row per learning rate of a run: its epochs, the training error of their last, and what the
    top-1 validation error was at their end and at its lowest."""
    rows = []
    for name, own in runs.items():
        for run in own:
            ends = list(zip(run.epochs, run.errors, strict=False))  # an older file has errors alone
            for lr, group in groupby(enumerate(ends, 1), key=lambda numbered: numbered[1][0].lr):
                numbers, found = zip(*group, strict=True)
                errors = [error for _, error in found]
                epochs = f"{numbers[0]} to {numbers[-1]}"
                ended = [f"{found[-1][0].train_error:.2%}", f"{errors[-1]:.2%}", f"{min(errors):.2%}"]
                rows.append([name, str(run.seed), f"{lr:g}", epochs, *ended, f"{np.mean(errors[-LAST:]):.2%}"])
    head = ["arm", "seed", "learning rate", "epochs", "training error, last epoch", "top-1 error, last epoch"]
    return _markdown([*head, "lowest", f"mean of the last {LAST} epochs"], rows)


def side_by_side(runs: Runs, columns: Sequence[str], begun: float) -> str:
    """Markdown table with a column for each beginning of the arms' names, and a row for each of their ends. A cell has
    the outcome of each run of an arm."""
    found = {tuple(name.split(", ", 1)): own for name, own in runs.items() if name.split(", ", 1)[0] in columns}
    ends = [end for end in dict.fromkeys(name[-1] for name in found) if all((one, end) in found for one in columns)]
    cells = [["; ".join(_outcome(run, begun) for run in found[column, end]) for column in columns] for end in ends]
    return _markdown(["", *columns], [[end, *row] for end, row in zip(ends, cells, strict=True)])


def _outcome(run: ArmRun, begun: float) -> str:
    """Whether a run has begun to learn, and how far it has come."""
    step = run.first_below(begun)
    how = "diverged" if run.diverged else f"begins at step {step}" if step else "does not begin"
    error = f", error {run.errors[-1]:.1%}" if run.errors else ""
    return f"{how}; after {run.last_step}{error}" if step else f"{how} in {run.last_step} steps{error}"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "".join("| " + " | ".join(line) + " |\n" for line in [head, ["---"] * len(head), *rows])


def _row(name: str, runs: Sequence[ArmRun], wanted: RowParts) -> list[str]:
    errors = [run.errors[-1] for run in runs if run.errors]
    if runs[0].averaged:
        gap = [""] * (len(wanted.levels) + len(wanted.validated) + wanted.ended)
        return [name, str(len(runs)), *gap, _span(errors, "{:.2%}".format), ""]
    outcomes = [_span(errors, "{:.2%}".format)] if errors else []
    if diverged := sum(run.diverged for run in runs):
        outcomes.append(f"{diverged} of {len(runs)} diverged")
    when = [_when(runs, [run.first_below(level) for run in runs]) for level in wanted.levels]
    when += [_when(runs, [run.validated_below(level) for run in runs]) for level in wanted.validated]
    if wanted.ended:
        when.append(_span([run.epochs[-1].train_error for run in runs], "{:.2%}".format))
    return [name, str(len(runs)), *when, "; ".join(outcomes), _span([run.last_step for run in runs], "{:.0f}".format)]


def _when(runs: Sequence[ArmRun], reached: Sequence[int | None]) -> str:
    """The steps at which these runs reached an error, and how many of them never did."""
    found = [step for step in reached if step is not None]
    steps = _span(found, "{:.0f}".format)
    if len(found) == len(runs):
        return steps
    never = f"never in {min(run.last_step for run in runs)}"
    return f"{steps}; {len(runs) - len(found)} of {len(runs)} {never}" if found else never


def _span(values: Sequence[float], show: Callable[[float], str]) -> str:
    """The mean, and if there are several values the least and the greatest."""
    if not values:
        return ""
    mean = show(float(np.mean(values)))
    return mean if len(values) == 1 else f"{mean} ({show(min(values))} to {show(max(values))})"


class Column(NamedTuple):
    """A column of the table of probes: its heading, and its value for a run and what was measured before a step."""

    head: str
    value: Callable[[ArmRun, dict[str, Any]], float | None]


COLUMNS = (
    Column("loss", lambda _, probe: float(probe["loss"])),
    Column("largest stable lr of the last layer", lambda run, probe: run.stable_lr(probe)),
    Column("signal at fc 7", lambda _, probe: _of_layer(probe, LAST_HIDDEN, "signal")),
    Column("gradient of conv 1", lambda _, probe: _of_layer(probe, FIRST, "gradient")),
    Column("dead in fc 7", lambda _, probe: _of_layer(probe, LAST_HIDDEN, "dead")),
)


def table_of_layers(runs: Mapping[str, ArmRun]) -> str:
    """Markdown table of what was measured before each probed step, of one run per arm; a dash where nothing was."""
    steps = sorted({probe["step"] for run in runs.values() for probe in run.probes})
    head = ["arm", *(f"{column.head}, before step {' / '.join(map(str, steps))}" for column in COLUMNS)]
    rows = []
    for name, run in runs.items():
        probes = [run.probe(step) for step in steps]
        cells = [[_cell(column.value(run, probe) if probe else None) for probe in probes] for column in COLUMNS]
        rows.append([name, *(" / ".join(cell) if set(cell) != {"-"} else "" for cell in cells)])
    return _markdown(head, rows)


def _of_layer(probe: Mapping[str, Any], layer: str, key: str) -> float:
    """A quantity of a layer; of one in two towers, the root of the mean of its squares."""
    found = [values[key] for name, values in probe["layers"].items() if name.rpartition(".")[2] == layer]
    return float(np.sqrt(np.mean(np.square(found)))) if found else float("nan")


def _cell(value: float | None) -> str:
    return "-" if value is None or not np.isfinite(value) else f"{value:.2g}"


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
    return " or ".join(map(str, sorted({run.batch for own in runs.values() for run in own})))
