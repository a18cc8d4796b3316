"""A picture of what the net is shown: originals beside their augmented versions."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from pipelines.augment import Augment
from pipelines.loader import Loader
from pipelines.shards import ShardSet

VERSIONS = 5  # of each image
INCHES = 1.3  # a cell


def draw(directory: Path, out: Path, *, resize: int, crop: int, rows: int, seed: int) -> None:
    """Draw `rows` random images, of different classes where possible, each beside five augmented versions of it.

    The versions come from the training loader. Lighting is kept and the mean is put back, so colours are those that the
    net sees; levels are cut to 0..255. Raises ShardError.
    """
    shards = ShardSet(directory)
    rows = min(rows, len(shards))
    loader = Loader(shards, Augment(resize, crop), shards.manifest, batch=rows, training=True, seed=seed)
    candidates = loader.order.samples(0, 0, len(shards))
    first = np.unique(shards.index["label"][candidates], return_index=True)[1]  # of each class
    chosen = np.concatenate([candidates[np.sort(first)], np.delete(candidates, first)])[:rows]
    loader.choose(chosen)
    columns = [[np.asarray(Image.open(BytesIO(shards.read(int(k)).tobytes())).convert("RGB")) for k in chosen]]
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
        name, (height, width) = shards.classes[shards.index["label"][chosen[i]]], columns[0][i].shape[:2]
        row[0].set_ylabel(f"{name}\n{width}x{height}", rotation=0, ha="right", va="center")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, format="png", dpi=120)
