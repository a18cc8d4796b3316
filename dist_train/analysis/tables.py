"""What an experiment shows: a table and pictures of its arms, from the records of their runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dist_train.analysis.experiments import Arm, Experiment
from dist_train.cli import parse
from dist_train.config import Config
from dist_train.monitor.terminal import STATUS, read_records
from dist_train.probe import stable_lr
from pipelines.files import write_atomically

Record = dict[str, Any]
OFF = 0.8  # a training error that guessing among 10 classes does not reach: the net has begun to learn


@dataclass(frozen=True)
class Run:
    """One run: its settings, whether it diverged, and its records."""

    config: Config
    diverged: bool
    steps: list[Record]
    checks: list[Record]
    probes: list[Record]

    def first_below(self, error: float) -> int | None:
        """The first recorded step whose running training error lies below."""
        return next((r["step"] for r in self.steps if r["step"] >= 50 and r["train_error"] < error), None)


def report(experiment: Experiment, out: Path) -> list[Path]:
    """Write NAME.md and NAME.png, and NAME-layers.png where layers were probed. Returns what was written: nothing
    where nothing was run."""
    arms = {
        arm: [run for seed in arm.seeds if (run := _load(arm.run(experiment.root, seed)))] for arm in experiment.arms
    }
    alone = {arm: runs for arm, runs in arms.items() if runs and not arm.of}
    if not alone:
        return []
    errors = {arm: [r.checks[-1]["top1_error"] for r in runs if r.checks] for arm, runs in alone.items()}
    for arm in (arm for arm in arms if arm.of):
        results = [path for _, _, path in experiment.pairs(arm) if path.exists()]
        errors[arm] = [json.loads(path.read_text())["top1_error"] for path in results]
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"{experiment.name}.md", out / f"{experiment.name}.png"]
    write_atomically(paths[0], table(alone, errors).encode())
    draw(alone, errors, experiment.name).savefig(paths[1], dpi=110)
    if any(run.probes for runs in alone.values() for run in runs):
        paths.append(out / f"{experiment.name}-layers.png")
        draw_layers({arm: runs[0] for arm, runs in alone.items() if runs[0].probes}).savefig(paths[2], dpi=110)
    return paths


def table(arms: dict[Arm, list[Run]], errors: dict[Arm, list[float]]) -> str:
    """Markdown, one row an arm; over its seeds the mean, and in brackets the least and the greatest."""
    level = max(run.config.train.until_error for runs in arms.values() for run in runs)
    probed = sorted({p["step"] for runs in arms.values() for run in runs for p in run.probes})
    head = ["arm", "runs", f"training error below {OFF:.0%} at step"]
    head += [f"below {level:.0%} at step"] if level else []
    head += ["top-1 error, validation", "steps"] + [f"largest stable lr at step {step}" for step in probed]
    rows = []
    for arm, values in errors.items():
        runs = arms.get(arm, [])
        row = [arm.name, str(len(runs) or len(values)), _when(runs, OFF) if runs else ""]
        row += [_when(runs, level) if runs else ""] if level else []
        diverged = sum(run.diverged for run in runs)
        told = [_span(values, "{:.2%}".format)] * bool(values) + [f"{diverged} of {len(runs)} diverged"] * bool(
            diverged
        )
        row += ["; ".join(told), _span([_steps(run) for run in runs], "{:.0f}".format)]
        for step in probed:
            lrs = [
                stable_lr(p["curvature"], run.config.optim.momentum) if run.config.optim.name == "sgd" else 0.0
                for run in runs
                for p in run.probes
                if p["step"] == step
            ]
            row.append(_span(lrs, "{:.2g}".format) if lrs and 0 < min(lrs) <= max(lrs) < float("inf") else "")
        rows.append(row)
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def draw(arms: dict[Arm, list[Run]], errors: dict[Arm, list[float]], title: str) -> Figure:
    """Training loss over the steps, and the validation error of each run."""
    figure = Figure(figsize=(13, 2.2 + 0.33 * max(8, len(errors))), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    colours = {arm: colormaps["tab10"](i % 10) for i, arm in enumerate(errors)}
    styles = {arm: ("-", "--", ":")[i // 10 % 3] for i, arm in enumerate(errors)}
    for arm, runs in arms.items():
        for i, run in enumerate(runs):
            steps, losses = _smooth(run.steps)
            left.plot(steps, losses, styles[arm], color=colours[arm], lw=1.3, label=None if i else arm.name)
    for i, (arm, values) in enumerate(errors.items()):
        right.plot([100 * v for v in values], [i] * len(values), "o", color=colours[arm], alpha=0.75)
        if values:
            right.plot(100 * np.mean(values), i, "|", color="black", ms=16, mew=1.5)
    left.set(xlabel="step (128 images)", ylabel="training loss (nats, mean of 25 steps)", ylim=(0, 3.2))
    right.set(xlabel="top-1 validation error (%), bar: mean of the runs", ylim=(len(errors) - 0.4, -0.6))
    right.set_yticks(range(len(errors)), [arm.name for arm in errors])
    _plain(left, right)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    figure.suptitle(title)
    return figure


PANELS: tuple[tuple[str, str, bool], ...] = (
    ("signal", "deviation of outputs over images", True),
    ("output", "deviation of outputs over images and units", True),
    ("gradient", "root mean square of the gradient to the weights", True),
    ("dead", "share of dead units", False),
)


def draw_layers(runs: dict[Arm, Run]) -> Figure:
    """What the probes measured, layer by layer at each probed step, of one run an arm; and lr over its stable limit."""
    steps = sorted({p["step"] for run in runs.values() for p in run.probes})
    rows, height = len(PANELS) + 1, 0.9 + 0.24 * len(runs)
    figure = Figure(figsize=(6.2 * len(steps), rows * height), layout="constrained")
    axes = figure.subplots(rows, len(steps), squeeze=False)
    for j, step in enumerate(steps):
        tables = {arm: _layers(run, step) for arm, run in runs.items()}
        for i, (key, title, logarithmic) in enumerate(PANELS):
            _heat(axes[i, j], tables, key, logarithmic, labels=j == 0)
            axes[i, j].set_title(f"step {step}: {title}", fontsize="medium")
        ratio = axes[-1, j]
        for k, run in enumerate(runs.values()):
            found = next((p for p in run.probes if p["step"] == step), None)
            if found and run.config.optim.name == "sgd":
                value = found["lr"] / stable_lr(found["curvature"], run.config.optim.momentum)
                ratio.plot(value, k, "o", color="crimson" if value > 1 else "seagreen")
        ratio.set(xscale="log", ylim=(len(runs) - 0.5, -0.5), xlim=(1e-3, 1e2))
        ratio.axvline(1, color="grey", lw=1)
        ratio.set_yticks(range(len(runs)), [arm.name for arm in runs] if j == 0 else [])
        ratio.set_title(f"step {step}: lr / largest stable lr of the last layer (SGD)", fontsize="medium")
        _plain(ratio)
    return figure


def _heat(axes: Axes, tables: dict[Arm, Record], key: str, logarithmic: bool, *, labels: bool) -> None:
    layers = max(tables.values(), key=len)
    values = np.array([[row.get(name, {}).get(key, np.nan) for name in layers] for row in tables.values()], float)
    values[~np.isfinite(values)] = np.nan  # of a run that diverged
    shown = np.log10(np.maximum(values, 1e-12)) if logarithmic else values
    low, high = (np.nanmin(shown), np.nanmax(shown)) if logarithmic else (0, 1)
    axes.imshow(shown, aspect="auto", cmap="viridis", vmin=low, vmax=high)
    middle = (low + high) / 2
    for (i, j), value in np.ndenumerate(values):
        if not np.isnan(value):
            colour = "black" if shown[i, j] > middle else "white"
            axes.text(j, i, f"{value:.2g}", ha="center", va="center", fontsize=6, color=colour)
    axes.set_xticks(range(len(layers)), list(layers), fontsize="small")
    axes.set_yticks(range(len(tables)), [arm.name for arm in tables] if labels else [], fontsize="small")


def _layers(run: Run, step: int) -> Record:
    found = next((p for p in run.probes if p["step"] == step), None)
    return found["layers"] if found else {}


def _load(directory: Path) -> Run | None:
    records = read_records(directory)
    kinds: dict[str, list[Record]] = {
        kind: [r for r in records if r["kind"] == kind] for kind in ("step", "validation", "probe")
    }
    file, state = directory / "config.yaml", directory / STATUS
    if not file.exists() or not state.exists():
        return None
    diverged = json.loads(state.read_text())["state"] == "diverged"
    return Run(parse(["--config", str(file)])[0], diverged, kinds["step"], kinds["validation"], kinds["probe"])


def _smooth(steps: Sequence[Record], over: int = 25) -> tuple[list[int], list[float]]:
    """The loss as means of about `over` steps."""
    n = max(1, over // steps[0]["step"]) if steps else 1
    groups = [steps[i : i + n] for i in range(0, len(steps), n) if len(steps) - i > n // 2]  # no noisy tail
    return [g[-1]["step"] for g in groups], [float(np.mean([r["loss"] for r in g])) for g in groups]


def _when(runs: Sequence[Run], error: float) -> str:
    found = [step for run in runs if (step := run.first_below(error)) is not None]
    if len(found) == len(runs):
        return _span(found, "{:.0f}".format)
    last = min(_steps(run) for run in runs)
    never = f"never in {last}"
    return f"{_span(found, '{:.0f}'.format)}; {len(runs) - len(found)} of {len(runs)} {never}" if found else never


def _span(values: Sequence[float], show: Callable[[float], str]) -> str:
    if not values:
        return ""
    mean = show(float(np.mean(values)))
    return mean if len(values) == 1 else f"{mean} ({show(min(values))} to {show(max(values))})"


def _steps(run: Run) -> int:
    return int(run.steps[-1]["step"]) if run.steps else 0


def _plain(*many: Axes) -> None:
    for axes in many:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
