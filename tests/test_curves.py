"""curves.png: what it shows of runs of all lengths, and that all of it can be read."""

from __future__ import annotations

import math
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation

from dist_train.outcomes import Done
from dist_train.pictures.curves import FEW, MOST, VALIDATION, Rate, curves_figure, rates
from dist_train.pictures.text import spread
from dist_train.rundir import confusion, record
from dist_train.rundir.state import Progress
from dist_train.summary import summary

Records = list[dict[str, Any]]
# Steps of the run, steps per epoch, and epochs after which lr was divided.
RUNS = {
    "a step": (1, 468, ()),
    "part of an epoch": (60, 468, ()),
    "an epoch": (468, 468, ()),
    "three epochs": (3 * 468, 468, (2,)),
    "stopped in an epoch": (1100, 468, (2,)),
    "many epochs": (120 * 400, 400, (40, 80, 110)),
    "divisions in a row": (30 * 100, 100, (10, 11, 12, 28)),
}


def records(steps: int, per_epoch: int, divided: tuple[int, ...] = (), every: int = 20) -> Records:
    """A record as a run writes it: losses and errors fall, the lowest validation error is not the last."""
    found: Records = []
    for step in range(1, steps + 1):
        epoch, progress = (step - 1) // per_epoch, step / per_epoch
        at = {"step": step, "epoch": epoch, "lr": 0.01 / 10 ** sum(epoch >= d for d in divided)}
        level = 0.1 + 0.9 / (1 + 2 * progress)
        if step % every == 0 or step == steps:
            found.append({"kind": "step", **at, "progress": progress, "loss": 2.3 * level, "train_error": 0.9 * level})
        if step % per_epoch == 0:
            error = 0.8 * level + 0.1 * (step == steps)
            found.append({"kind": "validation", **at, "top1_error": error, "top5_error": error / 9, "loss": 2 * level})
    return found


def drawn(lines: Records, chance: float | None = 0.9, name: str = "demo") -> Figure:
    figure = curves_figure(lines, name, chance)
    assert figure is not None
    return figure


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


@pytest.mark.parametrize("run", RUNS)
def test_data_and_labels_have_room(run: str) -> None:
    """Every point lies inside the axes, the highest below the top; no label is cut off or stands on another."""
    steps, per_epoch, divided = RUNS[run]
    figure = drawn(records(steps, per_epoch, divided), name="a run with a name that is much too long for it " * 4)
    for axes in figure.axes:
        lines = [np.array(line.get_xydata()) for line in axes.lines if line.get_transform() == axes.transData]
        points = np.concatenate(lines)
        assert points[:, 0].min() >= 0 == axes.get_xlim()[0]
        assert points[:, 0].max() == pytest.approx(axes.get_xlim()[1])
        low, high = axes.get_ylim()
        assert low <= points[:, 1].min()
        assert points[:, 1].max() < low + 0.95 * (high - low)
        assert np.ptp(points[:, 1]) > 0.4 * (high - low) or steps == 1, "the rest would be empty"
    figure.draw_without_rendering()
    every = [text for axes in figure.axes for text in [*axes.texts, axes.xaxis.label, axes.yaxis.label]]
    boxes = [text.get_window_extent() for text in (*figure.texts, *every) if text.get_text()]
    width, height = figure.get_size_inches() * figure.dpi
    assert all(box.x0 >= 0 and box.x1 <= width and box.y0 >= 0 and box.y1 <= height for box in boxes)
    assert not [pair for pair in combinations(boxes, 2) if pair[0].padded(-1).overlaps(pair[1].padded(-1))]


def test_less_than_an_epoch_is_shown_in_steps() -> None:
    above, below = drawn(records(*RUNS["part of an epoch"])).axes
    assert below.get_xlabel() == "step (468 make an epoch)"
    assert above.get_xlim() == below.get_xlim() == (0, 60)


