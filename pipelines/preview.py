"""A picture of what the net is shown: originals beside their augmented versions."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from pipelines.augment import Augment
from pipelines.dali import Loader
from pipelines.order import Ints
from pipelines.shards import ShardSet

VERSIONS = 5  # of each image
INCHES = 1.3  # a cell


class Chosen(Loader):
    """A loader of one rank that shows the samples it is told to, the same ones in every epoch. In training it shows
    them in that epoch's way."""

    chosen: Ints

    def choose(self, samples: Ints) -> None:
        """From now on an epoch is these `samples` (rows of the index, int64 [n]), in this order."""
        self.chosen, self.steps = samples, -(-len(samples) // self.batch)

    def samples(self, epoch: int, step: int) -> tuple[Ints, int]:
        first = step * self.batch
        return self.chosen[first : first + self.batch].copy(), first


def draw(directory: Path, out: Path, *, resize: int, crop: int, rows: int, seed: int) -> None:
    """Draw `rows` random images, of different classes where possible, each beside five augmented versions of it.

    The versions come from the training loader. Lighting is kept and the mean is put back, so colours are those that the
    net sees; levels are cut to 0..255. Raises ShardError.
    """
    shards = ShardSet(directory)
    rows = min(rows, len(shards))
    loader = Chosen(shards, Augment(resize, crop), shards.manifest, batch=rows, training=True, seed=seed)
    candidates = loader.order.samples(0, 0, len(shards))
    first = np.unique(shards.index["label"][candidates], return_index=True)[1]  # of each class
    loader.choose(np.concatenate([candidates[np.sort(first)], np.delete(candidates, first)])[:rows])
    columns = [[np.asarray(Image.open(BytesIO(shards.read(int(k)).tobytes())).convert("RGB")) for k in loader.chosen]]
    for epoch in range(VERSIONS):
        batch = next(loader.epoch(epoch))
        levels = batch.inputs.permute(0, 2, 3, 1).numpy() + loader.mean
        columns.append(list(np.rint(levels).clip(0, 255).astype(np.uint8)))

    figure = Figure(figsize=(INCHES * (len(columns) + 1), INCHES * rows + 1), layout="constrained")
    figure.suptitle(f"Random {crop}x{crop} crop of images resized to shorter side {resize}, reflection, lighting")
    axes = figure.subplots(rows, len(columns), squeeze=False)
    for i, row in enumerate(axes):
        for j, cell in enumerate(row):
            cell.imshow(columns[j][i], interpolation="nearest")
            cell.set(xticks=[], yticks=[], frame_on=False)
            if i == 0:
                cell.set_title(f"epoch {j}" if j else "original", fontsize="medium")
        name, (height, width) = shards.classes[shards.index["label"][loader.chosen[i]]], columns[0][i].shape[:2]
        row[0].set_ylabel(f"{name}\n{width}x{height}", rotation=0, ha="right", va="center")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, format="png", dpi=120)
