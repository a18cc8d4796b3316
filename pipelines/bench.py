"""The speed of the loader alone."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.augment import Augment
from pipelines.loader import Loader, Read
from pipelines.manifest import ShardError
from pipelines.mixing import classes_per_batch
from pipelines.plan import TrainingPlan
from pipelines.shards import ShardSet

MEASURED = 4096  # at most, to measure
BATCH = 128  # images, if the set has enough of them
WARM_UP = 8  # batches: as many as the loader is ahead by, so that the pace is steady when the clock starts


def measure(directory: Path, *, resize: int, crop: int, batch: int, read_ms: float) -> str:
    """Three lines: images/s and CPU us/image, and the number of resized images, of the last MEASURED or fewer of an
    epoch after a warm-up; and the mean number of classes per batch.

    Args:
        batch: images per batch; 0: BATCH, or as many as give a small set enough batches to measure.

    Raises ShardError.
    """
    shards = ShardSet(directory)
    batch = batch or max(1, min(BATCH, len(shards) // (2 * WARM_UP)))

    def read(sample: int) -> NDArray[np.uint8]:
        time.sleep(read_ms / 1000)
        return shards.read(sample)

    plan = TrainingPlan(shards, Augment(resize, crop), shards.manifest)
    loader = Loader(plan, shards.manifest, batch=batch, reading=Read(read=read if read_ms else None))
    if loader.steps < 2 * WARM_UP:
        remedy = "give a smaller --batch" if batch > 1 else "that is too few to measure"
        raise ShardError(f"{directory} has {len(shards)} samples, not {2 * WARM_UP} batches of {batch}: {remedy}")
    measured = max(MEASURED // batch, WARM_UP)
    batches = loader.epoch(0, max(0, loader.steps - measured - WARM_UP))
    for _ in range(WARM_UP):
        next(batches)
    wall, cpu = time.perf_counter(), time.process_time()
    samples = np.concatenate([data.samples for data in batches])
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    images, scaled = len(samples), int((shards.sizes(samples).min(axis=1) != resize).sum())
    speed = f"{images / wall:.0f} images/s, {cpu / images * 1e6:.0f} CPU us/image"
    speed += f", {read_ms:g} ms added to each read" if read_ms else ""
    path = f"{scaled} of the {images} measured images were" if loader.resizing else "no image had to be"
    ours, full = classes_per_batch(shards, batch, plan.order.shuffle_shards)
    mixed = f"{ours:.1f} classes in a batch of {batch}; {full:.1f} after a full shuffle"
    return f"{speed}\n{path} resized to shorter side {resize}\n{mixed}"
