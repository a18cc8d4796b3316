"""Plans: the sample at each position of an epoch, and how it is shown to the net.

Both depend on the position alone, not on the rank or on earlier steps, so they are the same at any world size and after
any restart. The loader reads, decodes and delivers what a plan says.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Set

import numpy as np

from pipelines.augment import Augment, Views, fixed_views, random_views, without_chance
from pipelines.manifest import Manifest, ShardError
from pipelines.misc import ceil_div
from pipelines.order import REPLACE, Ints, Order, philox
from pipelines.shards import ShardSet


class Plan(ABC):
    """Samples of an epoch, in order, and their views.

    Args:
        shards: the data.
        augment: how images become inputs.
        seed: seed of everything random, including the substitutes of bad samples.
    """

    def __init__(self, shards: ShardSet, augment: Augment, seed: int) -> None:
        self.shards, self.augment, self.seed = shards, augment, seed

    @abstractmethod
    def __len__(self) -> int:
        """Number of positions in an epoch."""

    @abstractmethod
    def steps(self, batch: int) -> int:
        """Number of global batches, of at most `batch` samples each, in an epoch."""

    @abstractmethod
    def samples(self, epoch: int, start: int, stop: int) -> Ints:
        """Sample numbers at positions [start, stop) of an epoch, int64 [stop - start]: a new array."""

    @abstractmethod
    def tars(self, epoch: int, start: int, stop: int) -> Ints:
        """Numbers of the shards of which samples at positions [start, stop) of an epoch are, int64 [n], each once, in
        the order of first need; and of those that are shuffled with them."""

    @abstractmethod
    def views(self, epoch: int, samples: Ints, start: int) -> Views:
        """Views of these samples at positions start, start + 1, ... of an epoch."""

    def substitute(self, epoch: int, position: int, bad: Set[int]) -> int:
        """Returns the sample that replaces a bad one at a position. Raises ShardError if all are bad.

        It depends only on (seed, epoch, position) and the set of bad samples, so it is the same at any world size.
        """
        if len(bad) == len(self.shards):
            raise ShardError(f"no sample of {self.shards.place} can be decoded: pack it again")
        bits = philox(self.seed, epoch, REPLACE, position)
        while (sample := int(bits.random_raw() % len(self.shards))) in bad:
            pass
        return sample


class TrainingPlan(Plan):
    """Each sample at most once per epoch, shuffled and augmented at random; the incomplete last batch is dropped.

    Args:
        statistics: the manifest of the training set, for lighting.
        shuffle_shards: samples are shuffled inside blocks of this many shards.
    """

    def __init__(
        self, shards: ShardSet, augment: Augment, statistics: Manifest, seed: int = 0, shuffle_shards: int = 16
    ) -> None:
        super().__init__(shards, augment, seed)
        self.order = Order(shards.shard_samples, seed, shuffle_shards)
        self.components = np.array(statistics.eigenvectors) * np.array(statistics.eigenvalues)

    def __len__(self) -> int:
        return len(self.shards)

    def steps(self, batch: int) -> int:
        return len(self) // batch

    def samples(self, epoch: int, start: int, stop: int) -> Ints:
        return self.order.samples(epoch, start, stop)

    def tars(self, epoch: int, start: int, stop: int) -> Ints:
        return self.order.shards(epoch, start, stop)

    def views(self, epoch: int, samples: Ints, start: int) -> Views:
        sizes = self.shards.sizes(samples)
        return random_views(sizes, self.augment, self.components, seed=self.seed, epoch=epoch, start=start)


class FixedPlan(Plan):
    """Every sample once, in order, all in the same view: for validation and for inspecting a trained net.

    Args:
        view: number of one of the ten `fixed_views`, 0 (the centre) to 9.
        samples: the samples to show, int64 [n]; None: all but the quarantined ones, which are not replaced.
        seed: seed of the substitutes of bad samples.
    """

    def __init__(
        self, shards: ShardSet, augment: Augment, view: int = 0, samples: Ints | None = None, seed: int = 0
    ) -> None:
        super().__init__(shards, without_chance(augment), seed)
        self.view = view
        self.shown = shards.good if samples is None else samples

    def __len__(self) -> int:
        return len(self.shown)

    def steps(self, batch: int) -> int:
        return ceil_div(len(self), batch)

    def samples(self, epoch: int, start: int, stop: int) -> Ints:
        return self.shown[start:stop].copy()

    def tars(self, epoch: int, start: int, stop: int) -> Ints:
        found, first = np.unique(self.shards.shards_of(self.shown[start:stop]), return_index=True)
        return found[np.argsort(first)]

    def views(self, epoch: int, samples: Ints, start: int) -> Views:
        return fixed_views(self.shards.sizes(samples), self.augment, self.view)

    def substitute(self, epoch: int, position: int, bad: Set[int]) -> int:
        return super().substitute(self.view, position, bad)  # its own substitutes per view
