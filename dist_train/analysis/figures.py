"""`python -m dist_train figures RUN`: figures 3 and 4 of the paper (section 6.1) for a trained run.

kernels.png   figure 3: the kernels of the first convolution
top5.png      figure 4, left: the five classes that the net finds most probable for some validation images
nearest.png   figure 4, right: the training images that the last hidden layer takes for similar

With `--only`, others too, which are drawn beside a run that goes on (monitor/portraits.py):

inputs.png    what the net is shown: training images beside augmented versions of them; needs no checkpoint
wrong.png     as top5.png, for images that the net gets wrong
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

from dist_train.analysis.neighbours import (
    FigureError,
    Neighbours,
    Predictions,
    misclassified,
    most_probable,
    nearest_images,
    searched,
    varied_tests,
)
from dist_train.analysis.trained import Trained, device_option, open_run, read_config
from dist_train.config import Config
from dist_train.models.alexnet import AlexNet
from dist_train.pictures.cells import Named
from dist_train.pictures.kernels import Weights, draw_kernels
from dist_train.pictures.nearest import draw_nearest
from dist_train.pictures.style import TITLE
from dist_train.pictures.text import fit
from dist_train.pictures.top5 import BARS, draw_top5
from dist_train.ranks.world import pick_device
from pipelines.files import write_atomically
from pipelines.png import as_png
from pipelines.preview import decoded, shown_figure
from pipelines.shards import ShardSet
from pipelines.speech import say, show

RUN_NAME = 250  # width in points
ROWS = 6  # images whose augmented versions are shown


class Drawn(NamedTuple):
    """A figure, and the share of neighbours of the same class if it shows neighbours."""

    figure: Figure
    same_class: str = ""


def start(args: Namespace) -> int:
    """Draw the figures and print their paths. Returns 0.

    A figure that the model does not allow, such as nearest.png of a net without dense layers, is left out with a
    sentence, and the others are drawn. Raises RunError, ShardError, OSError.
    """
    out: Path = args.out or args.run / "figures"
    with device_option():
        device = pick_device(args.device)
    drawings: dict[str, Callable[[], Drawn]] = {}
    if "inputs" in args.only:
        config = read_config(args.run)
        drawings["inputs"] = lambda: Drawn(inputs_figure(config))
    if set(args.only) != {"inputs"}:
        drawings |= _of_net(_threads(open_run(args.run, device, args.checkpoint)), args)
    out.mkdir(parents=True, exist_ok=True)
    rows = write_figures({name: drawings[name] for name in drawings if name in args.only}, out)
    show("\n".join(f"{label:>14}  {text}" for label, text in rows))
    return 0


def _of_net(run: Trained, args: Namespace) -> dict[str, Callable[[], Drawn]]:
    """How each figure of a trained net is drawn."""

    def similar() -> Drawn:
        found = nearest_images(run, varied_tests(run, args.images), searched(run, args.train_images), args.neighbours)
        return Drawn(nearest_figure(run, found), found.summary())

    return {
        "kernels": lambda: Drawn(kernels_figure(run)),
        "top5": lambda: Drawn(top5_figure(run, most_probable(run, args.images))),
        "nearest": similar,
        "wrong": lambda: Drawn(top5_figure(run, misclassified(run, args.images))),
    }


def write_figures(drawings: Mapping[str, Callable[[], Drawn]], out: Path) -> list[tuple[str, str]]:
    """Write these figures into the directory `out`, under their names.

    Returns (label, text) for each result, the paths last. Raises ShardError and OSError.
    """
    results: list[tuple[str, str]] = []
    paths: list[tuple[str, str]] = []
    for name, drawing in drawings.items():
        path = out / f"{name}.png"
        try:
            figure, same_class = drawing()
        except FigureError as error:
            say(f"{path.name} is left out: {error}")
            continue
        if same_class:
            results.append(("same class", same_class))
        write_atomically(path, as_png(figure, dpi=figure.dpi, pil_kwargs={"optimize": True}))
        paths.append((name, str(path)))
    return results + paths


def inputs_figure(config: Config) -> Figure:
    """What the net is shown, as this configuration has it augmented. Raises ShardError."""
    shards = ShardSet(config.data.train)
    return shown_figure(shards, config.data, rows=ROWS, seed=config.train.seed, threads=torch.get_num_threads())


def kernels_figure(run: Trained) -> Figure:
    """Figure 3. Raises FigureError."""
    return draw_kernels(kernel_blocks(run), _title(run))


def kernel_blocks(run: Trained) -> list[Weights]:
    """The kernels that see the image, float32 [n, 3, height, width], a block for each tower of the net. Raises
    FigureError if no convolution sees RGB."""
    layers = [module for module in run.model.modules() if isinstance(module, nn.Conv2d)]
    coloured = [layer for layer in layers if layer.in_channels == layer.weight.shape[1] == 3]
    if not coloured:
        why = f"its first one has {layers[0].in_channels} input channels" if layers else "it has none"
        raise FigureError(f"{run.config.model.name} has no convolution that sees the three colours of an image: {why}")
    blocks = [layer.weight.detach().float().cpu() for layer in coloured]
    if isinstance(run.model, AlexNet):  # one convolution holds the kernels of both towers, those of tower 1 first
        blocks = list(blocks[0].chunk(run.model.towers))
    return [block.numpy() for block in blocks]


def top5_figure(run: Trained, predictions: Predictions) -> Figure:
    """Figure 4, left."""
    n, outputs = predictions.probabilities.shape
    wrong = int((~predictions.right).sum())
    images = "1 validation image" if n == 1 else f"{n} validation images"
    title = f"The {min(BARS, outputs)} most probable classes of {images}: {_title(run)}\n"
    if wrong:
        title += f"Picked so that {wrong} of {n} are misclassified{', which stand last' * (wrong < n)}. "
    title += f"Error of the {predictions.looked} images looked at: {predictions.error:.1%}\n"
    title += "Pink: the correct class, if it is among them"
    names = [run.output_name(output) for output in range(outputs)]
    shown = named(run, run.val, predictions.samples.tolist())
    return draw_top5(shown, predictions.labels.tolist(), predictions.probabilities, names, title)


def nearest_figure(run: Trained, neighbours: Neighbours) -> Figure:
    """Figure 4, right."""
    title = (
        f"{len(neighbours.tests)} validation images and, beside each, the nearest of {neighbours.searched} training "
        f"images by Euclidean distance (below) in the last hidden layer: {_title(run)}\n"
        f"Of the same class: {neighbours.summary()}. Red: another class"
    )
    tests = named(run, run.val, neighbours.tests.tolist())
    found = [named(run, run.train, row) for row in neighbours.found.tolist()]
    return draw_nearest(tests, found, neighbours.distances, neighbours.same, title)


def named(run: Trained, shards: ShardSet, samples: Sequence[int]) -> list[Named]:
    """The whole images of these samples, with the names of their classes."""
    labels = shards.labels(np.array(samples, np.int64)).tolist()
    return [Named(decoded(shards, sample), run.classes[label]) for sample, label in zip(samples, labels, strict=True)]


def _threads(run: Trained) -> Trained:
    """The run, with as many threads for decoding as torch has for the net: OMP_NUM_THREADS, or the CPUs."""
    data = replace(run.config.data, threads=torch.get_num_threads())
    return replace(run, config=replace(run.config, data=data))


def _title(run: Trained) -> str:
    """The run and its step."""
    return f"{fit(run.directory.resolve().name, RUN_NAME, TITLE)}, step {run.step}"
