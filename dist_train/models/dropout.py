"""Dropout with masks that are functions of (seed, step, position, unit)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

_LOW = 0xFFFFFFFF


def mask_keys(seed: int, step: int, positions: NDArray[np.int64]) -> Tensor:
    """One 32-bit key per sample of a batch, int64 [n], hashed from (seed, step, position) by SplitMix64."""
    with np.errstate(over="ignore"):
        key = _splitmix(_splitmix(np.uint64(seed)) ^ np.uint64(step))
        keys = _splitmix(key ^ positions.astype(np.uint64)) >> np.uint64(32)
    return torch.from_numpy(keys.astype(np.int64))


def keys_of_epoch(seed: int, first: int) -> Callable[[int, NDArray[np.int64]], NDArray[np.int64]]:
    """Key function for `Loader.epoch`, for an epoch whose first step is step `first` of the run."""
    return lambda step, positions: mask_keys(seed, first + step, positions).numpy()


def rank_seed(seed: int, step: int, dp_rank: int) -> int:
    """Seed for torch's own generator on a data-parallel rank at a step, for nets that bring their own dropout."""
    return int(mask_keys(seed, step, np.array([dp_rank]))[0])


def _splitmix(x: np.uint64 | NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Steele, Lea, Flood: Fast splittable pseudorandom number generators (2014)."""
    z = np.atleast_1d(x) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(z ^ (z >> np.uint64(31)))


def mix(h: Tensor) -> Tensor:
    """A bijection of 32-bit numbers in int64 with little bias (hash-prospector's 16-21f0aaad-15-735a2d97-15); the
    factors are below 2^31, so no product overflows int64."""
    h = ((h ^ (h >> 16)) * 0x21F0AAAD) & _LOW
    h = ((h ^ (h >> 15)) * 0x735A2D97) & _LOW
    return h ^ (h >> 15)


class Dropout(nn.Module):
    """ "setting to zero the output of each hidden neuron with probability 0.5" (section 4.2), by hashed masks: a sample
    gets the same mask at any world size and after any restart.

    Args:
        p: probability of a zero.
        layer: number of this layer, so that layers have independent masks.
        scaling: test: "at test time, we use all the neurons but multiply their outputs by 0.5" (1 - p), as in the
            paper; training: kept outputs are divided by 1 - p in training, as is usual today. Either form can express
            the other with different weights, but the two start, and learn, differently.
    """

    def __init__(self, p: float, layer: int, scaling: Literal["test", "training"] = "test") -> None:
        super().__init__()
        self.p, self.layer, self.scaling = p, layer, scaling

    def forward(self, x: Tensor, keys: Tensor | None, first: int = 0) -> Tensor:
        """Masked x. x: [n, units], whose first unit is number `first` of the layer; keys: from `mask_keys`, int64 [n],
        needed in training."""
        if self.p == 0:
            return x
        if not self.training:
            return x * (1 - self.p) if self.scaling == "test" else x
        assert keys is not None
        # Derived each time, which costs nothing beside the masks: DDP would broadcast a buffer at every step.
        units = torch.arange(first, first + x.shape[1], device=x.device)
        kept = mix(mix(units + (self.layer << 24)) ^ keys[:, None]) >= int(self.p * 2**32)
        return x * kept if self.scaling == "test" else x * kept / (1 - self.p)
