"""What the ranks agree on at a step: one small all-reduce, read one step later."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dist_train.ranks.world import World


class Vote(NamedTuple):
    """What the ranks say at a step, summed over all of them. What a rank does not say counts as 0.

    Attributes:
        loss: sum of the samples' cross-entropy, nats.
        wrong: samples whose most probable class is not the right one.
        refused: ranks that found a gradient that is not finite, and left the weights as they are.
        stop: ranks that a stop signal has come to.
        save: 1 if a save is due by the clock, which rank 0 looks at for all.
        lost: 1 if a later start has taken over the run directory, which rank 0 finds out.
        bad: samples that could not be decoded, and were replaced.
    """

    loss: float = 0.0
    wrong: float = 0.0
    refused: float = 0.0
    stop: float = 0.0
    save: float = 0.0
    lost: float = 0.0
    bad: float = 0.0

    @staticmethod
    def cast(world: World, **says: float | Tensor) -> PendingVote:
        """Begin the all-reduce of what this rank says, by the names above: numbers, or scalars on the device.
        Raises TypeError for another name."""
        # One copy carries the plain numbers to the device, where the scalars take their places: nothing is waited for.
        plain = Vote(**{name: 0.0 if isinstance(value, Tensor) else float(value) for name, value in says.items()})
        values = torch.tensor(plain, dtype=torch.float64).to(world.device)
        for name, value in says.items():
            if isinstance(value, Tensor):
                values[Vote._fields.index(name)] = value
        return PendingVote(values, world.reduce(values))


class PendingVote(NamedTuple):
    """A vote whose all-reduce is under way."""

    values: Tensor
    work: dist.Work | None

    def read(self) -> Vote:
        """Wait for the sums."""
        if self.work:
            self.work.wait()
        return Vote(*self.values.tolist())
