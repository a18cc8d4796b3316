"""Figures 3 and 4 of the paper, against an independent forward pass and brute force."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from io import BytesIO
from itertools import combinations, groupby, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.functional import center_crop

from dist_train import models
from dist_train.__main__ import main
from dist_train.analysis import neighbours
from dist_train.analysis.colour import colour_shares
from dist_train.analysis.figures import (
    inputs_figure,
    kernel_blocks,
    kernels_drawn,
    nearest_figure,
    top5_figure,
    write_figures,
)
from dist_train.analysis.neighbours import (
    FigureError,
    forward,
    misclassified,
    most_probable,
    nearest_images,
    occurrence,
    pick_examples,
    searched,
    varied_tests,
)
from dist_train.analysis.trained import Trained, open_run
from dist_train.config import ModelConfig
from dist_train.models.two_tower import TwoTowers, grouped_state
from dist_train.pictures.cells import Named
from dist_train.pictures.kernels import kernel_levels
from dist_train.pictures.nearest import draw_nearest
from dist_train.pictures.style import CROSS, ORANGE, RED
from dist_train.pictures.top5 import draw_top5
from pipelines.preview import CELL, DPI
from pipelines.shards import ShardSet
from tests.helpers.launch import launch

pytestmark = pytest.mark.integration  # seconds each


CROP = 67
Array = NDArray[Any]


@pytest.fixture(scope="module")
def run_directory(shard_sets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "a run"
    result = launch(shard_sets, directory, "--train.epochs=1", ranks=0)
    assert result.returncode == 0, result.stderr
    return directory


@pytest.fixture(scope="module")
def run(run_directory: Path) -> Trained:
    """With weights under which images differ much more than decoders do."""
    trained = open_run(run_directory, torch.device("cpu"))
    return with_net(trained, ModelConfig(hidden=32, dropout=0))


def with_net(run: Trained, options: ModelConfig) -> Trained:
    torch.manual_seed(0)
    net = models.build(options, classes=len(run.classes), crop=CROP).eval()
    for weight in net.parameters():
        if weight.ndim > 1:
            nn.init.kaiming_normal_(weight)
    return replace(run, model=net, config=replace(run.config, model=options))


def reference(run: Trained, shards: ShardSet, samples: Any) -> tuple[Array, Array]:
    """Logits and what enters fc8, of the central crops, in float64 with torchvision's crop and torch.nn modules."""
    weights: dict[str, Any] = {name: value.double() for name, value in run.model.state_dict().items()}
    images = []
    for sample in samples:
        image = Image.open(BytesIO(shards.read(int(sample)).tobytes())).convert("RGB")
        pixels = np.asarray(center_crop(image, [CROP]), np.float64) - 255 * np.array(run.train.manifest.mean)
        images.append(pixels.transpose(2, 0, 1))
    x = torch.from_numpy(np.stack(images))

    def conv(x: Tensor, layer: str, **options: int) -> Tensor:
        return F.conv2d(x, weights[f"{layer}.weight"], weights[f"{layer}.bias"], **options).relu()

    def norm(x: Tensor) -> Tensor:
        layer = nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2)
        return torch.cat([layer(tower) for tower in x.chunk(2, 1)], 1)

    def dense(x: Tensor, layer: str) -> Tensor:
        return F.linear(x, weights[f"{layer}.weight"], weights[f"{layer}.bias"])

    x = F.max_pool2d(norm(conv(x, "conv1", stride=4)), 3, 2)
    x = F.max_pool2d(norm(conv(x, "conv2", padding=2, groups=2)), 3, 2)
    x = conv(conv(x, "conv3", padding=1), "conv4", padding=1, groups=2)
    x = F.max_pool2d(conv(x, "conv5", padding=1, groups=2), 3, 2)
    x = dense(dense(x.flatten(1), "fc6").relu(), "fc7").relu()
    return dense(x, "fc8").numpy(), x.numpy()


