"""preview.png: images of a set beside augmented versions of them, as the net is shown them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

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
STRONGER = 10  # times the lighting, in one column: at the paper's 0.1 it is a few levels, which cannot be seen
LOOKED_AT = 10_000  # samples searched for different classes: the set may have a billion
DPI, POINTS, SIZE, SMALL = 120, 72, 10, 8  # dots and points per inch; font sizes in points
# In inches:
CELL, GAP, NAME = 1.2, 0.06, 1.3  # side of a cell; between two; width of a name
MARGIN, LINE = 0.15, 0.2  # around all; a line of text
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
    write_atomically(out, as_png(figure, dpi=figure.dpi, pil_kwargs={"optimize": True}))


def shown_figure(shards: ShardSet, augment: Augment, *, rows: int, seed: int, threads: int = 0) -> Figure:
    """Figure of `rows` random images, of different classes if possible, each beside five augmented versions of it.

    The versions come from the training loader. Lighting is kept and the mean is added back, so the colours are those
    that the net sees, however its inputs are scaled; levels are clipped to 0..255. With lighting, the first version
    stands between itself without and with ten times as much, and below it is what lighting adds to each channel.
    `threads`: as for `Decode`. Raises ShardError.
    """

    def version(epoch: int, lighting: float) -> NDArray[np.float32]:  # levels [rows, crop, crop, 3]
        plan = _Chosen(shards, replace(augment, lighting=lighting), seed, rows)
        loader = Loader(plan, shards.manifest, batch=len(plan), decode=Decode(threads=threads))
        levels: NDArray[np.float32] = next(loader.epoch(epoch)).inputs.permute(0, 2, 3, 1).numpy() + loader.mean
        return levels

    chosen = _Chosen(shards, augment, seed, rows).chosen
    sizes = [f"{row['width']}x{row['height']}" for row in shards.rows(chosen)]
    names = [shards.classes[label] for label in shards.labels(chosen)]
    columns = {"original": [_Cell(decoded(shards, int(sample))) for sample in chosen]}
    epochs, title = VERSIONS, ""
    if augment.lighting:
        epochs -= 2  # columns for the other two
        title = (
            "\nBelow an image: what lighting adds to its red, green and blue, in levels of 0 to 255. "
            f"The net is not shown lighting x {STRONGER}"
        )
        plain = version(0, 0.0)
        columns["epoch 1\nno lighting"] = _cells(plain)
        columns["epoch 1"] = _cells(version(0, augment.lighting), plain)
        columns[f"epoch 1\nlighting x {STRONGER}"] = _cells(version(0, STRONGER * augment.lighting), plain)
    for epoch in range(len(columns) > 1, epochs):
        columns[f"epoch {epoch + 1}"] = _cells(version(epoch, augment.lighting))
    return _grid(
        columns,
        [f"{fit(name, POINTS * NAME, SIZE)}\n{size}" for name, size in zip(names, sizes, strict=True)],
        f"Images of the set, and what the net is shown of them in {epochs} epochs\n{_told(augment)}{title}",
    )


class _Cell(NamedTuple):
    """An image, and what stands below it."""

    image: Pixels
    below: str = ""


def _cells(levels: NDArray[np.float32], plain: NDArray[np.float32] | None = None) -> list[_Cell]:
    """Cells of images [n, height, width, 3]; below each is what lighting added, if they are given without it too."""
    images = np.rint(levels).clip(0, 255).astype(np.uint8)
    if plain is None:
        return [_Cell(image) for image in images]
    shifts = (levels - plain).mean((1, 2))
    return [
        _Cell(image, "  ".join(f"{level:+.1f}" for level in shift)) for image, shift in zip(images, shifts, strict=True)
    ]


def _grid(columns: Mapping[str, Sequence[_Cell]], labels: Sequence[str], title: str) -> Figure:
    """The images in square cells of one size, whatever their own shapes, with a label for each row."""
    width = 2 * MARGIN + NAME + len(columns) * (CELL + GAP)
    above = MARGIN + LINE * (title.count("\n") + max(name.count("\n") for name in columns) + 3)
    step = CELL + GAP + LINE * any(cell.below for cells in columns.values() for cell in cells)
    height = above + len(labels) * step + MARGIN
    figure = Figure(figsize=(width, height), dpi=DPI)
    head, _, rest = title.partition("\n")
    figure.text(MARGIN / width, 1 - MARGIN / height, head, va="top", fontsize=SIZE + 1, fontweight="bold")
    figure.text(MARGIN / width, 1 - (MARGIN + LINE) / height, rest, va="top", fontsize=SIZE, linespacing=1.4)
    for i, label in enumerate(labels):
        bottom = height - above - i * step - CELL
        for j, (name, cells) in enumerate(columns.items()):
            left = MARGIN + NAME + GAP + j * (CELL + GAP)
            axes = figure.add_axes((left / width, bottom / height, CELL / width, CELL / height))
            axes.imshow(cells[i].image, interpolation="nearest")
            axes.set_aspect("equal", adjustable="datalim")  # the cell keeps its shape, beside the image it is empty
            axes.set(xticks=[], yticks=[], frame_on=False)
            axes.set_xlabel(cells[i].below, fontsize=SMALL, labelpad=2)
            if i == 0:
                axes.set_title(name, fontsize=SIZE)
            if j == 0:
                axes.set_ylabel(label, parse_math=False, rotation=0, ha="right", va="center", fontsize=SIZE)
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
