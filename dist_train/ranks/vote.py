"""What the ranks agree on at a step, and how training can end by it."""

from __future__ import annotations

from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor


class Stopped(Exception):
    """A stop was asked for, and the state is saved."""


class Diverged(Exception):
    """A loss or a gradient is not finite; the weights were not touched by it."""


class NotSaved(Exception):
    """The last save failed, and so did another try."""


class BadData(Exception):
    """More samples than allowed cannot be decoded."""


class Agreed(NamedTuple):
    """What one small all-reduce at each step carries; sums over the ranks."""

    loss: float
    wrong: float
    refused: float
    stop: float
    due: float
    superseded: float
    bad: float


class Pending(NamedTuple):
    """An all-reduce under way, and the step that it belongs to."""

    values: Tensor
    work: dist.Work | None
    epoch: int
    step_in_epoch: int
    step: int
    lr: float

    def read(self) -> Agreed:
        if self.work:
            self.work.wait()
        return Agreed(*self.values.tolist())