def test_whole_epochs_on_one_axis() -> None:
    for steps in (468, 1100, 1404):
        above, below = drawn(records(steps, 468)).axes
        assert below.get_xlabel() == "epoch (468 steps each)"
        assert above.get_xlim() == below.get_xlim() == (0, steps / 468)
        ticks = [tick for tick in below.get_xticks() if tick <= steps / 468]
        assert ticks == list(range(steps // 468 + 1))


def test_what_the_labels_say() -> None:
    """Lines carry their names and last values; the best error is named and marked; no legend."""
    lines = records(3 * 468, 468, (2,))
    checks = [r for r in lines if r["kind"] == "validation"]
    figure = drawn(lines)
    found = texts(figure)
    best, last = (100 * checks[i]["top1_error"] for i in (1, 2))
    assert f"validation, top-1\n{last:.2f} %\nbest {best:.2f} %, epoch 2" in found
    assert "always naming the\ncommonest class\n90.00 %" in found
    assert f"training\n{lines[-2]['loss']:.2f}" in found
    assert figure.texts[0].get_text() == f"demo: {last:.2f} % validation error after epoch 3"
    (ring,) = [line for line in figure.axes[1].lines if line.get_label() == "best"]
    np.testing.assert_allclose(ring.get_xydata(), [[2, best]])
    assert not [axes for axes in figure.axes if axes.get_legend()]
    falling = drawn(records(700, 468))
    assert any(text.endswith(" %, the best") for text in texts(falling))


def test_rates_stand_at_their_lines() -> None:
    figure = drawn(records(*RUNS["three epochs"]))
    shown = {text.get_text(): text.xy[0] for text in figure.axes[0].texts if isinstance(text, Annotation)}
    assert shown == {"lr 0.01": 0, "lr 0.001": 2}
    for axes in figure.axes:
        assert [line.get_xdata()[0] for line in dotted(axes)] == [2]


def dotted(axes: Axes) -> list[Any]:
    return [line for line in axes.lines if line.get_linestyle() == ":"]


def test_a_rise_is_no_division() -> None:
    """Warm-up changes lr at every step. A start may change it within an epoch."""

    def step(number: int, lr: float) -> dict[str, Any]:
        return {"step": number, "progress": number / 10, "epoch": (number - 1) // 10, "lr": lr}

    warm = [step(n, min(1.0, n / 5)) for n in range(1, 25)]
    assert rates(warm) == [Rate(0.5, 1.0)]
    assert rates([step(8, 0.1), step(12, 0.01), step(15, 0.01), step(18, 0.02)]) == [
        Rate(0.0, 0.1),
        Rate(1.0, 0.01),
        Rate(1.5, 0.02),
    ]
    assert rates([{"step": 1, "progress": 0.5, "epoch": 0}]) == [], "an earlier program's"


def test_markers_and_points() -> None:
    """Few points are marked, many are not, and a long run is shown by means."""
    few, many, long = (drawn(records(steps, 100)).axes[0].lines[0] for steps in (20 * (FEW - 1), 20 * FEW, 90_000))
    assert (few.get_marker(), many.get_marker()) == ("o", "None")
    ys = long.get_ydata()
    assert MOST / 2 < len(ys) <= MOST
    losses = [r["loss"] for r in records(90_000, 100) if r["kind"] == "step"]
    assert float(np.mean(ys)) == pytest.approx(np.mean(losses), rel=1e-3)


def test_losses_that_cannot_be_shown() -> None:
    lines = records(1404, 468)
    for line in lines[-5:-1]:
        line["loss"] = math.nan
    lines[5]["loss"] = math.inf
    figure = drawn(lines)
    assert any("5 of 71 recorded losses are not finite" in text for text in texts(figure)), texts(figure)
    assert np.isfinite(figure.axes[0].get_ylim()).all()
    lines = records(1404, 468)
    lines[0]["loss"] = 1e5  # of a run that nearly diverged
    assert drawn(lines).axes[0].get_yscale() == "log"
    for line in lines:
        line["loss"] = math.nan
    assert np.isfinite(drawn(lines).axes[0].get_ylim()).all()


def test_a_run_that_diverged_at_once() -> None:
    """Two losses, of which the last has twenty digits."""
    lines = [line for line in records(40, 468) if line["kind"] == "step"][:2]
    lines[0]["loss"], lines[1]["loss"] = 2.3, 2.45e19
    figure = drawn(lines)
    assert figure.axes[0].get_yscale() == "log"
    assert not any(re.search(r"\d{6}", text) for text in texts(figure)), texts(figure)
    assert any("2.4e+19" in text for text in texts(figure)), texts(figure)


def test_chance_far_above_all_errors_is_words_only() -> None:
    lines = records(1404, 468)
    for line in lines:
        for key in {"train_error", "top1_error", "top5_error"} & set(line):
            line[key] /= 20
    figure = drawn(lines)
    assert figure.axes[1].get_ylim()[1] < 10
    assert "↑ always naming the\ncommonest class\n90.00 %" in texts(figure)
    assert not [text for text in texts(drawn(lines, chance=None)) if "commonest" in text]


def test_a_record_of_few_words() -> None:
    """What an earlier program, or a short run, has not recorded."""
    step: dict[str, Any] = {"kind": "step", "step": 1, "progress": 0.5, "loss": 1.5}
    check = {"kind": "validation", "epoch": 0, "top1_error": 0.0, "top5_error": 0.0}
    figure = drawn([step, check])
    assert "validation, top-1\n0.00 %, the best" in texts(figure)
    assert not any("top-5" in text for text in texts(figure)), "never wrong among five or fewer classes"
    assert VALIDATION in [line.get_color() for line in figure.axes[1].lines]
    assert curves_figure([check], "demo") is None


def test_labels_are_moved_apart() -> None:
    assert spread([10.0, 50.0], [8.0, 8.0], 100) == [10.0, 50.0]
    assert spread([10.0, 12.0, 11.0], [10.0, 10.0, 10.0], 100) == [10.0, 30.0, 20.0]
    assert spread([99.0, 99.0], [10.0, 10.0], 100) == [95.0, 85.0], "the first on top"
    assert spread([1.0], [10.0], 100) == [5.0]


def test_the_error_of_the_commonest_class_is_that_of_the_validation_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `confusion.npz` has counted it; before the first validation there is no such line."""
    given: list[float | None] = []
    monkeypatch.setattr("dist_train.summary.draw_curves", lambda run, lines, chance: given.append(chance))
    (tmp_path / record.FILE).write_text("")
    summary(tmp_path, Done(), Progress(), {})
    counts = {"samples": [10, 60, 30], "top1": [0, 0, 0], "top5": [0, 0, 0], "label": [], "predicted": [], "count": []}
    names = np.frombuffer(b'["a", "b", "c"]', np.uint8)
    np.savez(tmp_path / confusion.FILE, names=names, **{k: np.array(v, np.int32) for k, v in counts.items()})
    summary(tmp_path, Done(), Progress(), {})
    assert given == [None, pytest.approx(0.4)]
