"""The pictures of an experiment: which arms stand out, that all is inside, and that words do not cover one another."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import numpy as np
import pytest
from matplotlib.colors import same_color
from matplotlib.figure import Figure
from matplotlib.text import Text

from dist_train.pictures.style import COLOURS, GREY, RED
from dist_train.pictures.sweeps import (
    MARKERS,
    PANELS,
    Curve,
    Probed,
    draw_arms,
    draw_layers,
    draw_ratios,
)

LAYERS = ["conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8"]
KEYS = [panel.key for panels in PANELS.values() for panel in panels]


def names(arms: int) -> list[str]:
    return [f"arm {i}{', with a name that is longer than its place' * (i % 3 == 1)}" for i in range(arms)]


def arms_figure(arms: int) -> Figure:
    steps = list(range(5, 305, 5))
    curves = {name: [Curve(steps, [2.5 - i / 10] * 60)] for i, name in enumerate(names(arms))}
    errors = {name: [0.3 + i / 30, 0.32 + i / 30] for i, name in enumerate(names(arms))}
    return draw_arms(curves, errors, "recipe", "128")


def probes(arms: int) -> list[Probed]:
    rng = np.random.default_rng(0)
    found = []
    for step in (0, 10, 100):
        values = {key: 10 ** rng.uniform(-6, 0, (arms, len(LAYERS))) for key in KEYS}
        values["dead"] = rng.random((arms, len(LAYERS)))
        found.append(Probed(step, LAYERS, values, 10 ** rng.uniform(-5, 3, arms)))
    return found


def figures(arms: int) -> list[Figure]:
    layers = [draw_layers(names(arms), probes(arms), picture, "recipe") for picture in PANELS]
    return [arms_figure(arms), *layers, draw_ratios(names(arms), probes(arms), "recipe")]


def drawn_texts(figure: Figure) -> Iterator[Text]:
    """All that can be seen: matplotlib also keeps labels of ticks beyond the limits."""
    yield from figure.texts
    yield from (text for legend in figure.legends for text in legend.get_texts())
    for axes in figure.axes:
        yield from [*axes.texts, axes.title, axes.xaxis.label, axes.yaxis.label]
        for axis, limits, at in ((axes.xaxis, axes.get_xlim(), 0), (axes.yaxis, axes.get_ylim(), 1)):
            labels = [*axis.get_ticklabels(), *axis.get_ticklabels(minor=True)]
            yield from (text for text in labels if min(limits) <= text.get_position()[at] <= max(limits))


@pytest.mark.parametrize("arms", [1, 15])
@pytest.mark.integration
def test_words_do_not_cover_one_another(arms: int) -> None:
    for figure in figures(arms):
        figure.draw_without_rendering()
        shown = [text for text in drawn_texts(figure) if text.get_visible() and text.get_text().strip()]
        boxes = [text.get_window_extent() for text in shown]
        edge = figure.bbox.padded(1)
        assert all(edge.contains(box.x0, box.y0) and edge.contains(box.x1, box.y1) for box in boxes)
        hit = [
            (a, b) for a, b in combinations(range(len(boxes)), 2) if boxes[a].padded(-1).overlaps(boxes[b].padded(-1))
        ]
        assert not [(shown[a].get_text(), shown[b].get_text()) for a, b in hit]


def test_the_first_arms_stand_out() -> None:
    """Each in a colour and with a marker of its own, wherever it is shown; the others are grey."""
    left, right = arms_figure(15).axes
    lines = list(left.lines)
    assert [line.get_color() for line in lines] == [*COLOURS, *[GREY] * 11]
    assert [line.get_marker() for line in lines[:4]] == list(MARKERS)
    assert len({*COLOURS}) == len(MARKERS) == 4
    behind = max(line.get_zorder() for line in lines[4:])
    assert all(line.get_zorder() > behind for line in lines[:4])
    for i, label in enumerate(right.get_yticklabels()):
        assert same_color(label.get_color(), COLOURS[i] if i < 4 else "black")
    legend = draw_layers(names(15), probes(15), "outputs", "recipe").legends[0]
    assert [text.get_text() for text in legend.get_texts()][-1] == "11 others"


def test_no_curve_or_point_is_cut_off() -> None:
    left, right = arms_figure(15).axes
    for axes in (left, right):
        low, high = axes.get_ylim()
        for line in axes.lines:
            xs, ys = np.array(line.get_xydata()).T
            assert axes.get_xlim()[0] <= xs.min() <= xs.max() <= axes.get_xlim()[1]
            assert min(low, high) <= ys.min() <= ys.max() < max(low, high)
    assert left.get_xlim()[0] == 0
    assert [text.get_text() for text in right.texts][:2] == ["31.0 %", "34.3 %"], "the mean of each arm"


def test_a_short_run_is_shown_by_its_records() -> None:
    """One of a few steps too; a long one by means."""
    short, long = ([*range(1, last + 1)] for last in (8, 100))
    figure = draw_arms({"a": [Curve(short, [2.0] * 8)], "b": [Curve(long, [2.0] * 100)]}, {"a": [], "b": []}, "x", "8")
    assert [line.get_xdata().tolist() for line in figure.axes[0].lines] == [short, [25, 50, 75, 100]]


def test_what_was_not_measured_is_a_gap() -> None:
    every = probes(2)
    every[0].values["gradient"][0, 2] = 0  # on a logarithmic axis
    every[0].values["dead"][1, 3] = np.nan
    figure = draw_layers(["a", "b"], every, "gradients", "recipe")
    gradient, dead = figure.axes[0], figure.axes[3]
    assert gradient.get_yscale() == "log"
    assert np.isnan(np.array(gradient.lines[0].get_ydata())).tolist() == [False, False, True, *[False] * 5]
    assert np.isnan(np.array(dead.lines[1].get_ydata())).tolist() == [*[False] * 3, True, *[False] * 4]
    assert dead.get_ylim()[0] < 0 < 1 < dead.get_ylim()[1]


def test_above_the_limit_is_a_cross() -> None:
    ratios = np.array([0.5, 2.0, 1e-9, 1e9, np.nan])
    probe = Probed(0, LAYERS, {}, ratios)
    (axes,) = draw_ratios(list("abcde"), [probe], "recipe").axes
    points = [line for line in axes.lines if len(line.get_xdata()) == 1]
    assert [point.get_marker() for point in points] == ["o", "X", "<", ">"]
    assert [point.get_color() == RED for point in points] == [False, True, False, True]
    low, high = axes.get_xlim()
    assert [float(point.get_xdata()[0]) for point in points] == [0.5, 2.0, low, high]
