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


@pytest.fixture
def nowait(shard_sets: Path) -> None:
    """For tests on what is in memory: skips where nothing tells."""
    with open(shard_sets / "train" / "manifest.json", "rb") as file:
        try:
            os.preadv(file.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT)
        except (AttributeError, NotImplementedError) as error:
            pytest.skip(f"this Python cannot ask what is in memory ({error})")
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:
                pytest.skip(f"the file system of {shard_sets} does not tell what is in memory: set TMPDIR to another")


def in_memory(shards: ShardSet) -> None:
    for sample in range(len(shards)):
        shards.read(sample)


@pytest.mark.usefixtures("nowait")
def test_what_is_in_memory_is_what_is_read(shard_sets: Path) -> None:
    shards = ShardSet(shard_sets / "train")
    samples = np.array([7, 239, 0, 120, 7])
    assert shards.cached(samples) == [None] * 5  # no tar has been opened yet
    in_memory(shards)
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


@pytest.mark.usefixtures("nowait")
@pytest.mark.parametrize("fault", ["not in memory", "an error", "a part in memory"])
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
        number = errno.EAGAIN if fault == "not in memory" else errno.EIO
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "preadv", preadv)
    assert batches() == expected
    assert asked == 240


LACKS = {
    "the file system": OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP)),
    "the system": NotImplementedError("preadv2"),
    "the flag": None,
}


@pytest.mark.parametrize("lack", LACKS)
def test_where_nothing_tells_what_is_in_memory(shard_sets: Path, monkeypatch: pytest.MonkeyPatch, lack: str) -> None:
    """It is asked once, and then no more; all is read, and the batches are the same."""
    asked = 0

    def preadv(*args: Any) -> int:
        nonlocal asked
        asked += 1
        raise LACKS[lack] or AssertionError

    if lack == "the flag":
        monkeypatch.delattr(os, "RWF_NOWAIT", raising=False)
    else:
        monkeypatch.setattr(os, "RWF_NOWAIT", 8, raising=False)
    monkeypatch.setattr(os, "preadv", preadv, raising=False)
    shards = ShardSet(shard_sets / "train")
    in_memory(shards)
    samples = np.arange(24)
    for _ in range(2):
        assert shards.cached(samples) == [None] * 24
        assert asked == (lack != "the flag")

    def batches(reading: Read) -> list[bytes]:
        plan = TrainingPlan(shards, Augment(72, 67), shards.manifest)
        loader = Loader(plan, shards.manifest, batch=24, decode=Decode(threads=2), reading=reading)
        return [batch.inputs.numpy().tobytes() for batch in loader.epoch()]

    assert batches(Read(readers=3)) == batches(Read(read=shards.read))
    assert asked == (lack != "the flag")


def test_rows_are_looked_up_once_a_piece(shard_sets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = ShardSet(shard_sets / "train")
    samples = np.array([7, 239, 0, 120, 7])
    expected = [shards.read(int(sample)).tobytes() for sample in samples]
    looked_up: list[int] = []
    rows = shards.rows
    monkeypatch.setattr(shards, "rows", lambda samples: (looked_up.append(len(samples)), rows(samples))[1])
    reader = Reader(shards, threads=2, fetch=None, blame=lambda sample, why: pytest.fail(why))
    assert [data.tobytes() for data in reader.read(samples) if data is not None] == expected
    assert looked_up == [5]


@pytest.mark.usefixtures("nowait")
def test_a_step_in_memory_is_one_task(shard_sets: Path) -> None:
    """However many readers there are; and the shards are asked for all of its samples at once."""
    shards = ShardSet(shard_sets / "train")
    in_memory(shards)
    asked: list[int] = []
    threads: set[str] = set()
    cached, reads = shards.cached, shards.reads

    def noted(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def call(samples: Any) -> Any:
            asked.append(np.size(samples))
            threads.add(threading.current_thread().name)
            return function(samples)

        return call

    shards.cached, shards.reads = noted(cached), noted(reads)  # type: ignore[method-assign]
    plan = TrainingPlan(shards, Augment(72, 67), shards.manifest)
    for _ in Loader(plan, shards.manifest, batch=24, decode=Decode(threads=2)).epoch():
        pass
    assert asked == [24] * 10
    assert all(name.startswith("read") for name in threads)
