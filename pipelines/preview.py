"""preview.png: images of a set beside augmented versions of them, as the net is shown them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from pipelines.augment import Augment, without_chance
from pipelines.dali import Decode
from pipelines.errors import first_line, of_the_system
from pipelines.files import write_atomically
from pipelines.limits import Limits, limited
from pipelines.loader import Loader
from pipelines.manifest import ShardError
from pipelines.order import Ints
from pipelines.pillow import guarded, opened, upright_rgb
from pipelines.plan import TrainingPlan
from pipelines.png import as_png, fit
from pipelines.shards import ShardSet

VERSIONS = 5  # per image
LOOKED_AT = 10_000  # samples searched for different classes: the set may have a billion
DPI, POINTS, SIZE = 120, 72, 10  # dots and points per inch; font size in points
# In inches:
CELL, GAP, NAME = 1.2, 0.06, 1.3  # side of a cell; between two; width of a name
MARGIN, LINE, HEAD = 0.15, 0.2, 0.95  # around all; a line of the title; all above the cells
Pixels = NDArray[np.uint8]  # [height, width, 3]


class _Chosen(TrainingPlan):
    """A few samples, the same in every epoch, augmented anew in each as in training."""

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
    write_atomically(out, as_png(figure, dpi=figure.dpi))


def shown_figure(shards: ShardSet, augment: Augment, *, rows: int, seed: int, threads: int = 0) -> Figure:
    """Figure of `rows` random images, of different classes if possible, each beside five augmented versions of it.

    The versions come from the training loader. Lighting is kept and the mean is added back, so the colours are those
    that the net sees, however its inputs are scaled; levels are clipped to 0..255. `threads`: as for `Decode`. Raises
    ShardError.
    """
    plan = _Chosen(shards, augment, seed, rows)
    rows = len(plan)
    loader = Loader(plan, shards.manifest, batch=rows, decode=Decode(threads=threads))
    columns = {"original": [decoded(shards, int(sample)) for sample in plan.chosen]}
    for epoch in range(VERSIONS):
        batch = next(loader.epoch(epoch))
        levels = batch.inputs.permute(0, 2, 3, 1).numpy() + loader.mean
        columns[f"epoch {epoch + 1}"] = list(np.rint(levels).clip(0, 255).astype(np.uint8))

    sizes = [f"{row['width']}x{row['height']}" for row in shards.rows(plan.chosen)]
    names = [shards.classes[label] for label in shards.labels(plan.chosen)]
    return _grid(
        columns,
        [f"{fit(name, POINTS * NAME, SIZE)}\n{size}" for name, size in zip(names, sizes, strict=True)],
        f"Images of the set, and what the net is shown of them in {VERSIONS} epochs\n{_told(augment)}",
    )


def _grid(columns: Mapping[str, Sequence[Pixels]], labels: Sequence[str], title: str) -> Figure:
    """The images in square cells of one size, whatever their own shapes, with a label for each row."""
    width = 2 * MARGIN + NAME + len(columns) * (CELL + GAP)
    height = HEAD + len(labels) * (CELL + GAP) + MARGIN
    figure = Figure(figsize=(width, height), dpi=DPI)
    head, _, rest = title.partition("\n")
    figure.text(MARGIN / width, 1 - MARGIN / height, head, va="top", fontsize=SIZE + 1, fontweight="bold")
    figure.text(MARGIN / width, 1 - (MARGIN + LINE) / height, rest, va="top", fontsize=SIZE)
    for i, label in enumerate(labels):
        bottom = height - HEAD - i * (CELL + GAP) - CELL
        for j, (name, images) in enumerate(columns.items()):
            left = MARGIN + NAME + GAP + j * (CELL + GAP)
            cell = figure.add_axes((left / width, bottom / height, CELL / width, CELL / height))
            cell.imshow(images[i], interpolation="nearest")
            cell.set_aspect("equal", adjustable="datalim")  # the cell keeps its shape, beside the image it is empty
            cell.set(xticks=[], yticks=[], frame_on=False)
            if i == 0:
                cell.set_title(name, fontsize=SIZE)
            if j == 0:
                cell.set_ylabel(label, parse_math=False, rotation=0, ha="right", va="center", fontsize=SIZE)
    return figure


def _told(augment: Augment) -> str:
    """Description of the augmentation, for a title."""
    whole = "the central square of images" if augment.center_square else "images"
    plain = without_chance(augment)
    on = [f.name for f in fields(Augment) if getattr(augment, f.name) != getattr(plain, f.name)]
    crop = f"{augment.crop}x{augment.crop} crop of {whole} resized to shorter side {augment.resize}"
    return ", ".join([f"Random {crop}", *on])


def decoded(shards: ShardSet, sample: int) -> Pixels:
    """The whole image of a sample, as it is shown: uint8 [height, width, 3]. Raises ShardError if it cannot be decoded,
    or has more pixels than the index says."""
    (row,) = shards.rows(np.array([sample]))
    try:
        with limited(Limits(int(row["width"]) * int(row["height"]), int(row["size"]))), guarded():
            image = opened(shards.read(sample).tobytes())
            return np.asarray(upright_rgb(image) if shards.turned else image.convert("RGB"))
    except Exception as error:  # decoders raise anything on garbage
        if of_the_system(error):
            raise
        raise ShardError(
            f"{shards.name(sample)} cannot be shown ({first_line(error)}): run `python -m pipelines verify "
            f"{shards.directory}`, and it is left out"
        ) from error
