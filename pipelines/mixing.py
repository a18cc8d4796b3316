"""How well the training order mixes the classes: shards written class by class show only a few of them at a time."""

from __future__ import annotations

import numpy as np

from pipelines.opened import OPEN
from pipelines.order import REPLACE, Ints, Order, philox
from pipelines.shards import ShardSet

BATCH, SHUFFLE_SHARDS = 128, 16  # the defaults of training
TRIED, BATCHES = 4, 4  # places in an epoch, and batches sampled at each
POOR, GOOD = 0.8, 0.9  # fractions of a full shuffle's classes: up to POOR is reported, from GOOD on is a remedy
MOST = 10**7  # samples per block of shards; larger blocks take seconds and hundreds of megabytes to shuffle


def classes_per_batch(shards: ShardSet, batch: int, shuffle_shards: int, seed: int = 0) -> tuple[float, float]:
    """Mean number of distinct classes per batch in the training order and in a full shuffle, over a few batches of the
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
    """Advice in one sentence if the shards of a set are sorted by class; empty if the set mixes well."""
    ours, full = classes_per_batch(shards, BATCH, SHUFFLE_SHARDS)
    if ours > POOR * full:
        return ""
    wider, count = SHUFFLE_SHARDS, len(shards.names)
    most = min(count, OPEN)  # with wider blocks, tars would be closed and reopened all the time
    while wider < most and (wider := min(2 * wider, most)) * len(shards) <= MOST * count:
        if wider == count or _in_order(shards, BATCH, wider, 0) >= GOOD * full:
            remedy = f"train with --data.shuffle_shards {wider}"
            break
    else:
        remedy = "repack it from the images, or shuffle the samples across the shards with the tool that wrote them"
    return (
        f"{shards.directory} is sorted by class: a batch of {BATCH} would show {ours:.0f} classes, against {full:.0f} "
        f"in a full shuffle: {remedy}"
    )


def _in_order(shards: ShardSet, batch: int, shuffle_shards: int, seed: int) -> float:
    """Mean number of distinct classes per batch in the training order."""
    size = min(batch, len(shards))
    order = Order(shards.shard_samples, seed, shuffle_shards)
    # Keep away from the ends: the last block of shards may be short.
    stretch = min(BATCHES, len(shards) // size) * size
    starts = [(2 * i + 1) * (len(shards) - stretch) // (2 * TRIED) for i in range(TRIED)]
    stretches = [order.samples(0, start, start + stretch) for start in starts]
    return _classes(shards, [samples for long in stretches for samples in np.split(long, stretch // size)])


def _classes(shards: ShardSet, batches: list[Ints]) -> float:
    return float(np.mean([len(np.unique(shards.labels(samples))) for samples in batches]))
