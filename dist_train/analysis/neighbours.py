"""What a trained net makes of chosen images: its most probable classes, and which images it takes for similar."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from dist_train.analysis.trained import Trained
from dist_train.build import build_loader
from dist_train.ranks.world import World
from pipelines.order import SAMPLES, Ints, permutation
from pipelines.shards import ShardSet

BATCH = 128  # images in a forward pass
LOOKED = 512  # validation images among which those of top5.png are chosen


class FigureError(ValueError):
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
    parts = [entered[layer].to(logits.device) for layer in heads if layer in entered]
    return logits, torch.cat(parts, 1) if parts else None


def outputs(run: Trained, shards: ShardSet, samples: Ints, text: str) -> Iterator[tuple[Ints, Tensor, Tensor | None]]:
    """(samples, logits, features) of the central crops, a batch at a time, with `text` at a progress bar.

    Another sample takes the place of one that cannot be decoded, so these are not always the ones that were asked for.
    Raises ShardError.
    """
    device = next(run.model.parameters()).device
    alone, size = World(0, 1, device.index or 0, 1, device), min(BATCH, len(samples))
    loader = build_loader(run.config, alone, shards, run.train, batch=size, training=False)
    loader.choose(samples)
    with tqdm(total=len(samples), desc=text, unit="img", dynamic_ncols=True, disable=None) as bar:
        for batch in loader.epoch():
            yield batch.samples, *forward(run.model, batch.inputs.to(device))
            bar.update(len(batch.samples))


def rounds(labels: NDArray[Any]) -> Ints:
    """How many earlier elements have the same label, int64 [n]: sorting by it puts different classes first."""
    earlier = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        same = np.flatnonzero(labels == label)
        earlier[same] = np.arange(len(same))
    return earlier


def choose(labels: NDArray[Any], right: NDArray[np.bool_], n: int) -> Ints:
    """Which `n` candidates tell most: half of them misclassified where there are so many, as far as possible of
    different classes. Returns positions in `labels` (int64), the correctly classified first."""
    hits, errors = np.flatnonzero(right), np.flatnonzero(~right)
    errors = errors[np.argsort(rounds(labels[errors]), kind="stable")][: max(n // 2, n - len(hits))]
    taken = rounds(labels[np.concatenate([errors, hits])])[len(errors) :]
    return np.concatenate([hits[np.argsort(taken, kind="stable")][: n - len(errors)], errors])


@dataclass(frozen=True)
class Predictions:
    """What the net says to some validation images.

    Attributes:
        samples: of the validation set, int64 [n], the correctly classified first.
        labels: int64 [n].
        probabilities: softmax over all outputs of the net, float32 [n, outputs].
        error: top-1 error as a fraction of 1 of the images among which these were chosen.
        looked: how many those were.
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
    """`n` validation images, chosen by `choose` among the first few hundred of a permutation that follows from the seed
    of the run. Raises ShardError."""
    candidates = _permuted(run, run.val)[: max(LOOKED, n)]
    found = list(outputs(run, run.val, candidates, "most probable classes"))
    samples = np.concatenate([samples for samples, _, _ in found])
    probabilities = torch.cat([logits for _, logits, _ in found]).softmax(1).cpu().numpy()
    labels = run.val.index["label"][samples].astype(np.int64)
    right = probabilities.argmax(1) == labels
    at = choose(labels, right, n)
    return Predictions(samples[at], labels[at], probabilities[at], float(1 - right.mean()), len(samples))


@dataclass(frozen=True)
class Neighbours:
    """The training images nearest to some validation images.

    Attributes:
        tests: samples of the validation set, int64 [n].
        found: samples of the training set, int64 [n, k], nearest first.
        distances: Euclidean distances of the feature vectors, float32 [n, k].
        same: whether the class is the same, bool [n, k].
        searched: how many training images were compared.
    """

    tests: Ints
    found: Ints
    distances: NDArray[np.float32]
    same: NDArray[np.bool_]
    searched: int

    def summary(self) -> str:
        return f"{self.same.sum()} of {self.same.size} neighbours ({self.same.mean():.1%})"


def varied_tests(run: Trained, n: int) -> Ints:
    """`n` validation images of different classes where possible, without regard to what the net makes of them."""
    candidates = _permuted(run, run.val)[: max(LOOKED, n)]
    return candidates[np.argsort(rounds(run.val.index["label"][candidates]), kind="stable")][:n]


def searched(run: Trained, m: int) -> Ints:
    """The first `m` of a permutation of the training set that follows from the seed of the run; 0: all. Sorted, so that
    tars are read from front to back."""
    return np.sort(_permuted(run, run.train)[: m or None])


def nearest(run: Trained, tests: Ints, candidates: Ints, k: int) -> Neighbours:
    """The `k` training images among `candidates` "that produce feature vectors in the last hidden layer with the
    smallest Euclidean distance from the feature vector for the test image"; equally near ones in the order of the set.

    Only the nearest of each batch are kept, so memory does not grow with `candidates`. Raises FigureError for a net
    without dense layers, and ShardError.
    """
    seen = [(samples, _of(run, features)) for samples, _, features in outputs(run, run.val, tests, "test images")]
    tests, wanted = np.concatenate([samples for samples, _ in seen]), torch.cat([features for _, features in seen])
    distances = wanted.new_full((len(tests), 0), 0)
    found = torch.empty(len(tests), 0, dtype=torch.int64, device=wanted.device)
    for samples, _, features in outputs(run, run.train, candidates, "nearest images"):
        # The quick way by matrix products loses small distances to rounding.
        near = torch.cdist(wanted, _of(run, features), compute_mode="donot_use_mm_for_euclid_dist")
        numbers = torch.from_numpy(samples).to(found.device).expand(len(tests), -1)
        distances, order = torch.cat([distances, near], 1).sort(dim=1, stable=True)
        distances, found = distances[:, :k], torch.cat([found, numbers], 1).gather(1, order[:, :k])
    images = found.cpu().numpy()
    same = run.train.index["label"][images] == run.val.index["label"][tests][:, None]
    return Neighbours(tests, images, distances.cpu().numpy(), same, len(candidates))


def _of(run: Trained, features: Tensor | None) -> Tensor:
    if features is None:
        raise FigureError(f"{run.config.model.name} has no dense layer, so there is no last hidden layer before it")
    return features


def _permuted(run: Trained, shards: ShardSet) -> Ints:
    return permutation(len(shards), run.config.train.seed, 0, SAMPLES)