def pixels_of(figure: Any, path: Path) -> Array:
    figure.savefig(path, dpi=figure.dpi)
    return np.asarray(Image.open(path).convert("RGB"))


def test_kernels_have_one_scale() -> None:
    weights = np.zeros((3, 3, 2, 2), np.float32)
    weights[0, 0] = [[-2.0, 0.0], [1.0, 2.0]]  # red; levels by hand: 255 (0.5 + w / 8)
    weights[1, 2] = [[4.0, -0.4], [0.0, 0.0]]
    levels = kernel_levels(weights, 4.0)
    assert levels.dtype == np.uint8
    assert levels.shape == (3, 2, 2, 3)
    np.testing.assert_array_equal(levels[0, :, :, 0], [[64, 128], [159, 191]])
    assert (levels[0, :, :, 1:] == 128).all()
    np.testing.assert_array_equal(levels[1, :, :, 2], [[255, 115], [128, 128]])
    assert (levels[2] == 128).all(), "a dead kernel is grey"
    assert (kernel_levels(0 * weights, 0.0) == 128).all()


# Directions of colour, with the share of their energy across the grey axis: 1 - (r + g + b)^2 / (3 (r^2 + g^2 + b^2)).
TINTS = {(1, -1, 0): 1.0, (1, 1, -2): 1.0, (1, 0, 0): 2 / 3, (1, 1, -1): 8 / 9, (2, 1, 0): 0.4, (1, 1, 0): 1 / 3}


def gabors_and_blobs() -> Array:
    """96 kernels: 48 grey Gabor patches, and Gaussian blobs of six tints, eight of each."""
    y, x = np.mgrid[-5:6, -5:6]
    blob = np.exp(-(x**2 + y**2) / 8)
    angles = np.arange(48) * np.pi / 48
    gabors = [0.5 * blob * np.cos(x * np.cos(a) + y * np.sin(a)) * np.ones((3, 1, 1)) for a in angles]
    tinted = [np.multiply.outer(tint, 0.5 * blob) for tint in TINTS] * 8
    return np.stack(gabors + tinted).astype(np.float32)


def test_colour_shares() -> None:
    kernels = gabors_and_blobs()
    np.testing.assert_allclose(colour_shares(kernels[:48]), 0, atol=1e-12)
    np.testing.assert_allclose(colour_shares(kernels[48:]), [*TINTS.values()] * 8, rtol=1e-6)
    half = np.zeros((3, 3, 1, 2), np.float32)  # energy 3 of grey beside 2 of red against green
    half[0, :, 0, 0], half[0, :, 0, 1] = (1, 1, 1), (1, -1, 0)
    half[1] = 1e-20 * half[0]
    np.testing.assert_allclose(colour_shares(half), [0.4, 0.4, 0], rtol=1e-6, err_msg="the last one is of zeros")
    noise = np.random.default_rng(0).normal(0, 0.01, (2000, 3, 11, 11)).astype(np.float32)
    assert colour_shares(noise).mean() == pytest.approx(2 / 3, abs=0.003)  # its standard error: 0.0008


