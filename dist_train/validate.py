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
from pipelines.loader import Loader
from pipelines.misc import ceil_div
from pipelines.opened import ReadError


@dataclass(frozen=True)
class Scores:
    """Errors as fractions of 1, mean cross-entropy in nats, and of how many samples."""

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
    unread: list[ReadError],
) -> Scores:
    """Top-1 and top-5 error of `model` over all images of `loader`, the same on all ranks.

    Counts are integers and are summed once; where the towers are on two ranks, one of these counts. `after_batch` is
    called after every batch, on all ranks alike; `unread` is as for `Loader.epoch`.
    """
    counts = torch.zeros(3, dtype=torch.int64, device=world.device)
    total = torch.zeros(1, dtype=torch.float64, device=world.device)
    full = ceil_div(loader.batch, loader.dp_size)
    model.eval()
    with torch.inference_mode():
        for batch in loader.epoch(unread=unread):
            if n := len(batch.labels):
                with autocast:
                    logits = model(padded(batch.inputs, full))[:n].float()
                counts += _hits(logits, batch.labels)
                total += F.cross_entropy(logits, batch.labels, reduction="sum")
            after_batch()
    model.train()
    if not world.counted:
        counts, total = torch.zeros_like(counts), torch.zeros_like(total)
    world.sum(counts, total)
    top1, top5, images = (int(v) for v in counts)
    return Scores(1 - top1 / images, 1 - top5 / images, float(total) / images, images)


def padded(inputs: Tensor, n: int) -> Tensor:
    """The inputs [m, ...] and zeros behind them, [n, ...]: all batches have one shape, so that a net is compiled once
    and a sample's result does not hang on the size of its batch."""
    missing = n - len(inputs)
    return F.pad(inputs, (0, 0, 0, 0, 0, 0, 0, missing))  # of the last dimension first


def chance_error(labels: NDArray[Any]) -> float:
    """The error of a net that always names the most common class."""
    return 1 - int(np.bincount(labels).max()) / len(labels)


def _hits(logits: Tensor, labels: Tensor) -> Tensor:
    """How many labels are the first, how many among the first five, and how many there are: int64 [3]."""
    hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    return torch.stack([hits[:, 0].sum(), hits.sum(), torch.full((), len(labels), device=labels.device)])
