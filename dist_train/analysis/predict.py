"""The predictions of trained nets, averaged over crops and nets, and what of them is right: exact at any world size."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from dist_train import build
from dist_train.analysis.trained import Trained
from dist_train.ranks.world import World
from pipelines.order import Ints
from pipelines.shards import ShardError

LEFT_OUT, PREDICTED, RANK, RANKS = range(4)  # columns of `predict`'s table; those from RANKS on belong to single runs


def predict(runs: Sequence[Trained], world: World, *, views: int, batch: int) -> Ints:
    """What the runs, and the mean of their softmax outputs over all runs and views, make of every image.

    A rank keeps the float32 probabilities of its own images alone; what all ranks need are integers, which are summed
    once. A forward pass has the same shape at any world size.

    Args:
        views: the first so many of `fixed_views`.
        batch: images of a forward pass.

    Returns:
        int64 [images, 3 + runs], the same on all ranks: whether the image could not be decoded by some run and is left
        out; the output that is the most probable; how many outputs are more probable than the right one; the last for
        each run alone. Of equally probable outputs the first counts as the more probable.

    Raises ShardError, on all ranks, where a tar is not what was indexed, or where no image can be decoded.
    """
    batch = min(batch, len(runs[0].val))
    table = np.zeros((len(runs[0].val), RANKS + len(runs)), np.int64)
    steps = -(-len(table) // (batch * world.size))
    total = steps * views * len(runs)
    hidden = world.rank > 0 or not sys.stderr.isatty()
    failure: Exception | None = None
    try:
        with tqdm(total=total, unit="batch", desc="evaluate", dynamic_ncols=True, disable=hidden) as bar:
            mean = torch.zeros(0, 0)
            own: Ints = np.zeros(0, np.int64)
            for i, run in enumerate(runs):
                own, mine, bad = probabilities(run, world, views, batch, bar.update)
                table[own, LEFT_OUT] |= bad
                table[own, RANKS + i] = _ranks(mine, run.val.index["label"][own])
                mean = _add(mean, mine / len(runs)) if i else mine / len(runs)
            table[own, PREDICTED] = mean.numpy().argmax(axis=1)  # numpy's takes the first of equals
            table[own, RANK] = _ranks(mean, runs[0].val.index["label"][own])
    except (ShardError, OSError) as error:
        failure = error
    if message := world.first_error(failure):
        raise ShardError(message)
    if work := world.reduce(torch.from_numpy(table)):
        work.wait()
    if table[:, LEFT_OUT].all():
        raise ShardError(f"no image of {runs[0].val.directory} can be decoded: pack it anew")
    return table


def probabilities(
    run: Trained, world: World, views: int, batch: int, each: Callable[[], Any]
) -> tuple[Ints, Tensor, NDArray[np.bool_]]:
    """This rank's images, int64 [n]; the mean of their softmax outputs over the views, float32 [n, outputs] on the CPU;
    and whether another image stood for them in some view, bool [n]."""
    config = run.config
    loader = build.build_loader(config, world, run.val, run.train, batch=batch * world.size, training=False)
    precision = build.precision(config, world)
    autocast = torch.autocast(world.device.type, build.PRECISIONS[precision], enabled=precision != "off")
    pieces = [loader.samples(0, step)[0] for step in range(loader.steps)]
    own = np.concatenate(pieces)
    bad = np.zeros(len(own), np.bool_)
    total = torch.zeros(len(own), 1)
    with torch.inference_mode():
        for view in range(views):
            outputs: list[Tensor] = []
            shown: list[Ints] = []
            for images in loader.epoch(view):
                if n := len(images.labels):
                    inputs = F.pad(images.inputs.to(world.device), (0, 0) * 3 + (0, batch - n))
                    with autocast:
                        logits = run.model(inputs)[:n]
                    outputs.append(logits.float().softmax(dim=1).cpu())
                    shown.append(images.samples)
                each()
            if outputs:
                total = total + torch.cat(outputs)
                bad |= np.concatenate(shown) != own
    return own, total / views, bad


def _ranks(probabilities: Tensor, labels: NDArray[Any]) -> Ints:
    """How many outputs come before the right one: int64 [n]. Of equal ones the first comes first, at any world size."""
    p, right = probabilities.numpy(), labels.astype(np.int64)[:, None]
    if not len(p):
        return np.zeros(0, np.int64)
    mine = np.take_along_axis(p, right, axis=1)
    behind = (p < mine) | ((p == mine) & (np.arange(p.shape[1]) >= right))
    before: Ints = (~behind).sum(axis=1)  # so that one that is not a number is never right
    return before


def _add(one: Tensor, two: Tensor) -> Tensor:
    """Sum of probabilities of nets of which one has more outputs than the other."""
    width = max(one.shape[1], two.shape[1])
    return F.pad(one, (0, width - one.shape[1])) + F.pad(two, (0, width - two.shape[1]))


def summarise(table: Ints, runs: Sequence[Trained]) -> dict[str, Any]:
    """All numbers of an evaluation from `predict`'s table: counts, and errors as fractions of 1."""
    classes = runs[0].classes
    kept = table[table[:, LEFT_OUT] == 0]
    labels = runs[0].val.index["label"][table[:, LEFT_OUT] == 0].astype(np.int64)
    samples = np.bincount(labels, minlength=len(classes))
    hits = np.bincount(labels[kept[:, RANK] == 0], minlength=len(classes))
    wrong = np.stack([labels, kept[:, PREDICTED]], axis=1)[kept[:, RANK] > 0]
    pairs, counts = np.unique(wrong, axis=0, return_counts=True)
    return {
        "split": str(runs[0].val.directory),
        "images": len(kept),
        "left_out": len(table) - len(kept),
        **_errors(kept[:, RANK]),
        "runs": [
            {"run": str(run.directory), "checkpoint": run.checkpoint, "step": run.step, "epoch": run.epoch}
            | _errors(kept[:, RANKS + i])
            for i, run in enumerate(runs)
        ],
        "classes": [
            {"class": name, "samples": int(n), "top1_hits": int(h), "top1_error": float(1 - h / n) if n else None}
            for name, n, h in zip(classes, samples, hits, strict=True)
        ],
        "confusions": [
            {"true": classes[pairs[i, 0]], "predicted": _name(classes, int(pairs[i, 1])), "count": int(counts[i])}
            for i in np.argsort(-counts, kind="stable")
        ],
    }


def _errors(ranks: Ints) -> dict[str, Any]:
    hits = {"top1": int((ranks < 1).sum()), "top5": int((ranks < 5).sum())}
    return {f"{k}_hits": n for k, n in hits.items()} | {f"{k}_error": 1 - n / len(ranks) for k, n in hits.items()}


def _name(classes: Sequence[str], output: int) -> str:
    return classes[output] if output < len(classes) else f"class #{output}"
