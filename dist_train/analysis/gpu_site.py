"""GPUs and images of a part of the GPU report."""

from __future__ import annotations

from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import webdataset
from PIL import Image, JpegImagePlugin

from pipelines.augment import Augment
from pipelines.indexing import index
from pipelines.misc import cpus
from pipelines.pack import Options, pack
from pipelines.pillow import opened
from pipelines.sources import Item, Source

LARGEST = 512  # images of a rank's batch
KINDS = (("RGB", "4:2:0"), ("RGB", "4:2:0"), ("RGB", "4:4:4"), ("L", "4:4:4"))  # mode and subsampling of drawn images


class Site(NamedTuple):
    """Place and resources of a part; all sizes follow from them.

    Attributes:
        folder: for files; all parts share it.
        data: a training set; None for generated images.
        gpus: number that torch can use.
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
        """Shard set to decode, made if need be, with enough images for the largest batch."""
        if self.data:
            return self.data
        source = Photographs(LARGEST * self.gpus, (500, 375)) if self.gpus else Photographs(256, (100, 75))
        options = Options(shorter_side=self.augment.resize)
        pack(source, self.folder / "images", options, split="train", workers=cpus())
        return self.folder / "images"

    def mixed(self) -> Path:
        """Shard set of images with different chroma subsampling, made if need be; `data` as it is."""
        if self.data:
            return self.data
        directory, side = self.folder / "mixed", self.augment.resize
        if not directory.exists():
            directory.mkdir()
            source = Photographs(512 if self.gpus else 128, (side * 4 // 3, side))
            # Not packed: that would make RGB of the grey ones.
            with open(directory / "shard-000000.tar", "wb") as file, webdataset.TarWriter(file, mtime=0) as tar:
                for i, (name, reference, label) in enumerate(source.items):
                    jpeg = BytesIO()
                    mode, subsampling = KINDS[i % len(KINDS)]
                    source.load(reference).convert(mode).save(jpeg, "JPEG", quality=90, subsampling=subsampling)
                    tar.write({"__key__": f"{name:0>6}", "jpg": jpeg.getvalue(), "cls": str(label).encode()})
            index(directory, classes=source.classes, split="train", workers=1)
        return directory


def halves_chroma(data: bytes) -> bool:
    """Whether these are the bytes of a JPEG with colour at half the resolution in both directions (4:2:0)."""
    image = opened(data)
    return image.format == "JPEG" and JpegImagePlugin.get_sampling(image) == 2


@dataclass
class Photographs(Source):
    """A source for `pack`: smooth images with some grain, as a camera's, each drawn when it is loaded.

    Attributes:
        count: number of images.
        size: width and height in pixels.
    """

    count: int
    size: tuple[int, int]
    classes: list[str] = field(default_factory=lambda: [str(k) for k in range(10)])

    @property
    def items(self) -> list[Item]:
        return [Item(str(i), i, i % len(self.classes)) for i in range(self.count)]

    def load(self, reference: int) -> Image.Image:
        rng = np.random.default_rng(reference)
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
        smooth = np.asarray(coarse.resize(self.size, Image.Resampling.BICUBIC), np.int16)
        return Image.fromarray((smooth + rng.integers(-6, 7, smooth.shape, np.int8)).clip(0, 255).astype(np.uint8))
