"""Exact validation: every image once, at any world size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from dist_train.ranks.world import World
from dist_train.rundir.confusion import MOST, Confusion
from pipelines.loader import Loader, Unreadable
from pipelines.misc import ceil_div


@dataclass(frozen=True)
class Scores:
    """Errors as fractions of 1, mean cross-entropy in nats, and the number of samples."""

    top1_error: float
    top5_error: float
    loss: float
    samples: int


def validate(
    model: nn.Module,
    loader: Loader,
    world: World,
    autocast: torch.autocast,
    after_batch: Callable[[], None],
    unread: Unreadable,
) -> tuple[Scores, Confusion]:
    """Scores of `model` over all images of `loader`, and its confusion matrix, the same on all ranks.

    Counts are integers and are summed once; if the two towers are on two ranks, only one of them counts. `after_batch`
    is called after every batch, on all ranks alike; `unread` is as for `Loader.epoch`.
    """
    tally = Tally(len(loader.shards.classes), world.device)
    total = torch.zeros(1, dtype=torch.float64, device=world.device)
    full = ceil_div(loader.batch, loader.dp_size)
    model.eval()
    with torch.inference_mode():
        for batch in loader.epoch(unread=unread):
            if n := len(batch.labels):
                with autocast:
                    logits = model(padded(batch.inputs, full))[:n].float()
                tally.add(logits, batch.labels)
                total += F.cross_entropy(logits, batch.labels, reduction="sum")
            after_batch()
    model.train()
    if not world.counted:
        tally.counts.zero_()
        total.zero_()
    world.sum(tally.counts, total)
    found = tally.found()
    top1, top5, images = (int(values.sum()) for values in (found.top1, found.top5, found.samples))
    return Scores((images - top1) / images, (images - top5) / images, float(total) / images, images), found


class Tally:
    """Counts of a validation, in one tensor on the device, for which nothing waits.

    Attributes:
        counts: one row per class, flat, int64. The first columns count its images by the most probable output: one
            column per class and one for outputs that are no class; above MOST classes, only right and wrong. The last
            column counts the images whose label is among the five most probable.
    """

    def __init__(self, classes: int, device: torch.device) -> None:
        self._classes, self._pairs = classes, classes <= MOST
        self._columns = (classes + 1 if self._pairs else 2) + 1
        self.counts = torch.zeros(classes * self._columns, dtype=torch.int64, device=device)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Counts a batch: logits [n, outputs], labels int64 [n]."""
        top = logits.topk(min(5, logits.shape[1])).indices
        first, among = top[:, 0], (top == labels[:, None]).any(1).long()
        column = first.clamp(max=self._classes) if self._pairs else (first != labels).long()
        row = labels * self._columns
        places = torch.cat([row + column, row + self._columns - 1])
        self.counts.index_add_(0, places, torch.cat([torch.ones_like(among), among]))

    def found(self) -> Confusion:
        """The counts so far; waits for the device."""
        table = self.counts.view(self._classes, self._columns).cpu().numpy()
        taken, top5 = table[:, :-1], table[:, -1]
        top1 = taken.diagonal() if self._pairs else taken[:, 0]
        label, predicted = np.nonzero(taken if self._pairs else taken[:0])
        return Confusion(taken.sum(1), top1, top5, label, predicted, taken[label, predicted])


def padded(inputs: Tensor, n: int) -> Tensor:
    """The inputs [m, ...] padded with zeros to [n, ...]: all batches have one shape, so that a net is compiled once and
    a sample's result does not depend on the size of its batch."""
    missing = n - len(inputs)
    return F.pad(inputs, (0, 0, 0, 0, 0, 0, 0, missing))  # of the last dimension first


def chance_error(labels: NDArray[Any]) -> float:
    """Error of a net that always names the most common class."""
    return (len(labels) - int(np.bincount(labels).max())) / len(labels)
