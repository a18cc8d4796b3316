"""Order of the samples in an epoch.

An epoch is a permutation of all samples, determined by (seed, epoch) alone. Shards are permuted, then
samples inside blocks of a few shards, so reads stay near-sequential on disks that need it and a billion samples
need no billion-entry array. Ranks take their shares of a global batch by integer division, so the
global batch need not divide by the number of ranks.
"""

from __future__ import annotations

from functools import lru_cache
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

# Streams of random words, independent of each other for the same (seed, epoch).
SHARDS, SAMPLES, VIEWS, PACK, REPLACE = range(5)


def philox(seed: int, epoch: int, stream: int | str, index: int = 0) -> np.random.Philox:
    """A counter-based generator determined by its arguments alone. `stream`: one of those above, or any name.

    `random_raw` and `advance` of Philox4x64 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3") are stable
    across numpy versions, which the distributions of `Generator` are not (numpy's NEP 19).
    """
    stream = stream if isinstance(stream, int) else 1 << 32 | crc32(stream.encode())  # apart from those above
    return np.random.Philox(key=np.array([seed, epoch], np.uint64), counter=np.array([0, index, stream, 0], np.uint64))


def permutation(n: int, seed: int, epoch: int, stream: int, index: int = 0) -> Ints:
    """A permutation of `range(n)`, int64, determined by the arguments alone."""
    return np.argsort(philox(seed, epoch, stream, index).random_raw(n), kind="stable")


def even_split(n: int, index: int, parts: int) -> tuple[int, int]:
    """Part `index` of `range(n)` split into `parts`: half-open, contiguous; sizes differ by at most one."""
    return n * index // parts, n * (index + 1) // parts


class Order:
    """Order of the samples of a shard set in every epoch.

    Args:
        shard_samples: number of samples of each shard, in the order of the manifest.
        seed: of the run.
        shuffle_shards: samples are shuffled inside blocks of this many (permuted) shards.
    """

    def __init__(self, shard_samples: Ints, seed: int, shuffle_shards: int) -> None:
        self.sizes = np.asarray(shard_samples, np.int64)
        self.starts = np.cumsum(self.sizes) - self.sizes
        self.seed = seed
        self.shuffle_shards = shuffle_shards
        self._shards = lru_cache(2)(self._permute_shards)
        self._block = lru_cache(3)(self._permute_block)

    def __len__(self) -> int:
        return int(self.sizes.sum())

    def samples(self, epoch: int, start: int, stop: int) -> Ints:
        """Sample numbers (rows of the index) at positions [start, stop) of an epoch, int64 of shape [stop - start]."""
        _, edges = self._shards(epoch)
        first, last = np.searchsorted(edges, [start, stop - 1], side="right") - 1
        pieces = [
            self._block(epoch, int(b))[max(start - edges[b], 0) : stop - edges[b]] for b in range(first, last + 1)
        ]
        return np.concatenate(pieces) if start < stop else np.empty(0, np.int64)

    def shards(self, epoch: int, start: int, stop: int) -> Ints:
        """Numbers of the shards in the blocks that positions [start, stop) of an epoch lie in, in their order."""
        shards, edges = self._shards(epoch)
        first, end = np.searchsorted(edges, start, side="right") - 1, np.searchsorted(edges, stop)
        return shards[first * self.shuffle_shards : end * self.shuffle_shards]

    def _permute_shards(self, epoch: int) -> tuple[Ints, Ints]:
        """Permuted shard numbers, and the position in the epoch at which each block of shards begins."""
        shards = permutation(len(self.sizes), self.seed, epoch, SHARDS)
        ends = np.concatenate([[0], np.cumsum(self.sizes[shards])])
        return shards, ends[:-1][:: self.shuffle_shards]

    def _permute_block(self, epoch: int, block: int) -> Ints:
        shards = self._shards(epoch)[0][block * self.shuffle_shards : (block + 1) * self.shuffle_shards]
        samples = np.concatenate([self.starts[s] + np.arange(self.sizes[s]) for s in shards])
        return samples[permutation(len(samples), self.seed, epoch, SAMPLES, block)]
