"""A picture of what the net is shown: originals beside their augmented versions."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from pipelines.augment import Augment
from pipelines.dali import Decode
from pipelines.loader import Loader
from pipelines.order import Ints
from pipelines.plan import TrainingPlan
from pipelines.png import as_png, literal
from pipelines.shards import ShardSet
from pipelines.sources import upright_rgb

VERSIONS = 5  # of each image
LOOKED_AT = 10_000  # samples, for different classes among them: there may be a billion
INCHES, DPI = 1.3, 120  # a cell, the picture


class _Chosen(TrainingPlan):
    """A few samples, the same in every epoch, each augmented anew as in training."""

    def __init__(self, shards: ShardSet, augment: Augment, seed: int, count: int) -> None:
        super().__init__(shards, augment, shards.manifest, seed)
        shuffled = self.order.samples(0, 0, min(len(shards), max(count, LOOKED_AT)))
        shuffled = shuffled[~np.isin(shuffled, shards.quarantined)]
        first = np.unique(shards.labels(shuffled), return_index=True)[1]  # of each class
        self.chosen = np.concatenate([shuffled[np.sort(first)], np.delete(shuffled, first)])[:count]

    def __len__(self) -> int:
        return len(self.chosen)

    def samples(self, epoch: int, start: int, stop: int) -> Ints:
        return self.chosen[start:stop].copy()


def draw(directory: Path, out: Path, *, resize: int, crop: int, rows: int, seed: int) -> None:
    """Write the picture of `shown_figure` for a set. Raises ShardError, OSError."""
    figure = shown_figure(ShardSet(directory), Augment(resize, crop), rows=rows, seed=seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(as_png(figure, dpi=figure.dpi))


def shown_figure(shards: ShardSet, augment: Augment, *, rows: int, seed: int, threads: int = 0) -> Figure:
    """`rows` random images, if possible of different classes, each beside five augmented versions of it.

    The versions come from the training loader. Lighting is kept and the mean is put back, so colours are those that the
    net sees, however they are scaled for it; levels are cut to 0..255. `threads`: as for `Decode`. Raises ShardError.
    """
    plan = _Chosen(shards, augment, seed, rows)
    rows = len(plan)
    loader = Loader(plan, shards.manifest, batch=rows, decode=Decode(threads=threads))
    columns = {"original": [decoded(shards, int(sample)) for sample in plan.chosen]}
    for epoch in range(VERSIONS):
        batch = next(loader.epoch(epoch))
        levels = batch.inputs.permute(0, 2, 3, 1).numpy() + loader.mean
        columns[f"epoch {epoch + 1}"] = list(np.rint(levels).clip(0, 255).astype(np.uint8))

    figure = Figure(figsize=(INCHES * (len(columns) + 1), INCHES * rows + 1), layout="constrained", dpi=DPI)
    figure.suptitle(_told(augment))
    axes = figure.subplots(rows, len(columns), squeeze=False)
    for (title, images), column in zip(columns.items(), axes.T, strict=True):
        column[0].set_title(title, fontsize="medium")
        for image, cell in zip(images, column, strict=True):
            cell.imshow(image, interpolation="nearest")
            cell.set(xticks=[], yticks=[], frame_on=False)
    for row, cell in zip(shards.rows(plan.chosen), axes[:, 0], strict=True):
        label = f"{literal(shards.classes[row['label']])}\n{row['width']}x{row['height']}"
        cell.set_ylabel(label, parse_math=False, rotation=0, ha="right", va="center")
    return figure


def _told(augment: Augment) -> str:
    """What is done to the images, for a title."""
    whole = "the central square of images" if augment.center_square else "images"
    more = ", reflection" * augment.mirror + ", lighting" * (augment.lighting > 0)
    return f"Random {augment.crop}x{augment.crop} crop of {whole} resized to shorter side {augment.resize}{more}"


def decoded(shards: ShardSet, sample: int) -> NDArray[np.uint8]:
    """The whole image of a sample, as it is shown: uint8 [height, width, 3]."""
    image = Image.open(BytesIO(shards.read(sample).tobytes()))
    return np.asarray(upright_rgb(image) if shards.turned else image.convert("RGB"))
