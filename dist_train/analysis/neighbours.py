"""Most probable classes of selected validation images, and the training images with the nearest features."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dist_train import build
from dist_train.analysis.trained import Trained
from dist_train.ranks.world import World
from pipelines.errors import UserError
from pipelines.order import SAMPLES, Ints, permutation
from pipelines.shards import ShardSet
from pipelines.speech import bar

BATCH = 128  # images per forward pass
LOOKED = 512  # validation images from which examples are picked
FURTHER = 10  # times as many, if the net is right, or wrong, about all of them
FEW, LOOKED_WRONG = 32, 256  # the same for wrong.png, which takes memory and CPU from a running run


class FigureError(UserError):
    """This model or run does not allow a figure; the message says why."""


def forward(model: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
    """Logits, float32 [n, outputs], and "feature vectors in the last hidden layer", float32 [n, units].

    The features are the inputs of the last dense layer; for two towers, each of which has a layer of that name, both
    halves in the order of the towers. None for a net without dense layers.
    """
    dense = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    last = next(reversed(dense), "")
    heads = [layer for name, layer in dense.items() if name.rpartition(".")[2] == last.rpartition(".")[2]]
    heads = [layer for layer in heads if layer.out_features == dense[last].out_features]
    entered: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        entered[module] = args[0].flatten(1).float()

    hooks = [layer.register_forward_pre_hook(keep) for layer in heads]
    try:
        with torch.inference_mode():
            logits = model(inputs).float()
    finally:
        for hook in hooks:
            hook.remove()
    halves = [entered[layer].to(logits.device) for layer in heads if layer in entered]
    return logits, torch.cat(halves, 1) if halves else None


def outputs(
    run: Trained, shards: ShardSet, samples: Ints, text: str, batch: int = BATCH
) -> Iterator[tuple[Ints, Tensor, Tensor | None]]:
    """Yields (samples, logits, features) of the central crops, batch by batch, with a progress bar labelled `text`.

    A sample that cannot be decoded is replaced by another, so the samples are not always those requested. Raises
    ShardError.
    """
    device = next(run.model.parameters()).device
    batch = min(batch, len(samples))
    loader = build.fixed_loader(run.config, World.single(device), shards, run.train, batch=batch, samples=samples)
    with bar(len(samples), text, "img") as done:
        for images in loader.epoch():
            yield images.samples, *forward(run.model, images.inputs.to(device))
            done.update(len(images.samples))


def occurrence(labels: NDArray[Any]) -> Ints:
    """Number of earlier elements with the same label, int64 [n]: sorting by it puts different classes first."""
    earlier = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        same = np.flatnonzero(labels == label)
        earlier[same] = np.arange(len(same))
    return earlier


def pick_examples(labels: NDArray[Any], right: NDArray[np.bool_], n: int) -> Ints:
    """Positions in `labels` of `n` examples, int64, the correctly classified first: half misclassified if there are
    enough, and of different classes as far as possible."""
    hits, errors = np.flatnonzero(right), np.flatnonzero(~right)
    errors = errors[np.argsort(occurrence(labels[errors]), kind="stable")][: max(n // 2, n - len(hits))]
    # A hit of a class that a picked error has already comes later than one of a new class.
    seen = occurrence(labels[np.concatenate([errors, hits])])[len(errors) :]
    hits = hits[np.argsort(seen, kind="stable")][: n - len(errors)]
    return np.concatenate([hits, errors])


@dataclass(frozen=True)
class Predictions:
    """Outputs of the net for some validation images.

    Attributes:
        samples: indices into the validation set, int64 [n], the correctly classified first.
        labels: int64 [n].
        probabilities: softmax over all outputs of the net, float32 [n, outputs].
        error: top-1 error, as a fraction of 1, of the images from which these were picked.
        looked: number of those images.
    """

    samples: Ints
    labels: Ints
    probabilities: NDArray[np.float32]
    error: float
    looked: int

    @property
    def right(self) -> NDArray[np.bool_]:
        """Whether the most probable class is the correct one, bool [n]."""
        return np.asarray(self.probabilities.argmax(1) == self.labels)


def most_probable(run: Trained, n: int) -> Predictions:
    """Predictions of `n` examples, right and wrong ones if there are both in the validation set and `n` > 1. They are
    picked among the first few hundred images of a permutation that follows from the seed of the run, and among more if
    these are all right, or all wrong. Raises ShardError."""
    return _picked(run, max(LOOKED, n), BATCH, lambda labels, right: pick_examples(labels, right, n), both=True)


def misclassified(run: Trained, n: int) -> Predictions:
    """Predictions of at most `n` misclassified images among the first of the same permutation, of different classes as
    far as possible. Raises FigureError if there are none, and ShardError."""

    def pick(labels: NDArray[Any], right: NDArray[np.bool_]) -> Ints:
        errors = np.flatnonzero(~right)
        if not len(errors):
            raise FigureError(f"the net is right about all of the {len(right)} validation images that were looked at")
        return errors[np.argsort(occurrence(labels[errors]), kind="stable")][:n]

    return _picked(run, max(LOOKED_WRONG, n), FEW, pick)


def _picked(
    run: Trained, many: int, batch: int, pick: Callable[[Ints, NDArray[np.bool_]], Ints], *, both: bool = False
) -> Predictions:
    """Predictions of those that `pick`, given the labels and whether the net is right, chooses among so many validation
    images; with `both`, among up to FURTHER times as many, until the net is right about some and wrong about others."""
    order = _permuted(run, run.val)
    samples, labels = np.empty(0, np.int64), np.empty(0, np.int64)
    logits, right = [], np.empty(0, np.bool_)
    for first in range(0, min(len(order), FURTHER * many), many):
        for numbers, values, _ in outputs(run, run.val, order[first : first + many], "most probable classes", batch):
            samples, labels = np.append(samples, numbers), np.append(labels, run.val.labels(numbers))
            right = np.append(right, values.argmax(1).cpu().numpy() == run.val.labels(numbers))
            logits.append(values.cpu())
        if not both or (right.any() and not right.all()):
            break
    probabilities = torch.cat(logits).softmax(1).numpy()
    at = pick(labels, right)
    return Predictions(samples[at], labels[at], probabilities[at], float(1 - right.mean()), len(samples))


@dataclass(frozen=True)
class Neighbours:
    """The training images nearest to some validation images.

    Attributes:
        tests: indices into the validation set, int64 [n].
        found: indices into the training set, int64 [n, k], nearest first.
        distances: Euclidean distances of the feature vectors, float32 [n, k].
        same: whether the class is the same, bool [n, k].
        searched: number of training images compared.
    """

    tests: Ints
    found: Ints
    distances: NDArray[np.float32]
    same: NDArray[np.bool_]
    searched: int

    def summary(self) -> str:
        """Share of neighbours of the same class, as text."""
        return f"{self.same.sum()} of {self.same.size} neighbours ({self.same.mean():.1%})"


def varied_tests(run: Trained, n: int) -> Ints:
    """Returns `n` validation samples, of different classes as far as possible, whatever the net predicts for them."""
    candidates = _permuted(run, run.val)[: max(LOOKED, n)]
    return candidates[np.argsort(occurrence(run.val.labels(candidates)), kind="stable")][:n]


def searched(run: Trained, m: int) -> Ints:
    """Returns the first `m` samples of a permutation of the training set that follows from the seed of the run, or all
    if `m` is 0. Sorted, so that tars are read from front to back."""
    return np.sort(_permuted(run, run.train)[: m or None])


def nearest_images(run: Trained, tests: Ints, candidates: Ints, k: int) -> Neighbours:
    """Finds the `k` training images among `candidates` "that produce feature vectors in the last hidden layer with the
    smallest Euclidean distance from the feature vector for the test image"; ties in the order of the set.

    Only the nearest so far are kept, so memory does not grow with `candidates`. Raises FigureError for a net
    without dense layers, and ShardError.
    """
    shown = list(outputs(run, run.val, tests, "test images"))
    tests = np.concatenate([samples for samples, _, _ in shown])
    wanted = torch.cat([_present(run, features) for _, _, features in shown])
    distances = wanted.new_full((len(tests), 0), 0)
    found = torch.empty(len(tests), 0, dtype=torch.int64, device=wanted.device)
    for samples, _, features in outputs(run, run.train, candidates, "nearest images"):
        # The faster way, by matrix products, loses small distances to rounding.
        near = torch.cdist(wanted, _present(run, features), compute_mode="donot_use_mm_for_euclid_dist")
        numbers = torch.from_numpy(samples).to(found.device).expand(len(tests), -1)
        distances, order = torch.cat([distances, near], 1).sort(dim=1, stable=True)
        distances, found = distances[:, :k], torch.cat([found, numbers], 1).gather(1, order[:, :k])
    images = found.cpu().numpy()
    same = run.train.labels(images) == run.val.labels(tests)[:, None]
    return Neighbours(tests, images, distances.cpu().numpy(), same, len(candidates))


def _present(run: Trained, features: Tensor | None) -> Tensor:
    """Returns the features. Raises FigureError for a net that has none."""
    if features is None:
        raise FigureError(f"{run.config.model.name} has no dense layer, so there is no last hidden layer before it")
    return features


def _permuted(run: Trained, shards: ShardSet) -> Ints:
    """All samples except quarantined ones, in an order that follows from the seed of the run."""
    order = permutation(len(shards), run.config.train.seed, 0, SAMPLES)
    return order[~np.isin(order, shards.quarantined)]
