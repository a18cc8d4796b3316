"""Most probable classes of chosen images, and the training images whose features are nearest to theirs."""

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

BATCH = 128  # images in a forward pass
LOOKED = 512  # validation images among which examples are picked
FEW, LOOKED_WRONG = 32, 256  # the same beside a run that goes on, whose memory and CPU that takes


class FigureError(UserError):
    """A figure that this model or run does not allow; the message says why."""


def forward(model: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
    """Logits, float32 [n, outputs], and "feature vectors in the last hidden layer", float32 [n, units].

    The latter are what enters the last dense layer; of two towers, which have a layer each under the same name, both
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
    """(samples, logits, features) of the central crops, a batch at a time, with `text` at a progress bar.

    Another sample takes the place of one that cannot be decoded, so these are not always the ones that were asked for.
    Raises ShardError.
    """
    device = next(run.model.parameters()).device
    batch = min(batch, len(samples))
    loader = build.fixed_loader(run.config, World.single(device), shards, run.train, batch=batch, samples=samples)
    with bar(len(samples), text, "img") as done:
        for images in loader.epoch():
            yield images.samples, *forward(run.model, images.inputs.to(device))
            done.update(len(images.samples))


def occurrence(labels: NDArray[Any]) -> Ints:
    """The number of earlier elements with the same label, int64 [n]: sorting by it puts different classes first."""
    earlier = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        same = np.flatnonzero(labels == label)
        earlier[same] = np.arange(len(same))
    return earlier


def pick_examples(labels: NDArray[Any], right: NDArray[np.bool_], n: int) -> Ints:
    """Positions in `labels` of `n` examples, int64, the correctly classified first: half of them misclassified if there
    are so many, and as far as possible of different classes."""
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
        samples: of the validation set, int64 [n], the correctly classified first.
        labels: int64 [n].
        probabilities: softmax over all outputs of the net, float32 [n, outputs].
        error: top-1 error, as a fraction of 1, of the images among which these were picked.
        looked: the number of those.
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
    """Predictions of `n` examples among the first few hundred validation images of a permutation that follows from the
    seed of the run. Raises ShardError."""
    return _picked(run, max(LOOKED, n), BATCH, lambda labels, right: pick_examples(labels, right, n))


def misclassified(run: Trained, n: int) -> Predictions:
    """Predictions of at most `n` misclassified ones among the first of the same permutation, as far as possible of
    different classes. Raises FigureError if there are none, and ShardError."""

    def pick(labels: NDArray[Any], right: NDArray[np.bool_]) -> Ints:
        errors = np.flatnonzero(~right)
        if not len(errors):
            raise FigureError(f"the net is right about all of the {len(right)} validation images that were looked at")
        return errors[np.argsort(occurrence(labels[errors]), kind="stable")][:n]

    return _picked(run, max(LOOKED_WRONG, n), FEW, pick)


def _picked(
    run: Trained, many: int, batch: int, pick: Callable[[NDArray[Any], NDArray[np.bool_]], Ints]
) -> Predictions:
    """Predictions of those that `pick`, given the labels and what is right, finds among so many validation images."""
    found = list(outputs(run, run.val, _permuted(run, run.val)[:many], "most probable classes", batch))
    samples = np.concatenate([samples for samples, _, _ in found])
    probabilities = torch.cat([logits for _, logits, _ in found]).softmax(1).cpu().numpy()
    labels = run.val.labels(samples)
    right = probabilities.argmax(1) == labels
    at = pick(labels, right)
    return Predictions(samples[at], labels[at], probabilities[at], float(1 - right.mean()), len(samples))


@dataclass(frozen=True)
class Neighbours:
    """The training images nearest to some validation images.

    Attributes:
        tests: samples of the validation set, int64 [n].
        found: samples of the training set, int64 [n, k], nearest first.
        distances: Euclidean distances of the feature vectors, float32 [n, k].
        same: whether the class is the same, bool [n, k].
        searched: the number of training images that were compared.
    """

    tests: Ints
    found: Ints
    distances: NDArray[np.float32]
    same: NDArray[np.bool_]
    searched: int

    def summary(self) -> str:
        """The share of neighbours of the same class, for people."""
        return f"{self.same.sum()} of {self.same.size} neighbours ({self.same.mean():.1%})"


def varied_tests(run: Trained, n: int) -> Ints:
    """`n` validation images of different classes where possible, whatever the net predicts for them."""
    candidates = _permuted(run, run.val)[: max(LOOKED, n)]
    return candidates[np.argsort(occurrence(run.val.labels(candidates)), kind="stable")][:n]


def searched(run: Trained, m: int) -> Ints:
    """The first `m` of a permutation of the training set that follows from the seed of the run; 0: all. Sorted, so that
    tars are read from front to back."""
    return np.sort(_permuted(run, run.train)[: m or None])


def nearest_images(run: Trained, tests: Ints, candidates: Ints, k: int) -> Neighbours:
    """The `k` training images among `candidates` "that produce feature vectors in the last hidden layer with the
    smallest Euclidean distance from the feature vector for the test image"; equally near ones in the order of the set.

    Only the nearest of each batch are kept, so memory does not grow with `candidates`. Raises FigureError for a net
    without dense layers, and ShardError.
    """
    shown = list(outputs(run, run.val, tests, "test images"))
    tests = np.concatenate([samples for samples, _, _ in shown])
    wanted = torch.cat([_present(run, features) for _, _, features in shown])
    distances = wanted.new_full((len(tests), 0), 0)
    found = torch.empty(len(tests), 0, dtype=torch.int64, device=wanted.device)
    for samples, _, features in outputs(run, run.train, candidates, "nearest images"):
        # The quick way by matrix products loses small distances to rounding.
        near = torch.cdist(wanted, _present(run, features), compute_mode="donot_use_mm_for_euclid_dist")
        numbers = torch.from_numpy(samples).to(found.device).expand(len(tests), -1)
        distances, order = torch.cat([distances, near], 1).sort(dim=1, stable=True)
        distances, found = distances[:, :k], torch.cat([found, numbers], 1).gather(1, order[:, :k])
    images = found.cpu().numpy()
    same = run.train.labels(images) == run.val.labels(tests)[:, None]
    return Neighbours(tests, images, distances.cpu().numpy(), same, len(candidates))


def _present(run: Trained, features: Tensor | None) -> Tensor:
    """The features. Raises FigureError for a net that has none."""
    if features is None:
        raise FigureError(f"{run.config.model.name} has no dense layer, so there is no last hidden layer before it")
    return features


def _permuted(run: Trained, shards: ShardSet) -> Ints:
    """All samples but the quarantined ones, in an order that follows from the seed of the run."""
    order = permutation(len(shards), run.config.train.seed, 0, SAMPLES)
    return order[~np.isin(order, shards.quarantined)]
