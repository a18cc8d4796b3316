"""Shards written class by class by another tool: the low number of classes per batch is reported with a remedy."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipelines.manifest import Manifest
from pipelines.mixing import advice, classes_per_batch
from pipelines.order import Order
from pipelines.rows import checksum
from pipelines.shards import ShardSet
from tests.benchmarks import sets


def labelled(directory: Path, labels: np.ndarray, shards: int) -> ShardSet:
    """A set with these labels and without tars."""
    sets.sparse(directory, len(labels), shards)
    each = len(labels) // shards
    index = np.load(directory / "index.npy")
    index[:] = np.tile(index[_filled(len(labels), shards, each)], shards)
    index["label"] = labels
    np.save(directory / "index.npy", index)
    manifest = Manifest.read(directory)
    entries = [shard | {"rows": checksum(index[k * each : (k + 1) * each])} for k, shard in enumerate(manifest.shards)]
    digest = hashlib.sha256((directory / "index.npy").read_bytes()).hexdigest()
    replace(manifest, shards=entries, index_sha256=digest).write(directory)
    return ShardSet(directory)


def _filled(samples: int, shards: int, each: int) -> slice:
    first = int(Order(np.full(shards, each), 0, 16).samples(0, 0, 1)[0]) // each
    return slice(first * each, (first + 1) * each)


def test_classes_per_batch(tmp_path: Path) -> None:
    """100 classes in 100 shards of 100: sorted, a block of 16 shards shows 16 at most; a batch of 128 random samples
    of all shows 100 (1 - 0.99^128) = 72."""
    labels = np.repeat(np.arange(100), 100)
    ours, full = classes_per_batch(labelled(tmp_path / "sorted", labels, 100), 128, 16)
    assert 14 <= ours <= 18  # one batch lies across two blocks
    assert full == pytest.approx(100 * (1 - 0.99**128), abs=4)
    ours, full = classes_per_batch(ShardSet(tmp_path / "sorted"), 128, 100)
    assert ours == pytest.approx(full, abs=8)
    mixed = np.random.default_rng(0).permutation(labels)
    ours, full = classes_per_batch(labelled(tmp_path / "mixed", mixed, 100), 128, 16)
    assert ours == pytest.approx(full, abs=8)
    assert classes_per_batch(ShardSet(tmp_path / "mixed"), 10**6, 16) == (100, 100)  # more than there are


def test_advice_helps(tmp_path: Path) -> None:
    labels = np.repeat(np.arange(100), 100)
    assert advice(labelled(tmp_path / "mixed", np.random.default_rng(0).permutation(labels), 100)) == ""
    few = np.repeat(np.arange(10), 1000)
    assert advice(labelled(tmp_path / "few", few, 10)) == ""  # all of its shards are one block
    told = advice(labelled(tmp_path / "sorted", labels, 100))
    assert told.startswith(f"{tmp_path}/sorted is sorted by class: a batch of 128 would show 1")
    number = int(told.rpartition("--data.shuffle_shards ")[2])
    ours, full = classes_per_batch(ShardSet(tmp_path / "sorted"), 128, number)
    assert ours > 0.9 * full


def test_advice_names_no_more_shards_than_stay_open(tmp_path: Path) -> None:
    """A batch out of 256 of 1,000 classes shows 101, one out of all 120."""
    told = advice(labelled(tmp_path, np.repeat(np.arange(1000), 20), 1000))
    assert told.endswith(" with the tool that wrote them")


def test_advice_where_no_block_of_shards_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.mixing.MOST", 2_000)
    told = advice(labelled(tmp_path, np.repeat(np.arange(100), 100), 100))
    assert told.endswith(" with the tool that wrote them")
