"""Figures 3 and 4 of the paper, against an independent forward pass and brute force."""

from __future__ import annotations

import re
from dataclasses import replace
from io import BytesIO
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.functional import center_crop

from dist_train import models
from dist_train.__main__ import main
from dist_train.analysis.figures import inputs_figure, kernel_blocks, kernels_figure, nearest_figure, top5_figure
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
from dist_train.pictures.kernels import kernel_levels
from dist_train.pictures.style import PINK, RED
from pipelines.shards import ShardSet
from tests.helpers.launch import launch

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


def test_each_kernel_is_scaled_on_its_own() -> None:
    weights = np.zeros((3, 3, 2, 2), np.float32)
    weights[0, 0] = [[-2.0, 0.0], [1.0, 2.0]]  # red; levels by hand: 255 (0.5 + w / 4)
    weights[1, 2] = [[1e-6, -0.5e-6], [0.0, 0.0]]
    levels = kernel_levels(weights)
    assert levels.dtype == np.uint8
    assert levels.shape == (3, 2, 2, 3)
    np.testing.assert_array_equal(levels[0, :, :, 0], [[0, 128], [191, 255]])
    assert (levels[0, :, :, 1:] == 128).all()
    np.testing.assert_array_equal(levels[1, :, :, 2], [[255, 64], [128, 128]])
    assert (levels[2] == 128).all(), "a dead kernel is grey"


@pytest.mark.parametrize("name", ["alexnet", "alexnet_two_tower", "alexnet_one_tower"])
def test_kernels_are_shown_by_tower(run: Trained, tmp_path: Path, name: str) -> None:
    """In the picture itself: 48 red kernels of tower 1 above the 48 blue ones of tower 2, three rows of 16 each."""
    drawn = with_net(run, ModelConfig(name, hidden=32))
    layers = [layer for layer in drawn.model.modules() if isinstance(layer, nn.Conv2d) and layer.in_channels == 3]
    weights = torch.full((96, 3, 11, 11), -1.0)
    weights[:48, 0], weights[48:, 2] = 1, 1
    weights[0] = 0
    weights[0, :, 0, 1] = 1  # top row, second column
    with torch.no_grad():
        for layer, kernels in zip(layers, weights.chunk(len(layers)), strict=True):
            layer.weight.copy_(kernels)
    figure = kernels_figure(drawn)
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
        kernels_figure(grey)


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
    cells = [cell for cell in figure.axes if cell.get_visible() and cell.axison]
    for i, (above, below) in enumerate(zip(*(cells_of(cells, bars) for bars in (False, True)), strict=True)):
        label = int(run.val.index["label"][predictions.samples[i]])
        assert above.get_xlabel() == run.classes[label]
        image = np.asarray(Image.open(BytesIO(run.val.read(int(predictions.samples[i])).tobytes())))
        np.testing.assert_array_equal(above.get_images()[0].get_array(), image)
        widths = [bar.get_width() for bar in below.patches]
        np.testing.assert_allclose(widths, np.sort(expected[i])[::-1][:5], atol=0.01)
        order = np.argsort(-predictions.probabilities[i])[:5]
        names = [text.get_text() for text in below.texts][::2]
        assert names == [(run.classes + [f"class #{o}" for o in range(3, 7)])[o] for o in order]
        pink = [bool(np.allclose(bar.get_facecolor()[:3], to_rgb(PINK))) for bar in below.patches]
        assert pink == [bool(o == label) for o in order]
        assert below.get_xlim() == (0, 1)
        texts += names
    assert "class #5" in texts
    assert f"Picked so that {(~predictions.right).sum()} of 6 are misclassified" in figure.get_suptitle()


def test_images_that_the_net_gets_wrong(run: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    found = misclassified(run, 4)
    logits, _ = reference(run, run.val, found.samples)
    labels = run.val.index["label"][found.samples]
    assert len(set(found.samples)) == 4
    assert (logits.argmax(1) != labels).all()
    every = misclassified(run, 63)
    assert len(every.samples) == round(63 * found.error) < 63, "as many as there are"
    assert len(set(labels)) == min(4, len(set(every.labels)))
    title = top5_figure(run, found).get_suptitle()
    assert "Picked so that 4 of 4 are misclassified. Error of the 63 images looked at: " in title

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
        assert figure.get_suptitle() == "Random 67x67 crop of images resized to shorter side 72"
    np.testing.assert_array_equal(*pictures)
    square = replace(run.config.data, center_square=True)
    title = inputs_figure(replace(run.config, data=square)).get_suptitle()
    assert title.endswith("crop of the central square of images resized to shorter side 72, reflection, lighting")


def test_some_figures_only(run_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["figures", str(run_directory), "--out", str(tmp_path), "--device=cpu", "--images=3", "--only"]
    assert main([*argv, "wrong", "inputs"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inputs.png", "wrong.png"]
    assert main([*argv, "kernels"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inputs.png", "kernels.png", "wrong.png"]
    capsys.readouterr()
    assert main([*argv, "kernel"]) == 2
    assert "invalid choice: 'kernel' (choose from " in capsys.readouterr().err


def cells_of(cells: list[Any], bars: bool) -> list[Any]:
    return [cell for cell in cells if bool(cell.patches) == bars]


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
    assert f"the nearest of {len(candidates)} training images" in " ".join(figure.get_suptitle().split())
    cells = np.array(figure.axes).reshape(5, 6)
    for i in range(5):
        label = run.val.index["label"][tests[i]]
        assert cells[i, 0].get_xlabel() == run.classes[label]
        for j, sample in enumerate(found.found[i]):
            cell = cells[i, 2 + j]
            image = np.asarray(Image.open(BytesIO(run.train.read(int(sample)).tobytes())))
            np.testing.assert_array_equal(cell.get_images()[0].get_array(), image)
            other = int(run.train.index["label"][sample])
            assert cell.get_xlabel() == f"{run.classes[other]}\n{found.distances[i, j]:.3g}"
            assert cell.xaxis.label.get_color() == ("black" if other == label else RED)


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
    monkeypatch.setattr("dist_train.analysis.figures.open_run", lambda *_: squeezenet)
    assert main(["figures", "anywhere", "--out", str(tmp_path), "--images=1"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kernels.png", "top5.png"]
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"nearest.png is left out: torchvision:squeezenet1_1 has no dense layer, .*", line)


@pytest.mark.integration
def test_the_command(run_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["figures", str(run_directory), "--images=3", "--neighbours=2", "--train-images=50", "--device=cpu"]
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert err == "", "no progress bar where there is no terminal"
    lines = [line.split(maxsplit=1) for line in out.splitlines()]
    assert re.fullmatch(r"same class +\d of 6 neighbours \([\d.]+%\)", out.splitlines()[0].strip())
    paths = [run_directory / "figures" / f"{name}.png" for name in ("kernels", "top5", "nearest")]
    assert lines[1:] == [[path.stem, str(path)] for path in paths]
    assert sorted(path.name for path in (run_directory / "figures").iterdir()) == sorted(path.name for path in paths)
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
