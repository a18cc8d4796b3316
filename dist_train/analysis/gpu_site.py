"""Where a part of the GPU report works: on how many GPUs, and on which images."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from pipelines.augment import Augment
from pipelines.misc import cpus
from pipelines.pack import Options, pack
from pipelines.shards import ShardSet
from pipelines.sources import Item

LARGEST = 512  # images of a rank's batch


class Site(NamedTuple):
    """All sizes follow from it.

    Attributes:
        folder: for files, the same for all parts.
        data: a training set; None: images are drawn.
        gpus: that torch can use.
        deadline: of the part, on the monotonic clock.
    """

    folder: Path
    data: Path | None
    gpus: int
    deadline: float = float("inf")

    @property
    def augment(self) -> Augment:
        """The paper's, or a small one for a machine without a GPU."""
        return Augment() if self.gpus else Augment(resize=72, crop=67)

    def images(self) -> Path:
        """The shard set to decode, which is made if need be: enough for the largest batch."""
        if self.data:
            return self.data
        source = Photographs(LARGEST * self.gpus, (500, 375)) if self.gpus else Photographs(256, (100, 75))
        options = Options(shorter_side=self.augment.resize)
        pack(source, self.folder / "images", options, split="train", workers=cpus())
        return self.folder / "images"

    def opened(self) -> ShardSet:
        """The same, opened."""
        return ShardSet(self.images())


@dataclass
class Photographs:
    """A source for `pack`: smooth images with some grain, as a camera's, each drawn when it is loaded.

    Attributes:
        count: of the images.
        size: width and height in pixels.
    """

    count: int
    size: tuple[int, int]
    classes: list[str] = field(default_factory=lambda: [str(k) for k in range(10)])
    rejected: list[dict[str, str]] = field(default_factory=list)

    @property
    def items(self) -> list[Item]:
        return [Item(str(i), i, i % len(self.classes)) for i in range(self.count)]

    def load(self, reference: int) -> Image.Image:
        rng = np.random.default_rng(reference)
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
        smooth = np.asarray(coarse.resize(self.size, Image.Resampling.BICUBIC), np.int16)
        return Image.fromarray((smooth + rng.integers(-6, 7, smooth.shape, np.int8)).clip(0, 255).astype(np.uint8))
