"""Photographs for the measurements: those of PHOTOS=DIR/<class>/<image>, or random ones."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from pipelines.misc import cpus
from pipelines.pack import Options, pack
from pipelines.shards import ShardSet
from pipelines.sources import ImageFolder

COUNT, SIDE, QUALITY = 3200, 256, 90


class Photographs(NamedTuple):
    """The same images three times.

    Attributes:
        originals: a folder with a sub-folder for each class.
        stored: such a folder, all images of which are JPEGs with a shorter side of 256.
        packed: a shard set of them at 256.
    """

    originals: Path
    stored: Path
    packed: Path


def originals_of(root: Path) -> Path:
    """The folder of originals below `root`, made or taken from PHOTOS; at most COUNT of them, evenly from all."""
    originals = root / "originals"
    if "PHOTOS" in os.environ:
        source = ImageFolder(Path(os.environ["PHOTOS"]).resolve())
        for item in source.items[:: -(-len(source.items) // COUNT)]:
            place = originals / source.classes[item.label] / Path(item.name).name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(source.root / item.reference)
    else:
        _random(originals / "all")
    return originals


def photographs(root: Path) -> Photographs:
    """All three, below `root`."""
    originals, stored, packed = originals_of(root), root / "if256", root / "packed"
    pack(ImageFolder(originals), packed, Options(SIDE, QUALITY), split="train", workers=cpus())
    shards = ShardSet(packed)
    labels = shards.index["label"]
    for sample in range(len(shards)):
        place = stored / shards.classes[int(labels[sample])] / f"{sample}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        data = shards.read(sample).tobytes()
        image = Image.open(io.BytesIO(data))
        if min(image.size) < SIDE:  # a plain script cannot crop it otherwise
            wanted = [max(SIDE, round(side * SIDE / min(image.size))) for side in image.size]
            image.resize((wanted[0], wanted[1]), Image.Resampling.BILINEAR).save(place, quality=QUALITY)
        else:
            place.write_bytes(data)
    return Photographs(originals, stored, packed)


def _random(folder: Path) -> None:
    """Random photographs of 400 x 300 pixels."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for i in range(COUNT):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
        coarse.resize((400, 300), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg", quality=92)
