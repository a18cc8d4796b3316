"""How fast the loader is, by itself."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.augment import Augment
from pipelines.dali import Loader
from pipelines.shards import ShardSet


def measure(directory: Path, *, resize: int, crop: int, batch: int, read_ms: float) -> str:
    """Run one epoch of at most 4,096 images after a warm-up. Returns a line with images/s and CPU us/image."""
    shards = ShardSet(directory)

    def read(sample: int) -> NDArray[np.uint8]:
        time.sleep(read_ms / 1000)
        return shards.read(sample)

    loader = Loader(shards, Augment(resize, crop), shards.manifest, batch=batch, training=True, read=read)
    first = max(0, loader.steps - 4096 // batch - 4)
    images, wall, cpu = 0, 0.0, 0.0
    for i, data in enumerate(loader.epoch(0, first)):
        if i == 3:
            images, wall, cpu = 0, time.perf_counter(), time.process_time()
        images += len(data.labels)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return f"{images / wall:.0f} images/s, {cpu / images * 1e6:.0f} CPU us/image, {read_ms:g} ms added to each read"
