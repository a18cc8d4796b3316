"""Exact validation: every image once, at any world size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dist_train.ranks.world import World
from pipelines.loader import Loader


@dataclass(frozen=True)
class Scores:
    """Errors as fractions of 1, mean cross-entropy in nats, and of how many samples."""

    top1_error: float
    top5_error: float
    loss: float
    samples: int


def validate(
    model: nn.Module, loader: Loader, world: World, autocast: torch.autocast, each: Callable[[], None]
) -> Scores:
    """Top-1 and top-5 error of `model` over all images of `loader`, the same on all ranks.

    Counts are integers and are reduced once; where the towers are on two ranks, one of these counts. `each` is called
    after every batch, on all ranks alike.
    """
    counts = torch.zeros(3, dtype=torch.int64, device=world.device)
    total = torch.zeros(1, dtype=torch.float64, device=world.device)
    full = -(-loader.batch // loader.size)
    model.eval()
    with torch.inference_mode():
        for batch in loader.epoch():
            if n := len(batch.labels):
                inputs = F.pad(batch.inputs.to(world.device), (0, 0) * 3 + (0, full - n))  # one shape, compiled once
                with autocast:
                    logits = model(inputs)[:n].float()
                labels = batch.labels.to(world.device)
                counts += _correct(logits, labels)
                total += F.cross_entropy(logits, labels, reduction="sum")
            each()
    model.train()
    counts, total = counts * world.counts, total * world.counts
    for work in (world.reduce(counts), world.reduce(total)):
        if work:
            work.wait()
    top1, top5, images = (int(v) for v in counts)
    return Scores(1 - top1 / images, 1 - top5 / images, float(total) / images, images)


def _correct(logits: Tensor, labels: Tensor) -> Tensor:
    """How many labels are the first, how many among the first five, and how many there are: int64 [3]."""
    hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    return torch.stack([hits[:, 0].sum(), hits.sum(), hits.new_tensor(len(labels), dtype=torch.int64)])