@pytest.mark.parametrize("name", ["alexnet", "alexnet_two_tower", "alexnet_one_tower"])
def test_colour_is_told_by_tower(run: Trained, tmp_path: Path, name: str) -> None:
    drawn = with_net(run, ModelConfig(name, hidden=32))
    plant(drawn, torch.from_numpy(gabors_and_blobs()))
    (colour, *more), paths = by_label(write_figures({"kernels": lambda: kernels_drawn(drawn)}, tmp_path))
    record = json.loads((tmp_path / "kernels.json").read_text())
    assert paths == [("kernels", str(tmp_path / "kernels.png"))]
    assert (record["run"], record["step"]) == ("a run", run.step)
    assert record["white_noise"] == pytest.approx(0.6667, abs=1e-4)
    mean = sum(TINTS.values()) / 6  # 0.7148; the median is between 2/3 and 8/9
    grey, tinted = [0, 0, 0, 0], [mean, 1 / 3, 7 / 9, 1]
    all_of_them = [mean / 2, 0, 1 / 6, 1]
    expected = [all_of_them] if name == "alexnet_one_tower" else [grey, tinted]
    found = [[tower[key] for key in ("mean", "least", "median", "most")] for tower in record["colour_share"]]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    if name == "alexnet_one_tower":
        told = ["all kernels: 35.7% on average; kernels from 0.0% to 100.0%, median 16.7%"]
    else:
        told = [
            "tower 1: 0.0% on average; kernels from 0.0% to 0.0%, median 0.0%",
            "tower 2: 71.5% on average; kernels from 33.3% to 100.0%, median 77.8%",
        ]
    told.append("to compare: white noise, as before training, 66.7%; a grey kernel, 0%")
    assert [colour, *more] == told
    figure = kernels_drawn(drawn).figure
    below = figure.texts[1].get_text().split("\n")
    assert below[0] == "One scale for all kernels: zero is mid-grey, the largest absolute weight, 1, black or white"
    assert below[1:] == [f"Colour share, {line}" for line in told]
    assert not overlapping(figure)
    picture = pixels_of(figure, tmp_path / "again.png")
    coloured = np.ptp(picture.astype(int), axis=2) > 0
    top = int(np.flatnonzero(coloured.any(1))[0])
    rows = [picture[a:b] for a, b in runs((picture[:top] != 255).any((1, 2))) if b - a == 66]
    assert len(rows) == 3, "grey ones, all above the tinted"
    assert [row[row < 255].max() for row in rows] == [191] * 3, "half of the largest weight: 255 (0.5 + 0.5 / 2)"
    assert [end - start for start, end in runs(coloured.any(1))] == [66] * 3


def by_label(rows: list[tuple[str, str]]) -> tuple[list[str], list[tuple[str, str]]]:
    """What is said of colour, and all else."""
    return [text for label, text in rows if label == "colour share"], [row for row in rows if row[0] != "colour share"]


def plant(run: Trained, kernels: Tensor) -> None:
    """Give the convolutions that see the image these kernels, in the order of the layers."""
    layers = [layer for layer in run.model.modules() if isinstance(layer, nn.Conv2d) and layer.in_channels == 3]
    with torch.no_grad():
        for layer, part in zip(layers, kernels.chunk(len(layers)), strict=True):
            layer.weight.copy_(part)


def test_towers_on_two_ranks(shard_sets: Path, tmp_path: Path) -> None:
    """The upper half is the first rank's tower: the whole net of the checkpoint has it as towers.0."""
    options = ("--model.name=alexnet_two_tower", "--train.tower_parallel=true", "--train.max_steps=1")
    result = launch(shard_sets, tmp_path / "run", *options, ranks=2)
    assert result.returncode == 0, result.stderr
    (saved,) = (tmp_path / "run" / "checkpoints").glob("step-*/state.pt")
    weights = torch.load(saved, weights_only=True)["model"]
    blocks = kernel_blocks(open_run(tmp_path / "run", torch.device("cpu")))
    for tower, block in enumerate(blocks):
        np.testing.assert_array_equal(block, weights[f"towers.{tower}.conv1.weight"].numpy())
    assert (blocks[0] != blocks[1]).any()


