"""The predictions of trained nets, averaged over crops and nets, and their errors: exact at any world size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from dist_train import build
from dist_train.analysis.trained import Trained
from dist_train.ranks.world import World
from pipelines.loader import Loader
from pipelines.manifest import ShardError
from pipelines.misc import ceil_div
from pipelines.order import Ints
from pipelines.speech import bar

# Columns of `predict`'s table. Those from BEFORE_OF_RUNS on belong to the single runs.
LEFT_OUT, PREDICTED, BEFORE, BEFORE_OF_RUNS = range(4)
BATCHES = 64  # after which `predict` shows what it has seen


def predict(
    runs: Sequence[Trained],
    world: World,
    *,
    views: int,
    batch: int,
    seen: Callable[[Probabilities], None] | None = None,
) -> Ints:
    """Predictions of each run, and of their average, for every image.

    Each rank keeps the float32 probabilities of its own images only; ranks exchange integers, which are summed once.
    A forward pass has the same shape at any world size.

    Args:
        views: number of fixed views to average, in order.
        batch: images of a forward pass.
        seen: called with the mean probabilities of this rank's images, of some thousands at a time.

    Returns:
        int64 [images, 3 + runs], the same on all ranks. LEFT_OUT: 1 if it is in quarantine, or some run could
        not decode it. PREDICTED: the output that is the most probable on average over runs and views. BEFORE: number of
        outputs that are more probable than the right one; then the same for each run. Of equally probable outputs the
        first is the more probable.

    Raises ShardError, on all ranks, if a tar is not what was indexed, or if no image can be decoded.
    """
    batch = min(batch, len(runs[0].val))
    caught = (ShardError, OSError)
    table = world.together(lambda: _own_rows(runs, world, views, batch, seen), failure=ShardError, catch=caught)
    assert table is not None  # all ranks work
    world.sum(torch.from_numpy(table))  # which shares the memory of the table
    table[runs[0].val.quarantined, LEFT_OUT] = 1
    if table[:, LEFT_OUT].all():
        raise ShardError(f"no image of {runs[0].val.place} can be decoded: pack it anew")
    return table


def _own_rows(
    runs: Sequence[Trained], world: World, views: int, batch: int, seen: Callable[[Probabilities], None] | None
) -> Ints:
    """`predict`'s table with the rows of this rank's images; the others are 0."""
    val = runs[0].val
    table = np.zeros((len(val), BEFORE_OF_RUNS + len(runs)), np.int64)
    steps = ceil_div(len(val.good), batch * world.size)
    at_once = (BATCHES if seen else steps) * batch * world.size  # all, unless somebody wants to see some before
    with bar(steps * views * len(runs), "evaluate", "batch", speaks=world.rank == 0) as done:
        for first in range(0, len(val.good), at_once):
            shown = val.good[first : first + at_once]
            found = (probabilities(run, world, views, batch, each=done.update, samples=shown) for run in runs)
            mean = _entered(table, found, runs)
            if seen:
                seen(mean)
    return table


def _entered(table: Ints, found: Iterator[Probabilities], runs: Sequence[Trained]) -> Probabilities:
    """Enters what the runs make of the same images into their rows of the table. Returns the mean over the runs."""
    mean: Tensor | None = None
    for i, one in enumerate(found):
        own, labels = one.samples, runs[i].val.labels(one.samples)
        table[own, LEFT_OUT] |= one.bad
        table[own, BEFORE_OF_RUNS + i] = more_probable(one.probabilities, labels)
        share = one.probabilities / len(runs)
        mean = share if mean is None else _add(mean, share)
    assert mean is not None  # there is a run
    table[own, PREDICTED] = mean.numpy().argmax(axis=1)  # numpy's takes the first of equals
    table[own, BEFORE] = more_probable(mean, labels)
    return Probabilities(own, mean, table[own, LEFT_OUT] == 1)


class Probabilities(NamedTuple):
    """The softmax outputs of a net for the images of one rank.

    Attributes:
        samples: the images, int64 [n].
        probabilities: the mean over the views, float32 [n, outputs], on the CPU.
        bad: whether another image stood for one in some view, since it could not be decoded, bool [n].
    """

    samples: Ints
    probabilities: Tensor
    bad: NDArray[np.bool_]


def probabilities(
    run: Trained,
    world: World,
    views: int,
    batch: int,
    *,
    each: Callable[[], Any] = lambda: None,
    samples: Ints | None = None,
    told: Callable[[str], None] | None = None,
) -> Probabilities:
    """The probabilities of this rank's images by one run.

    Args:
        each: called after every batch.
        samples: numbers of the images, over all ranks, int64 [n]; None: all of the validation set.
        told: called with a message about each image that cannot be decoded; None: it is printed.
    """
    of_view = partial(
        build.fixed_loader, run.config, world, run.val, run.train, batch=batch * world.size, samples=samples
    )
    loader = of_view()
    own = np.concatenate([loader.samples(0, step)[0] for step in range(loader.steps)])
    bad = np.zeros(len(own), np.bool_)
    total = torch.zeros(len(own), 1)
    for view in range(views):
        known = loader.bad  # is not met, and told, once more in every view
        loader = of_view(view=view) if view else loader
        loader.bad |= known
        loader.told = told or loader.told
        shown, outputs = _softmax(run, world, loader, batch, each)
        if len(own):
            total = total + outputs
            bad |= shown != own
    return Probabilities(own, total / views, bad)


def _softmax(run: Trained, world: World, loader: Loader, batch: int, each: Callable[[], Any]) -> tuple[Ints, Tensor]:
    """The images that the loader showed, int64 [n], and their softmax outputs, float32 [n, outputs] on the CPU."""
    autocast = build.autocast(run.config, world)
    shown = [np.zeros(0, np.int64)]
    outputs = [torch.zeros(0)]
    with torch.inference_mode():
        for images in loader.epoch():
            if n := len(images.labels):
                inputs = _filled(images.inputs.to(world.device), batch)
                with autocast:
                    logits = run.model(inputs)[:n]
                outputs.append(logits.float().softmax(dim=1).cpu())
                shown.append(images.samples)
            each()
    return np.concatenate(shown), torch.cat(outputs)


def _filled(inputs: Tensor, n: int) -> Tensor:
    """The inputs padded with black images, [n, 3, crop, crop]: another shape might be computed in another order."""
    if len(inputs) == n:
        return inputs
    filled = inputs.new_zeros(n, *inputs.shape[1:]).to(memory_format=torch.channels_last)
    filled[: len(inputs)] = inputs
    return filled


def more_probable(probabilities: Tensor, labels: NDArray[Any]) -> Ints:
    """Number of outputs that rank before the right one, int64 [n]. Of equal ones the first ranks first, at any world
    size."""
    p, right = probabilities.numpy(), labels.astype(np.int64)[:, None]
    if not len(p):
        return np.zeros(0, np.int64)
    own = np.take_along_axis(p, right, axis=1)
    behind = (p < own) | ((p == own) & (np.arange(p.shape[1]) >= right))
    before: Ints = (~behind).sum(axis=1)  # so that one that is not a number is never right
    return before


def _add(one: Tensor, two: Tensor) -> Tensor:
    """Sum of the probabilities of two nets, which may differ in their number of outputs."""
    width = max(one.shape[1], two.shape[1])
    return F.pad(one, (0, width - one.shape[1])) + F.pad(two, (0, width - two.shape[1]))


def summarise(table: Ints, runs: Sequence[Trained]) -> dict[str, Any]:
    """All numbers of an evaluation from `predict`'s table: counts, and errors as fractions of 1."""
    first = runs[0]
    good = table[:, LEFT_OUT] == 0
    kept, labels = table[good], first.val.labels(np.flatnonzero(good))
    samples = np.bincount(labels, minlength=len(first.classes))
    hits = np.bincount(labels[kept[:, BEFORE] == 0], minlength=len(first.classes))
    wrong = kept[:, BEFORE] > 0
    pairs, counts = np.unique(np.stack([labels, kept[:, PREDICTED]], axis=1)[wrong], axis=0, return_counts=True)
    return {
        "split": first.val.place,
        "images": len(kept),
        "left_out": len(table) - len(kept),
        **_errors(kept[:, BEFORE]),
        "runs": [
            {"run": str(run.directory), "checkpoint": run.checkpoint, "step": run.step, "epoch": run.epoch}
            | _errors(kept[:, BEFORE_OF_RUNS + i])
            for i, run in enumerate(runs)
        ],
        "classes": [
            {"class": name, "samples": int(n), "top1_hits": int(h), "top1_error": float((n - h) / n) if n else None}
            for name, n, h in zip(first.classes, samples, hits, strict=True)
        ],
        "confusions": [
            {
                "true": first.output_name(int(pairs[i, 0])),
                "predicted": first.output_name(int(pairs[i, 1])),
                "count": int(counts[i]),
            }
            for i in np.argsort(-counts, kind="stable")
        ],
    }


def _errors(before: Ints) -> dict[str, Any]:
    """Hits and errors, from the number of outputs per image that are more probable than the right one."""
    top1, top5, images = int((before < 1).sum()), int((before < 5).sum()), len(before)
    errors = {"top1_error": (images - top1) / images, "top5_error": (images - top5) / images}
    return {"top1_hits": top1, "top5_hits": top5} | errors
