"""`python -m dist_train figures RUN`: figures 3 and 4 of the paper (section 6.1) for a trained run.

kernels.png   figure 3: the kernels of the first convolution, with the colour share of each tower's, which is written
              to kernels.json as well
top5.png      figure 4, left: the five most probable classes of some validation images, right and wrong ones
nearest.png   figure 4, right: the training images nearest to some validation images in the last hidden layer

With `--only`, two more, which are also drawn beside a running run (monitor/portraits.py):

inputs.png    what the net is shown: training images beside augmented versions of them; needs no checkpoint
wrong.png     like top5.png, for misclassified images only
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

from dist_train.analysis.colour import NOISE, colour_told, summarised
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
from dist_train.pictures.style import CROSS, TITLE
from dist_train.pictures.top5 import BARS, draw_top5
from dist_train.ranks.world import pick_device
from pipelines.files import folder, write_atomically
from pipelines.limits import Limits, limited
from pipelines.opened import PATIENCE
from pipelines.png import as_png, fit
from pipelines.preview import decoded, shown_figure
from pipelines.remote.sets import open_set
from pipelines.shards import ShardSet
from pipelines.speech import say, show

RUN_NAME = 250  # width in points
IMAGES, TESTS = 12, 8  # validation images of top5.png and wrong.png, and of nearest.png, unless a number is given
ROWS = 6  # images in inputs.png


class Drawn(NamedTuple):
    """A figure, what is printed of it as (label, text), and what is written beside it as JSON."""

    figure: Figure
    results: Sequence[tuple[str, str]] = ()
    record: Mapping[str, Any] | None = None


def start(args: Namespace) -> int:
    """Draw the figures and print their paths. Returns 0.

    A figure that the model does not allow, such as nearest.png of a net without dense layers, is left out, which is
    said in one sentence. Raises RunError, ShardError, OSError.
    """
    out: Path = args.out or args.run / "figures"
    with device_option():
        device = pick_device(args.device)
    drawings: dict[str, Callable[[], Drawn]] = {}
    if "inputs" in args.only:
        config = read_config(args.run, trusting=args.trust)
        drawings["inputs"] = lambda: Drawn(inputs_figure(config))
    if set(args.only) != {"inputs"}:
        drawings |= _of_net(_threads(open_run(args.run, device, args.checkpoint, trusting=args.trust)), args)
    if out.parent == args.run:  # not through a stranger's link
        folder(out)
    else:
        out.mkdir(parents=True, exist_ok=True)
    rows = write_figures({name: drawings[name] for name in drawings if name in args.only}, out)
    show("\n".join(f"{label:>14}  {text}" for label, text in rows))
    return 0


def _of_net(run: Trained, args: Namespace) -> dict[str, Callable[[], Drawn]]:
    """A function per figure of a trained net, which draws it."""

    def similar() -> Drawn:
        found = nearest_images(
            run, varied_tests(run, args.images or TESTS), searched(run, args.train_images), args.neighbours
        )
        return Drawn(nearest_figure(run, found), [("same class", found.summary())])

    return {
        "kernels": lambda: kernels_drawn(run),
        "top5": lambda: Drawn(top5_figure(run, most_probable(run, args.images or IMAGES))),
        "nearest": similar,
        "wrong": lambda: Drawn(top5_figure(run, misclassified(run, args.images or IMAGES))),
    }


def write_figures(drawings: Mapping[str, Callable[[], Drawn]], out: Path) -> list[tuple[str, str]]:
    """Write these figures into the directory `out`, under their names.

    Returns (label, text) per result, the paths last. Raises ShardError and OSError.
    """
    results: list[tuple[str, str]] = []
    paths: list[tuple[str, str]] = []
    for name, drawing in drawings.items():
        path = out / f"{name}.png"
        try:
            figure, told, record = drawing()
        except FigureError as error:
            say(f"{path.name} is left out: {error}")
            continue
        results += told
        write_atomically(path, as_png(figure, dpi=figure.dpi, pil_kwargs={"optimize": True}))
        if record:
            write_atomically(path.with_suffix(".json"), (json.dumps(record, indent=1) + "\n").encode())
        paths.append((name, str(path)))
    return results + paths


def inputs_figure(config: Config) -> Figure:
    """Training images, and what the net is shown of them by this configuration. Raises ShardError."""
    data = config.data
    with limited(Limits(pixels=data.max_pixels)):
        shards = open_set(data.train, cache=data.cache, cache_gb=data.cache_gb, patience=PATIENCE)
    return shown_figure(shards, config.data, rows=ROWS, seed=config.train.seed, threads=torch.get_num_threads())


def kernels_drawn(run: Trained) -> Drawn:
    """Figure 3, with the colour share of each tower's kernels. Raises FigureError."""
    blocks = kernel_blocks(run)
    towers = summarised(blocks)
    told = colour_told(towers)
    figure = draw_kernels(blocks, _title(run), [f"Colour share, {line}" for line in told])
    record = {"run": run.directory.resolve().name, "step": run.step, "colour_share": towers, "white_noise": NOISE}
    return Drawn(figure, [("colour share", line) for line in told], record)


def kernel_blocks(run: Trained) -> list[Weights]:
    """Kernels applied to the image, float32 [n, 3, height, width], one block per tower of the net. Raises FigureError
    if no convolution takes RGB."""
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
    kind = "misclassified validation image" if wrong == n else "validation image"
    title = f"{_many(n, kind)}, with the {min(BARS, outputs)} most probable classes: {_title(run)}\n"
    if 0 < wrong < n:
        title += f"Picked so that {wrong} of {n} are misclassified, which stand last. "
    title += f"Error of the {predictions.looked} images looked at: {predictions.error:.1%}. "
    title += "Bold, with an orange bar: the correct class"
    names = [run.output_name(output) for output in range(outputs)]
    shown = named(run, run.val, predictions.samples.tolist())
    return draw_top5(shown, predictions.labels.tolist(), predictions.probabilities, names, title)


def nearest_figure(run: Trained, neighbours: Neighbours) -> Figure:
    """Figure 4, right."""
    title = (
        f"{_many(len(neighbours.tests), 'validation image')}, left, and the nearest of {neighbours.searched} training "
        f"images: {_title(run)}\n"
        f"By Euclidean distance, below each, in the last hidden layer. Of the same class: {neighbours.summary()}; "
        f"{CROSS} and a dashed frame: another class"
    )
    tests = named(run, run.val, neighbours.tests.tolist())
    found = [named(run, run.train, row) for row in neighbours.found.tolist()]
    return draw_nearest(tests, found, neighbours.distances, neighbours.same, title)


def named(run: Trained, shards: ShardSet, samples: Sequence[int]) -> list[Named]:
    """Whole images of these samples, with their class names."""
    labels = shards.labels(np.array(samples, np.int64)).tolist()
    return [Named(decoded(shards, sample), run.classes[label]) for sample, label in zip(samples, labels, strict=True)]


def _threads(run: Trained) -> Trained:
    """The run with as many decoding threads as torch has for the net: OMP_NUM_THREADS, or the number of CPUs."""
    data = replace(run.config.data, threads=torch.get_num_threads())
    return replace(run, config=replace(run.config, data=data))


def _many(n: int, noun: str) -> str:
    return f"{n} {noun}{'s' * (n != 1)}"


def _title(run: Trained) -> str:
    """Name and step of the run."""
    return f"{fit(run.directory.resolve().name, RUN_NAME, TITLE)}, step {run.step}"
