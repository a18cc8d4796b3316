"""`python -m dist_train figures RUN`: figures 3 and 4 of the paper (section 6.1) for a trained run.

kernels.png   figure 3: the kernels of the first convolution
top5.png      figure 4, left: the five classes that the net finds most probable for some validation images
nearest.png   figure 4, right: the training images that the last hidden layer takes for similar
"""

from __future__ import annotations

import sys
import textwrap
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, ArgumentTypeError
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from dist_train.analysis.neighbours import (
    FigureError,
    Neighbours,
    Predictions,
    most_probable,
    nearest,
    searched,
    varied_tests,
)
from dist_train.analysis.trained import Trained, open_run
from dist_train.ranks.world import USAGE
from pipelines.files import write_atomically
from pipelines.shards import ShardError, ShardSet

Pixels = NDArray[np.uint8]

KERNELS, TOP5, NEAREST = "kernels.png", "top5.png", "nearest.png"
DPI = 96
SMALL, TITLE = 8, 10  # font sizes in points
PINK, BLUE = "#f5a9bc", "#b5cdea"  # the correct class, the others
RED = "#c8102e"


def main(argv: Sequence[str]) -> int:
    """Draw the figures and print where they lie. Returns the exit code: 0, or 2 with one sentence on stderr.

    A figure that the model does not allow, such as nearest.png of a net without dense layers, is left out with a
    sentence, and the others are drawn.
    """
    parser = ArgumentParser(
        prog="dist_train figures",
        description="Figures 3 and 4 of the paper for a trained run: the kernels of the first convolution, the most "
        "probable classes of validation images, and their nearest training images.",
        formatter_class=ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="directory of a run")
    parser.add_argument("--checkpoint", choices=("last", "best"), default="last", help="whose weights are taken")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one")
    parser.add_argument("--images", type=_positive, default=8, metavar="N", help="validation images a figure")
    parser.add_argument("--neighbours", type=_positive, default=6, metavar="K", help="training images beside each")
    parser.add_argument(
        "--train-images", type=_natural, default=10000, metavar="M", help="training images searched; 0: all"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the figures go (RUN/figures)")
    args = parser.parse_args(argv)
    out: Path = args.out or args.run / "figures"
    try:
        run = open_run(args.run, _device(args.device), args.checkpoint)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE
    try:
        out.mkdir(parents=True, exist_ok=True)
        rows = draw(run, out, images=args.images, neighbours=args.neighbours, train_images=args.train_images)
    except (ShardError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE
    print("\n".join(f"{label:>14}  {text}" for label, text in rows))
    return 0


def draw(run: Trained, out: Path, *, images: int, neighbours: int, train_images: int) -> list[tuple[str, str]]:
    """Write the three figures into the directory `out`.

    Args:
        images: validation images in top5.png and in nearest.png.
        neighbours: training images beside each in nearest.png.
        train_images: how many training images are searched for them; 0: all.

    Returns (label, text) for each result, the paths last. Raises ShardError and OSError.
    """
    rows: list[tuple[str, str]] = []
    paths: list[tuple[str, str]] = []
    for name in (KERNELS, TOP5, NEAREST):
        try:
            if name == KERNELS:
                figure = draw_kernels(run)
            elif name == TOP5:
                figure = draw_top5(run, most_probable(run, images))
            else:
                found = nearest(run, varied_tests(run, images), searched(run, train_images), neighbours)
                figure = draw_nearest(run, found)
                rows.append(("same class", found.summary()))
        except FigureError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
            continue
        png = BytesIO()
        figure.savefig(png, format="png", dpi=figure.dpi, pil_kwargs={"optimize": True})
        write_atomically(out / name, png.getvalue())
        paths.append((name.removesuffix(".png"), str(out / name)))
    return rows + paths


# Figure 3


def kernel_blocks(run: Trained) -> list[Tensor]:
    """The kernels that see the image, float32 [n, 3, height, width], a block for each tower of the net.

    The grouped `alexnet` holds both towers in one convolution, the first half of the kernels being tower 1's. Raises
    FigureError where no convolution sees RGB.
    """
    layers = [module for module in run.model.modules() if isinstance(module, nn.Conv2d)]
    coloured = [layer for layer in layers if layer.in_channels == layer.weight.shape[1] == 3]
    if not coloured:
        why = f"its first one has {layers[0].in_channels} input channels" if layers else "it has none"
        raise FigureError(f"{run.config.model.name} has no convolution that sees the three colours of an image: {why}")
    weights = [layer.weight.detach().float().cpu() for layer in coloured]
    return list(weights[0].chunk(2)) if run.config.model.name == "alexnet" else weights


def kernel_levels(weights: Tensor) -> Pixels:
    """Each kernel as an image, scaled on its own: level 255 (0.5 + w / (2 max |w|)), so that a weight of 0 is mid-grey.

    weights: [n, 3, height, width]; returns uint8 [n, height, width, 3].
    """
    largest = weights.abs().amax((1, 2, 3), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    levels = 255 * (0.5 + weights / (2 * largest))
    return levels.round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


def kernel_grid(weights: Tensor, columns: int = 16, cell: int = 66, gap: int = 4) -> Pixels:
    """The kernels side by side, enlarged without interpolation to about `cell` pixels, with white gaps of `gap` pixels.

    weights: [n, 3, height, width]; returns uint8 [rows * (h + gap) - gap, columns * (w + gap) - gap, 3].
    """
    levels = kernel_levels(weights)
    times = max(1, round(cell / max(levels.shape[1:3])))
    levels = levels.repeat(times, 1).repeat(times, 2)
    n, height, width, _ = levels.shape
    columns = min(columns, n)
    rows = -(-n // columns)
    grid = np.full((rows * (height + gap), columns * (width + gap), 3), 255, np.uint8)
    for i, kernel in enumerate(levels):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        grid[top : top + height, left : left + width] = kernel
    return grid[:-gap, :-gap]


def draw_kernels(run: Trained) -> Figure:
    """Figure 3: "convolutional kernels ... learned by the first convolutional layer", those of tower 1 above those of
    tower 2. Raises FigureError."""
    blocks = kernel_blocks(run)
    count = sum(len(block) for block in blocks)
    columns = 16 if count <= 256 else 32
    grids = [kernel_grid(block, columns) for block in blocks]
    margin, line = 24, round(1.5 * TITLE * DPI / 72)
    label = line * (len(blocks) > 1)
    width = max(720, 2 * margin + max(grid.shape[1] for grid in grids))
    side, depth = "x".join(map(str, blocks[0].shape[2:])), blocks[0].shape[1]
    title = _wrap(f"{count} kernels of size {side}x{depth} of the first convolution: {_name(run)}", width / DPI, TITLE)
    caption = "Each kernel is scaled on its own: zero is mid-grey, its largest absolute weight black or white"
    caption = _wrap(caption, width / DPI, SMALL)
    above, below = (line * (text.count("\n") + 1) + margin for text in (title, caption))
    height = above + sum(grid.shape[0] + label for grid in grids) + margin // 2 * (len(grids) - 1) + below

    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    options: dict[str, Any] = {"parse_math": False}  # a $ in a name is a $
    figure.text(0.5, 1 - margin / 2 / height, title, ha="center", va="top", fontsize=TITLE, **options)
    figure.text(0.5, margin / 2 / height, caption, ha="center", va="bottom", fontsize=SMALL, **options)
    top = height - above
    for i, grid in enumerate(grids):
        left = (width - grid.shape[1]) // 2
        if label:
            text = f"tower {i + 1}"
            figure.text(left / width, (top - line / 2) / height, text, va="center", fontsize=SMALL, **options)
        top -= label + grid.shape[0]
        figure.figimage(grid, left, top, origin="upper")  # pixel by pixel: axes would interpolate
        top -= margin // 2
    return figure


# Figure 4


def draw_top5(run: Trained, predictions: Predictions) -> Figure:
    """Figure 4, left: images "and the five labels considered most probable by our model. The correct label is written
    under each image, and the probability assigned to the correct label is also shown with a red bar (if it happens to
    be in the top 5)"."""
    n = len(predictions.samples)
    columns = min(4, n)
    rows = -(-n // columns)
    best = min(5, predictions.probabilities.shape[1])
    wrong = int((~predictions.right).sum())
    title = f"The {best} most probable classes of {n} validation image{'s' * (n > 1)}: {_name(run)}\n"
    if wrong:
        title += f"Picked so that {wrong} of {n} are misclassified, which stand last. "
    title += f"Error of the {predictions.looked} images looked at: {predictions.error:.1%}\n"
    title += "Pink: the correct class, if it is among them"
    width = max(5.0, 2.2 * columns)
    figure = Figure(figsize=(width, (2.0 + 0.2 * best + 0.35) * rows + 0.8), dpi=DPI)
    figure.set_layout_engine("constrained", h_pad=0.07)
    figure.suptitle(_wrap(title, width, TITLE), fontsize=TITLE, parse_math=False)
    cells = figure.subplots(2 * rows, columns, squeeze=False, height_ratios=[2.0, 0.2 * best] * rows)
    for i, (above, below) in enumerate(zip(cells[::2].flat, cells[1::2].flat, strict=True)):
        if i >= n:
            above.set_axis_off()
            below.set_axis_off()
            continue
        _show(above, _original(run.val, int(predictions.samples[i])))
        label = int(predictions.labels[i])
        name = _fit(run.classes[label], 148, SMALL + 1, "bold")
        above.set_xlabel(name, fontsize=SMALL + 1, fontweight="bold", parse_math=False)
        probabilities = predictions.probabilities[i]
        top = np.argsort(-probabilities, kind="stable")[:best]
        below.barh(range(best), probabilities[top], 0.85, color=[PINK if c == label else BLUE for c in top])
        for j, c in enumerate(top):
            text: dict[str, Any] = {"va": "center_baseline", "fontsize": SMALL, "parse_math": False}
            below.text(0.02, j, _fit(_class(run, int(c)), 116), **text)
            below.text(0.99, j, f"{probabilities[c]:.0%}", ha="right", **text)
        below.set(xlim=(0, 1), ylim=(best - 0.5, -0.5), xticks=[], yticks=[])
        below.spines[:].set_color("#bbbbbb")
    return figure


def draw_nearest(run: Trained, neighbours: Neighbours) -> Figure:
    """Figure 4, right: test images "in the first column. The remaining columns show the ... training images that
    produce feature vectors in the last hidden layer with the smallest Euclidean distance"."""
    n, k = neighbours.found.shape
    title = (
        f"{n} validation images and, beside each, the nearest of {neighbours.searched} training images by Euclidean "
    )
    title += f"distance (below) in the last hidden layer: {_name(run)}\n"
    title += f"Of the same class: {neighbours.summary()}. Red: another class"
    width = max(5.0, 1.25 * (k + 1) + 0.2)
    figure = Figure(figsize=(width, 1.55 * n + 0.9), dpi=DPI, layout="constrained")
    figure.suptitle(_wrap(title, width, TITLE), fontsize=TITLE, parse_math=False)
    cells = figure.subplots(n, k + 2, squeeze=False, width_ratios=[1, 0.15, *[1] * k])
    for i, row in enumerate(cells):
        row[1].set_axis_off()
        test = int(neighbours.tests[i])
        name = _fit(run.classes[run.val.index["label"][test]], 76, SMALL, "bold")
        _show(row[0], _original(run.val, test))
        row[0].set_xlabel(name, fontsize=SMALL, fontweight="bold", parse_math=False)
        for j, cell in enumerate(row[2:]):
            sample = int(neighbours.found[i, j])
            name = _fit(run.classes[run.train.index["label"][sample]], 76)
            _show(cell, _original(run.train, sample))
            cell.set_xlabel(
                f"{name}\n{neighbours.distances[i, j]:.3g}",
                fontsize=SMALL,
                color="black" if neighbours.same[i, j] else RED,
                parse_math=False,
            )
    return figure


def _original(shards: ShardSet, sample: int) -> Pixels:
    """The whole image, uint8 [height, width, 3]."""
    return np.asarray(Image.open(BytesIO(shards.read(sample).tobytes())).convert("RGB"))


def _show(cell: Axes, image: Pixels) -> None:
    cell.imshow(image)
    cell.set(xticks=[], yticks=[], anchor="S")  # directly above its label, whatever its shape
    cell.spines[:].set_visible(False)


def _name(run: Trained) -> str:
    return f"{_fit(run.directory.resolve().name, 250, TITLE)}, step {run.step}"


def _class(run: Trained, output: int) -> str:
    """The net may have more outputs than there are classes."""
    return run.classes[output] if output < len(run.classes) else f"output {output}"


def _fit(text: str, points: float, size: int = SMALL, weight: str = "normal") -> str:
    """The text, or as much of its beginning as is this wide, with an ellipsis."""
    font = FontProperties(size=size, weight=weight)
    kept = text
    while text and text_to_path.get_text_width_height_descent(kept, font, ismath=False)[0] > points:
        text = text[:-1]
        kept = text.rstrip(" ,") + "…"
    return kept


def _wrap(text: str, inches: float, size: int) -> str:
    """The text in lines that fit a figure of this width at this font size in points."""
    characters = int(inches * 72 / (0.56 * size))
    lines = [textwrap.wrap(line, characters, break_on_hyphens=False) for line in text.split("\n")]
    return "\n".join(part for line in lines for part in line)


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda, but PyTorch finds no GPU here: leave it out, or give cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _natural(text: str) -> int:
    if (number := int(text)) < 0:
        raise ArgumentTypeError(f"{text} is below 0")
    return number


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise ArgumentTypeError(f"{text} is not a positive number")
    return number