@pytest.mark.parametrize("name", ["alexnet", "alexnet_two_tower", "alexnet_one_tower"])
def test_kernels_are_shown_by_tower(run: Trained, tmp_path: Path, name: str) -> None:
    """In the picture itself: 48 red kernels of tower 1 above the 48 blue ones of tower 2, three rows of 16 each."""
    drawn = with_net(run, ModelConfig(name, hidden=32))
    weights = torch.full((96, 3, 11, 11), -1.0)
    weights[:48, 0], weights[48:, 2] = 1, 1
    weights[0] = 0
    weights[0, :, 0, 1] = 1  # top row, second column
    plant(drawn, weights)
    figure = kernels_drawn(drawn).figure
    picture = pixels_of(figure, tmp_path / "kernels.png")
    red, blue = ((picture == colour).all(2) for colour in ((255, 0, 0), (0, 0, 255)))
    assert (red.sum(), blue.sum()) == (47 * 66 * 66, 48 * 66 * 66), "enlarged six times without interpolation"
    for colour in (red, blue):
        rows, columns = (runs(colour.any(axis)) for axis in (1, 0))
        assert [len(rows), len(columns)] == [3, 16]
    assert np.flatnonzero(red.any(1)).max() < np.flatnonzero(blue.any(1)).min()
    apart = runs(blue.any(1))[0][0] - runs(red.any(1))[-1][1]
    assert apart == 4 if name == "alexnet_one_tower" else apart > 20
    texts = [text.get_text() for text in figure.texts]
    assert ("tower 2" in texts) == (name != "alexnet_one_tower")
    assert f"96 kernels of size 11x11x3 of the first convolution: a run, step {run.step}" in texts
    (top, _), (left, _) = runs(red.any(1))[0], runs(blue.any(0))[0]
    first = picture[top : top + 66, left : left + 66].astype(int)
    np.testing.assert_array_equal(first.mean(2) > 200, np.kron(np.eye(11)[:1].T * np.eye(11)[1], np.ones((6, 6))))


def runs(mask: Array) -> list[tuple[int, int]]:
    """Where stretches of True begin and end."""
    stretches, at = [], 0
    for value, group in groupby(mask.tolist()):
        length = len(list(group))
        if value:
            stretches.append((at, at + length))
        at += length
    return stretches


def test_kernels_of_other_models(run: Trained, tmp_path: Path) -> None:
    resnet = with_net(run, ModelConfig("torchvision:resnet18"))
    (block,) = kernel_blocks(resnet)
    assert block.shape == (64, 3, 7, 7)
    grey = replace(run, model=nn.Sequential(nn.Conv2d(1, 8, 3)))
    with pytest.raises(FigureError, match="sees the three colours of an image: its first one has 1 input channels"):
        kernels_drawn(grey)


def test_features_are_what_the_last_layer_sees(run: Trained) -> None:
    """Of the two explicit towers those of the grouped net, and they lead to the logits."""
    options = ModelConfig("alexnet_two_tower", hidden=32)
    two = with_net(run, options).model
    assert isinstance(two, TwoTowers)
    one = models.build(replace(options, name="alexnet"), classes=3, crop=CROP).eval()
    one.load_state_dict(grouped_state(two.state_dict()))
    x = 60 * torch.randn(5, 3, CROP, CROP)
    logits, features = forward(two, x)
    assert features is not None
    assert features.shape == (5, 32)
    torch.testing.assert_close(features, forward(one, x)[1], rtol=1e-4, atol=1e-3)
    head = one.get_submodule("fc8")
    assert isinstance(head, nn.Linear)
    torch.testing.assert_close(F.linear(features, head.weight, head.bias), logits, rtol=1e-4, atol=1e-3)
    assert not any(module._forward_pre_hooks for module in two.modules()), "the model is left as it was"


def test_different_classes_and_errors_come_first() -> None:
    np.testing.assert_array_equal(occurrence(np.array([7, 7, 3, 7, 3])), [0, 1, 0, 2, 1])
    labels = np.array([0, 0, 1, 2, 0, 1, 2, 3])
    right = np.array([1, 1, 1, 0, 0, 0, 0, 1], bool)
    picked = pick_examples(labels, right, 4)
    np.testing.assert_array_equal(picked, [2, 7, 3, 4])  # classes 2 and 0 wrong, so 1 and 3 right
    np.testing.assert_array_equal(pick_examples(labels, np.ones(8, bool), 4), [0, 2, 3, 7])
    np.testing.assert_array_equal(pick_examples(labels, np.zeros(8, bool), 4), [0, 2, 3, 7])
    assert sorted(pick_examples(labels, right, 20)) == list(range(8))


