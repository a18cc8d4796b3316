"""How well the order of training mixes the classes: shards that were written class by class show few at a time."""

from __future__ import annotations

import numpy as np

from pipelines.opened import OPEN
from pipelines.order import REPLACE, Ints, Order, philox
from pipelines.shards import ShardSet

BATCH, SHUFFLE_SHARDS = 128, 16  # what training takes if nobody says otherwise
TRIED, BATCHES = 4, 4  # places in an epoch, and batches at each
POOR, GOOD = 0.8, 0.9  # parts of the classes that a full shuffle shows: less is told, more is a remedy
MOST = 10**7  # samples in a block of shards: more take seconds and hundreds of megabytes to shuffle


def classes_per_batch(shards: ShardSet, batch: int, shuffle_shards: int, seed: int = 0) -> tuple[float, float]:
    """Different classes in a batch under the order of training, and under a full shuffle: means of a few batches of the
    first epoch. Raises ShardError.

    Args:
        batch: the global batch, in samples.
        shuffle_shards: samples are shuffled inside blocks of this many shards.
    """
    random = np.random.Generator(philox(seed, 0, REPLACE))
    drawn = [
        random.choice(len(shards), min(batch, len(shards)), replace=False, shuffle=False)
        for _ in range(TRIED * BATCHES)
    ]
    return _in_order(shards, batch, shuffle_shards, seed), _classes(shards, drawn)


def advice(shards: ShardSet) -> str:
    """What to do about a set whose shards hold class after class, in one sentence; empty if there is nothing to do."""
    ours, full = classes_per_batch(shards, BATCH, SHUFFLE_SHARDS)
    if ours > POOR * full:
        return ""
    wider, count = SHUFFLE_SHARDS, len(shards.names)
    most = min(count, OPEN)  # of a wider block, tars would be opened again and again
    while wider < most and (wider := min(2 * wider, most)) * len(shards) <= MOST * count:
        if wider == count or _in_order(shards, BATCH, wider, 0) >= GOOD * full:
            remedy = f"train with --data.shuffle_shards {wider}"
            break
    else:
        remedy = "pack it anew from the images, or shuffle the samples across the shards with the tool that wrote them"
    return (
        f"{shards.directory} is sorted by class: a batch of {BATCH} would show {ours:.0f} classes, and {full:.0f} in a "
        f"full shuffle: {remedy}"
    )


def _in_order(shards: ShardSet, batch: int, shuffle_shards: int, seed: int) -> float:
    """Classes in a batch of the training's order."""
    size = min(batch, len(shards))
    order = Order(shards.shard_samples, seed, shuffle_shards)
    # Not at the ends: the last block of shards may be a short one.
    stretch = min(BATCHES, len(shards) // size) * size
    starts = [(2 * i + 1) * (len(shards) - stretch) // (2 * TRIED) for i in range(TRIED)]
    stretches = [order.samples(0, start, start + stretch) for start in starts]
    return _classes(shards, [samples for long in stretches for samples in np.split(long, stretch // size)])


def _classes(shards: ShardSet, batches: list[Ints]) -> float:
    return float(np.mean([len(np.unique(shards.labels(samples))) for samples in batches]))
