"""What is read from memory, what from the disk, and that both are the same."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.augment import Augment
from pipelines.dali import Decode
from pipelines.loader import Loader, Read
from pipelines.plan import TrainingPlan
from pipelines.reading import Reader
from pipelines.shards import ShardSet


def in_memory(shards: ShardSet) -> None:
    for sample in range(len(shards)):
        shards.read(sample)


def test_what_is_in_memory_is_what_is_read(shard_sets: Path) -> None:
    shards = ShardSet(shard_sets / "train")
    in_memory(shards)
    samples = np.array([7, 239, 0, 120, 7])
    for sample, data in zip(samples, shards.cached(samples), strict=True):
        assert data is not None
        assert data.dtype == np.uint8
        np.testing.assert_array_equal(data, shards.read(int(sample)))
    assert shards.cached(samples[:0]) == []


def test_a_damaged_sample_is_not_taken_from_memory(damaged: tuple[Path, list[int]]) -> None:
    root, bad = damaged
    shards = ShardSet(root / "train")
    samples = np.arange(len(shards))
    blamed: list[int] = []
    reader = Reader(shards, threads=2, fetch=None, blame=lambda sample, why: blamed.append(sample))
    shares = [(samples[i : i + 40], i) for i in range(0, len(samples), 40)]
    for group, start, encoded in reader.ahead(iter(shares), 2):
        assert group[0] == start
        assert [sample for sample, data in zip(group, encoded, strict=True) if data is None] == [
            sample for sample in bad if sample in group
        ]
    assert sorted(blamed) == bad


@pytest.mark.parametrize("fault", ["not in memory", "not known to the file system", "a part in memory"])
def test_what_is_not_in_memory_is_read(shard_sets: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """Every second sample: the batches are the same."""
    shards = ShardSet(shard_sets / "train")
    plan = TrainingPlan(shards, Augment(72, 67), shards.manifest)

    def batches() -> list[bytes]:
        loader = Loader(plan, shards.manifest, batch=24, decode=Decode(threads=2), reading=Read(readers=3))
        return [batch.inputs.numpy().tobytes() for batch in loader.epoch()]

    expected, original, asked = batches(), os.preadv, 0

    def preadv(file: int, buffers: Any, offset: int, flags: int) -> int:
        nonlocal asked
        assert flags == os.RWF_NOWAIT
        asked += 1
        if asked % 2:
            return original(file, buffers, offset, flags)
        if fault == "a part in memory":
            return original(file, buffers, offset, flags) // 2
        number = errno.EAGAIN if fault == "not in memory" else errno.EOPNOTSUPP
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "preadv", preadv)
    assert batches() == expected
    assert asked == 240


def test_a_step_in_memory_is_one_task(shard_sets: Path) -> None:
    """However many readers there are; and the shards are asked for all of its samples at once."""
    shards = ShardSet(shard_sets / "train")
    in_memory(shards)
    asked: list[int] = []
    threads: set[str] = set()
    cached, read = shards.cached, shards.read

    def noted(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def call(samples: Any) -> Any:
            asked.append(np.size(samples))
            threads.add(threading.current_thread().name)
            return function(samples)

        return call

    shards.cached, shards.read = noted(cached), noted(read)  # type: ignore[method-assign]
    plan = TrainingPlan(shards, Augment(72, 67), shards.manifest)
    for _ in Loader(plan, shards.manifest, batch=24, decode=Decode(threads=2)).epoch():
        pass
    assert asked == [24] * 10
    assert all(name.startswith("read") for name in threads)