def test_the_most_probable_classes(run: Trained) -> None:
    """Order, probabilities and labels as drawn are those of an independent forward pass and softmax."""
    drawn = with_net(run, ModelConfig(hidden=32, outputs=7, dropout=0))  # 3 classes: outputs 3 to 6 mean none
    with torch.no_grad():
        drawn.model.get_submodule("fc8").weight.mul_(0.02)  # type: ignore[operator]
    predictions = most_probable(drawn, 6)
    assert len(set(predictions.samples)) == 6
    logits, _ = reference(drawn, run.val, predictions.samples)
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert expected.max() < 0.99, "not certain of anything"
    np.testing.assert_allclose(predictions.probabilities, expected, atol=0.01)
    everything = reference(drawn, run.val, range(len(run.val)))[0].argmax(1)
    error = (everything != run.val.index["label"]).mean()
    assert predictions.looked == len(run.val)
    assert predictions.error == pytest.approx(error, abs=0.02)
    assert (~predictions.right).sum() >= 3

    figure = top5_figure(drawn, predictions)
    texts = []
    for i, (above, below) in enumerate(zip(figure.axes[::2], figure.axes[1::2], strict=True)):
        label = int(run.val.index["label"][predictions.samples[i]])
        assert above.get_xlabel() == run.classes[label]
        image = np.asarray(Image.open(BytesIO(run.val.read(int(predictions.samples[i])).tobytes())))
        np.testing.assert_array_equal(above.get_images()[0].get_array(), image)
        bars = bars_of(below)
        np.testing.assert_allclose([bar.get_width() for bar in bars], np.sort(expected[i])[::-1][:5], atol=0.01)
        order = np.argsort(-predictions.probabilities[i])[:5]
        every = run.classes + [f"class #{o}" for o in range(3, 7)]
        names = [text.get_text() for text in below.texts][::2]
        assert names == [every[o] for o in order]
        orange = [bool(np.allclose(bar.get_facecolor()[:3], to_rgb(ORANGE))) for bar in bars]
        bold = [text.get_fontweight() == "bold" for text in below.texts[::2]]
        assert orange == bold == [bool(o == label) for o in order]
        assert below.get_title() == ("✓ right" if order[0] == label else f"✗ taken for {every[order[0]]}")
        assert below.get_xlim() == (0, 1)
        texts += names
    assert "class #5" in texts
    assert f"Picked so that {(~predictions.right).sum()} of 6 are misclassified" in title_of(figure)


def bars_of(axes: Axes) -> list[Any]:
    """Without the grey ones that reach to 100 %."""
    tracks, bars = axes.containers
    assert tracks.get_label() == "track"
    return list(bars)


def title_of(figure: Figure) -> str:
    return " ".join(" ".join(text.get_text() for text in figure.texts).split())


