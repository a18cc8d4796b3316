"""Reads from the page cache and from disk, and that both give the same batches."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_train.config import Config, RunConfig, TrainConfig
from dist_train.data import open_sets
from dist_train.data_config import DataConfig
from pipelines import opened
from pipelines.augment import Augment
from pipelines.cli import Verb, run_verb
from pipelines.dali import DEPTH, Decode
from pipelines.files import sha256
from pipelines.loader import Loader, Read
from pipelines.manifest import Manifest, ShardError
from pipelines.opened import ReadError
from pipelines.plan import TrainingPlan
from pipelines.reading import Reader
from pipelines.rows import mapped
from pipelines.shards import ShardSet


@pytest.fixture
def nowait(shard_sets: Path) -> None:
    """For tests on the page cache: skips where it cannot be queried."""
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
    """It is queried only once; everything is read, and the batches are the same."""
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
    """With any number of readers; all of its samples are requested from the shards at once."""
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


class Failing:
    """A file system under the tars of a set: `os.pread` fails this number of times, and so does opening if `gone`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, times: float, number: int = errno.EIO) -> None:
        self.left, self.number, self.slept = times, number, list[float]()
        self.original = os.pread
        monkeypatch.setattr(os, "pread", self.pread)
        monkeypatch.setattr(opened.time, "sleep", self.sleep)
        monkeypatch.setattr(opened.time, "monotonic", lambda: sum(self.slept))

    def pread(self, *args: int) -> bytes:
        self.left -= 1
        if self.left >= 0:
            raise OSError(self.number, os.strerror(self.number))
        return self.original(*args)

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_file_system_that_fails_for_seconds(
    number: int, shard_sets: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tar is reopened, also the first time, with growing pauses; a long failure is reported once, its end too."""
    shards = ShardSet(shard_sets / "train")
    expected = ShardSet(shard_sets / "train").read(7)
    disk = Failing(monkeypatch, 2, number)  # as the first header is read
    np.testing.assert_array_equal(shards.read(7), expected)
    assert sum(disk.slept) == pytest.approx(0.1 + 0.2)
    disk.slept.clear()
    assert not capsys.readouterr().err
    before = shards._tars.get(shards.shard_of(7))
    disk.left = 6
    np.testing.assert_array_equal(shards.read(7), expected)
    assert shards._tars.get(shards.shard_of(7)) is not before
    assert sum(disk.slept) == pytest.approx(0.1 + 0.2 + 0.4 + 0.8 + 1.6 + 3.2)
    path = shard_sets / "train" / shards.names[shards.shard_of(7)]
    said = f"{path} cannot be read ({os.strerror(number)}): trying again\n"
    said += f"{path.parent} can be read again: reading resumes\n"
    assert capsys.readouterr().err == said


def test_a_file_system_that_is_gone(shard_sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence after a minute, or earlier if it would count as a hang. A tar that never existed is missing."""
    shards = ShardSet(shard_sets / "train")
    path = shard_sets / "train" / shards.names[shards.shard_of(7)]
    disk = Failing(monkeypatch, float("inf"), errno.ESTALE)
    with pytest.raises(ReadError, match=f"{path} could not be read for 60 s .Stale file handle.: check its") as e:
        shards.read(7)
    assert not isinstance(e.value, ValueError), "no refusal: a restart may mend it"
    disk.slept.clear()
    train, val = (str(shard_sets / name) for name in ("train", "val"))
    config = Config(DataConfig(train=train, val=val), train=TrainConfig(global_batch=24), run=RunConfig(step_timeout=8))
    disk.left = 0
    shards, _ = open_sets(config)
    disk.left = float("inf")
    with pytest.raises(ReadError, match="could not be read for 4 s"):
        shards.read(7)

    disk.left = 0
    shutil.copytree(shard_sets / "train", tmp_path / "train")
    shards = ShardSet(tmp_path / "train", patience=1)
    (tmp_path / "train").rename(tmp_path / "unmounted")
    with pytest.raises(ShardError, match="is missing"):
        shards.read(7)
    (tmp_path / "unmounted").rename(tmp_path / "train")
    shards.read(7)
    shards._tars._keep(0)
    (tmp_path / "train").rename(tmp_path / "unmounted")
    with pytest.raises(ReadError, match=r"could not be read for 1 s .No such file"):
        shards.read(7)


def test_a_rank_that_cannot_read_goes_with_the_others(shard_sets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It delivers the batches before, except those DALI works ahead on, then NaN batches of the same shapes."""
    shards = ShardSet(shard_sets / "train", patience=0)
    plan = TrainingPlan(shards, Augment(72, 67), shards.manifest)
    monkeypatch.setattr(ShardSet, "cached", lambda _, samples: [None] * len(samples))
    loader = Loader(plan, shards.manifest, batch=25, dp_rank=1, dp_size=3, decode=Decode(threads=2))
    whole = [batch._replace(inputs=batch.inputs.clone()) for batch in loader.epoch(0, 1)]
    read, bad = ShardSet._read, shards.index["crc"][whole[5].samples[0]]

    def failing(self: ShardSet, *place: int) -> Any:
        if place[4] == bad:
            raise ReadError("gone")
        return read(self, *place)

    monkeypatch.setattr(ShardSet, "_read", failing)
    unread: list[ReadError] = []
    batches = [batch._replace(inputs=batch.inputs.clone()) for batch in loader.epoch(0, 1, unread=unread)]
    assert [str(error) for error in unread] == ["gone"]
    assert len(batches) == len(whole) == 8
    for i, (batch, expected) in enumerate(zip(batches, whole, strict=True)):
        blank = bool(batch.inputs.isnan().all())
        assert blank if i >= 5 else not blank or i >= 5 - DEPTH
        assert batch.inputs.shape == expected.inputs.shape
        assert batch.inputs.stride() == expected.inputs.stride()
        assert batch.start == expected.start
        assert batch.labels.shape == batch.keys.shape == expected.labels.shape
        assert blank or (batch.inputs == expected.inputs).all()
    with pytest.raises(ReadError, match="gone"):
        list(loader.epoch(0, 1))


def many_shards(one: Path, directory: Path, count: int) -> None:
    """A set of a given number of tars, each a copy of the first tar of another set."""
    directory.mkdir()
    manifest = Manifest.read(one)
    first = manifest.shards[0]
    shards = [first | {"name": f"shard-{i:06d}.tar"} for i in range(count)]
    for shard in shards:
        os.link(one / first["name"], directory / shard["name"])
    np.save(directory / "index.npy", np.tile(mapped(one / "index.npy")[: first["samples"]], count))
    samples = count * first["samples"]
    replace(manifest, shards=shards, samples=samples, index_sha256=sha256(directory / "index.npy")).write(directory)


@pytest.fixture
def few_files() -> Iterator[Callable[[int], None]]:
    """Limits the open files of this process until the test is over."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield lambda count: resource.setrlimit(resource.RLIMIT_NOFILE, (count, before[1]))
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_more_tars_than_files_that_may_be_open(
    shard_sets: Path, tmp_path: Path, few_files: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`ulimit -n 256` with two sets of 205 tars; and with hardly any file left, then none."""
    sets = []
    for name in ("train", "val"):
        many_shards(shard_sets / name, tmp_path / name, 205)
        sets.append(ShardSet(tmp_path / name))

    def read_all() -> None:
        for shards in sets:
            each = len(shards) // 205
            for sample in range(0, len(shards), each):
                assert shards.read(sample).tobytes() == shards.read(sample % each).tobytes()

    few_files(256)
    read_all()
    open_now = len(os.listdir("/proc/self/fd"))
    assert open_now <= 256 - opened.RESERVE + 64
    for shards in sets:
        shards._tars._keep(0)
    few_files(max(map(int, os.listdir("/proc/self/fd"))) + 6)
    read_all()
    for tars in list(opened.OpenTars._all):  # of other tests, too
        tars._keep(0)
    with open(os.devnull) as file:  # its number is the next one that is free
        few_files(file.fileno())
    monkeypatch.setattr(opened, "FULL", 0.1)
    with pytest.raises(ReadError, match=r"shard-000000.tar cannot be opened, .* no more than \d+ files .*`ulimit -n`"):
        sets[0].read(0)


def test_the_limit_is_raised(few_files: Callable[[int], None]) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    few_files(100)
    assert run_verb("x", {"v": Verb("", lambda _: None, lambda _: 0)}, ["v"]) == 0
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (min(hard, opened.HIGHEST), hard)


def test_who_is_to_stop_waits_for_no_tar(shard_sets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do later reads start a wait of their own; permanent errors are not waited for."""
    shards = ShardSet(shard_sets / "train")
    disk = Failing(monkeypatch, float("inf"))
    with pytest.raises(ReadError, match="could not be read for 60 s"):
        shards.read(7)
    disk.slept[:] = [sum(disk.slept)]
    with pytest.raises(ReadError, match="could not be read for 60 s"):
        shards.read(8)
    assert len(disk.slept) == 1, "of the same set, which is known to fail"
    shards = ShardSet(shard_sets / "train")
    shards.hurried = lambda: len(disk.slept) > 3
    with pytest.raises(ReadError, match=r"could not be read .Input/output error."):
        shards.read(7)
    disk.number = errno.EACCES
    with pytest.raises(ReadError, match=r"shard-.* could not be read .Permission denied."):
        ShardSet(shard_sets / "train").read(7)