def overlapping(figure: Figure) -> list[Any]:
    """Texts that stand on one another, on an image or on a bar, or are cut off by the edge of the figure."""
    figure.draw_without_rendering()
    texts = [text.get_window_extent() for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
    drawn = [image.get_window_extent() for axes in figure.axes for image in axes.get_images()]
    drawn += [bar.get_window_extent() for axes in figure.axes for bar in axes.patches]
    edge = figure.bbox
    cut = [box for box in texts if not (edge.contains(box.x0, box.y0) and edge.contains(box.x1, box.y1))]
    pairs = [*combinations(texts, 2), *product(texts, drawn)]
    return cut + [(a, b) for a, b in pairs if a.padded(-0.5).overlaps(b.padded(-0.5))]


@pytest.mark.parametrize("count", [1, 3, 12])
def test_every_word_can_be_read(count: int) -> None:
    """Of many images and few, of any shape, with names of any length."""
    rng = np.random.default_rng(0)
    names = ["bag", "a class with a name that is much too long for its place, as many in ImageNet are", *"cdefg"]
    shapes = [(28, 28, 3), (20, 90, 3), (90, 20, 3)]
    images = [Named(np.zeros(shapes[i % 3], np.uint8), names[i % 2]) for i in range(count)]
    chances = rng.dirichlet(np.ones(7), count).astype(np.float32)
    title = "a title that has to be wrapped, " * 5 + "\nand a second line, which also is too long for one, " * 2
    assert not overlapping(draw_top5(images, [i % 2 for i in range(count)], chances, names, title))
    found = [images[:1] * 4] * count
    near, same = np.full((count, 4), 123.4, np.float32), rng.random((count, 4)) < 0.5
    assert not overlapping(draw_nearest(images, found, near, same, title))


def test_right_and_wrong_ones_are_shown_whenever_there_are_both(
    run: Trained, run_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looks on until it has found both; without a number it shows twelve images."""
    good = run.val.labels(np.arange(len(run.val)))
    order = np.array(neighbours._permuted(run, run.val))

    def net(wrong: set[int]) -> Any:
        def outputs(run: Trained, shards: ShardSet, samples: Array, *_: Any) -> list[Any]:
            labels = [(good[s] + (int(s) in wrong)) % 3 for s in samples]
            return [(samples, 9.0 * F.one_hot(torch.tensor(labels), 3), None)]

        return outputs

    monkeypatch.setattr(neighbours, "LOOKED", 20)
    for wrong, looked in (({int(order[3])}, 20), ({int(order[50])}, 60), (set(), 63), (set(order.tolist()), 63)):
        monkeypatch.setattr(neighbours, "outputs", net(wrong))
        found = most_probable(run, 12)
        assert (len(found.samples), found.looked) == (12, looked)
        assert (~found.right).sum() == min(12, len(wrong))
    monkeypatch.setattr(neighbours, "outputs", net(set(order[::2].tolist())))
    monkeypatch.setattr("dist_train.analysis.figures.open_run", lambda *_, **__: run)
    shown: list[int] = []
    monkeypatch.setattr(
        "dist_train.analysis.figures.top5_figure",
        lambda run, found: (shown.append(int(found.right.sum())), top5_figure(run, found))[1],
    )
    assert main(["figures", str(run_directory), "--only", "top5", "--out", str(run_directory / "twelve")]) == 0
    assert shown == [6], "half of twelve"


def test_images_that_the_net_gets_wrong(run: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    found = misclassified(run, 4)
    logits, _ = reference(run, run.val, found.samples)
    labels = run.val.index["label"][found.samples]
    assert len(set(found.samples)) == 4
    assert (logits.argmax(1) != labels).all()
    every = misclassified(run, 63)
    assert len(every.samples) == round(63 * found.error) < 63, "as many as there are"
    assert len(set(labels)) == min(4, len(set(every.labels)))
    title = title_of(top5_figure(run, found))
    assert title.startswith("4 misclassified validation images, with the 3 most probable classes: ")
    assert "Picked" not in title
    assert "Error of the 63 images looked at: " in title

    def right(run: Trained, shards: ShardSet, samples: Array, *_: Any) -> list[Any]:
        return [(samples, 9.0 * F.one_hot(torch.from_numpy(shards.labels(samples))), None)]

    monkeypatch.setattr("dist_train.analysis.neighbours.outputs", right)
    with pytest.raises(FigureError, match="right about all of the 63 validation images"):
        misclassified(run, 4)


def test_what_the_net_is_shown(run: Trained, tmp_path: Path) -> None:
    """With the run's own augmentation; however inputs are scaled, the picture shows the levels."""
    pictures = []
    for inputs in ("mean_subtracted", "standardized"):
        data = replace(run.config.data, inputs=inputs, mirror=False, lighting=0.0)
        figure = inputs_figure(replace(run.config, data=data))
        pictures.append(pixels_of(figure, tmp_path / "inputs.png"))
        assert figure.texts[1].get_text() == "Random 67x67 crop of images resized to shorter side 72"
        assert [cell.get_title() for cell in figure.axes[:6]] == ["original", *(f"epoch {i}" for i in range(1, 6))]
        assert {cell.get_xlabel() for cell in figure.axes} == {""}, "there is no lighting to tell of"
        cells = [cell.get_window_extent().bounds for cell in figure.axes]
        np.testing.assert_allclose([cell[2:] for cell in cells], CELL * DPI, err_msg="squares of one size")
        assert not overlapping(figure)
    np.testing.assert_array_equal(*pictures)
    square = replace(run.config.data, center_square=True)
    figure = inputs_figure(replace(run.config, data=square))
    told = figure.texts[1].get_text().partition("\n")[0]
    assert told.endswith("crop of the central square of images resized to shorter side 72, mirror, lighting")
    assert not overlapping(figure)


def test_some_figures_only(run_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["figures", str(run_directory), "--out", str(tmp_path), "--device=cpu", "--images=3", "--only"]
    assert main([*argv, "wrong", "inputs"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inputs.png", "wrong.png"]
    assert main([*argv, "kernels"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "inputs.png",
        "kernels.json",
        "kernels.png",
        "wrong.png",
    ]
    capsys.readouterr()
    assert main([*argv, "kernel"]) == 2
    assert "'kernel' is no figure: choose from kernels, " in capsys.readouterr().err


def test_neighbours_are_those_of_brute_force(run: Trained) -> None:
    tests, candidates = varied_tests(run, 5), searched(run, 150)
    assert len(set(candidates)) == 150
    candidates = candidates[run.train.index["label"][candidates] != 1]  # so that some neighbours are of another class
    assert len(set(run.val.index["label"][tests])) == 3
    found = nearest_images(run, tests, candidates, 4)
    np.testing.assert_array_equal(found.tests, tests)
    a, b = reference(run, run.val, tests)[1], reference(run, run.train, candidates)[1]
    distances = np.sqrt(((a[:, None] - b[None]) ** 2).sum(2))
    spread = np.median(distances)
    np.testing.assert_allclose(found.distances, np.sort(distances)[:, :4], atol=1e-3 * spread)
    by_number = dict(zip(candidates.tolist(), distances.T, strict=True))
    for i, row in enumerate(found.found):
        assert len(set(row)) == 4
        np.testing.assert_allclose([by_number[s][i] for s in row], found.distances[i], atol=1e-3 * spread)
    assert (found.distances.max(1) + 0.05 * spread < np.median(distances, axis=1)).all(), "anything would pass"
    same = run.train.index["label"][found.found] == run.val.index["label"][tests][:, None]
    assert 0 < same.sum() < 20
    assert found.summary() == f"{same.sum()} of 20 neighbours ({same.mean():.1%})"

    figure = nearest_figure(run, found)
    assert f"the nearest of {len(candidates)} training images" in title_of(figure)
    cells = np.array(figure.axes).reshape(5, 5)
    assert 10 <= found.distances.max() < 100, "one decimal"
    for i in range(5):
        label = run.val.index["label"][tests[i]]
        assert cells[i, 0].get_xlabel() == run.classes[label]
        for j, sample in enumerate(found.found[i]):
            cell = cells[i, 1 + j]
            image = np.asarray(Image.open(BytesIO(run.train.read(int(sample)).tobytes())))
            np.testing.assert_array_equal(cell.get_images()[0].get_array(), image)
            other = int(run.train.index["label"][sample])
            mark = "" if other == label else f"{CROSS} "
            assert cell.get_xlabel() == f"{mark}{run.classes[other]}\n{found.distances[i, j]:.1f}"
            assert cell.xaxis.label.get_color() == ("black" if other == label else RED)
            assert {side.get_visible() for side in cell.spines.values()} == {other != label}, "a frame"


def test_distances_have_the_same_decimals() -> None:
    image = Named(np.zeros((8, 8, 3), np.uint8), "a")
    for scale, shown in (
        (1.0, ["0.02", "1.00", "2.50"]),
        (100.0, ["2", "100", "250"]),
        (0.0, ["0.00"] * 3),
        (np.nan, ["nan"] * 3),
    ):
        distances = np.array([[0.02, 1.0, 2.5]], np.float32) * np.float32(scale)
        figure = draw_nearest([image], [[image] * 3], distances, np.ones((1, 3), np.bool_), "")
        assert [cell.get_xlabel() for cell in figure.axes[1:]] == [f"a\n{text}" for text in shown]


def test_a_training_image_is_its_own_nearest(run: Trained) -> None:
    """Validation on the training set itself: each image is found again, wherever it stands among three batches."""
    planted = replace(run, val=run.train)
    tests = np.array([239, 0, 130])
    found = nearest_images(planted, tests, searched(planted, 0), 3)
    assert found.searched == 240
    np.testing.assert_array_equal(found.found[:, 0], tests)
    assert found.distances[:, 0].max() < 1e-3 * found.distances[:, 1].min()
    without = nearest_images(planted, tests, np.setdiff1d(np.arange(240), tests), 2)
    np.testing.assert_array_equal(without.found, found.found[:, 1:])
    assert nearest_images(planted, tests[:1], tests, 9).found.shape == (1, 3), "no more than there are"


def test_a_net_without_dense_layers_has_the_other_figures(
    run_directory: Path,
    run: Trained,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    squeezenet = with_net(run, ModelConfig("torchvision:squeezenet1_1"))
    monkeypatch.setattr("dist_train.analysis.figures.open_run", lambda *_, **__: squeezenet)
    assert main(["figures", "anywhere", "--out", str(tmp_path), "--images=1"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kernels.json", "kernels.png", "top5.png"]
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"nearest.png is left out: torchvision:squeezenet1_1 has no dense layer, .*", line)


def test_the_command(run_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["figures", str(run_directory), "--images=3", "--neighbours=2", "--train-images=50", "--device=cpu"]
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert err == "", "no progress bar where there is no terminal"
    lines = [line.split(maxsplit=1) for line in out.splitlines()]
    assert [line[:14] for line in out.splitlines()[:4]] == ["  colour share"] * 3 + ["    same class"]
    assert re.fullmatch(r"same class +\d of 6 neighbours \([\d.]+%\)", out.splitlines()[3].strip())
    paths = [run_directory / "figures" / f"{name}.png" for name in ("kernels", "top5", "nearest")]
    assert lines[4:] == [[path.stem, str(path)] for path in paths]
    written = {path.name for path in (run_directory / "figures").iterdir()}
    assert written == {path.name for path in paths} | {"kernels.json"}
    before = [path.read_bytes() for path in paths]
    for path in paths:
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert min(image.size) > 250
    main(argv)
    assert [path.read_bytes() for path in paths] == before, "the same pictures each time"


def test_bad_input_is_one_sentence(run_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["figures", str(tmp_path / "nowhere")]) == 2
    assert main(["figures", str(run_directory), "--out", str(tmp_path / "file"), "--device=cpu"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("error: ") for line in lines)
    assert not (tmp_path / "nowhere").exists()
    for arguments in (["--images=0"], ["--neighbours=-1"], ["--train-images=-1"], ["--device=tpu"]):
        assert main(["figures", str(run_directory), *arguments]) == 2
        assert capsys.readouterr().err.startswith(f"error: argument {arguments[0].partition('=')[0]}: ")
