"""Shard sets that cannot be used: each says in one sentence what is wrong and what to do."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tarfile
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.manifest import Manifest, ShardError
from pipelines.pack import Options, pack
from pipelines.rows import SAMPLE, checksum
from pipelines.shards import ShardSet
from pipelines.sources import ImageFolder
from tests.benchmarks import sets
from tests.benchmarks.sets import counted


@pytest.fixture
def directory(shard_sets: Path, tmp_path: Path) -> Path:
    """A private shard set for a test that damages it."""
    shutil.copytree(shard_sets / "train", tmp_path / "set")
    return tmp_path / "set"


@pytest.fixture(scope="module")
def other(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images in another order: the same number of samples per shard, but other ones."""
    out = tmp_path_factory.mktemp("other") / "set"
    options = Options(shorter_side=72, shard_mb=0.2, seed=1)
    pack(ImageFolder(image_folder / "train"), out, options, split="train", workers=2)
    return out


def renamed(tar: Path) -> bytes:
    """The same tar with other keys of the same length."""
    out = io.BytesIO()
    with tarfile.open(tar) as old, tarfile.open(fileobj=out, mode="w") as new:
        for member in old.getmembers():
            data = old.extractfile(member)
            member.name = f"9{member.name[1:]}"
            new.addfile(member, data)
    return out.getvalue()


def use(directory: Path) -> None:
    """As in an epoch: opens the set and reads every sample."""
    shards = ShardSet(directory)
    for sample in range(len(shards)):
        shards.read(sample)


def test_read_gives_the_bytes_in_the_tars(shard_sets: Path) -> None:
    shards = ShardSet(shard_sets / "train")
    expected = []
    for path in sorted((shard_sets / "train").glob("*.tar")):
        with tarfile.open(path) as tar:
            names = [name for name in tar.getnames() if name.endswith(".jpg")]
            expected += [(f"{path.name}/{name}", tar.extractfile(name).read()) for name in names]  # type: ignore[union-attr]
    assert len(shards) == len(expected) == 240
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda i: (shards.name(i), shards.read(i).tobytes()), range(240))) == expected


def test_shorter_side(shard_sets: Path, image_folder: Path, tmp_path: Path) -> None:
    assert ShardSet(shard_sets / "train").sides == (72, 72)
    options = Options(shorter_side=90, keep_small=True)
    pack(ImageFolder(image_folder / "val"), tmp_path, options, split="val", workers=1)
    assert ShardSet(tmp_path).sides == (72, 90)
    assert Manifest.read(tmp_path).sides == [72, 90]
    replace(Manifest.read(tmp_path), sides=[]).write(tmp_path)  # a set of an earlier day
    assert ShardSet(tmp_path).sides == (72, 90)


def test_no_shards(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ShardError, match=rf"no shards in {path}.*: make them with `python -m pipelines pack"):
            ShardSet(path)


def test_manifest_is_missing(directory: Path) -> None:
    (directory / "manifest.json").unlink()
    with pytest.raises(ShardError, match=r"has shards but no manifest.json: repeat the pack command .*pipelines index"):
        ShardSet(directory)


@pytest.mark.parametrize("harm", ["cut", "a digit", "not JSON", "a list", "empty", "bytes"])
def test_manifest_is_damaged(directory: Path, harm: str) -> None:
    path = directory / "manifest.json"
    text = path.read_text()
    harmed = {
        "cut": text[: len(text) // 2],
        "a digit": text.replace('"samples": 240', '"samples": 241'),
        "not JSON": "{'a': 1}",
        "a list": "[1]",
        "empty": "",
        "bytes": text.replace("amber", "\udcff"),
    }[harm]
    path.write_bytes(harmed.encode(errors="surrogateescape"))
    with pytest.raises(ShardError, match=r"manifest.json is damaged \(.*\): run `python -m pipelines index"):
        ShardSet(directory)


def test_manifest_of_a_later_version(directory: Path) -> None:
    path = directory / "manifest.json"
    body = json.loads(path.read_text()) | {"version": 2, "new field": 1}
    del body["checksum"]
    body["checksum"] = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(body))
    with pytest.raises(ShardError, match="format version 2, this program reads 1: pack again"):
        ShardSet(directory)


WRONG = {  # fields of a manifest, or of one of its shards, that no program of ours writes
    "samples": ["240", -1, None, 2.0, True, 1 << 70],
    "classes": ["amber", [1, 2, 3], None],
    "shards": [{}, None, ["shard-000000.tar"], [[]]],
    "mean": [[0.5, 0.5], ["a"] * 3, None, [float("nan")] * 3],
    "eigenvectors": [[1.0, 0.0, 0.0], [[1.0]], [[1.0], [1.0, 2.0]]],
    "sides": [[72], [72, 72, 72], ["72", "72"], [72.0, 72.0], [0, 72], [80, 72], 72, None],
    "stored": [[]],
    "index_sha256": [0],
    "shard name": ["../train/shard-000000.tar", "", "a\0", 7, None],
    "shard samples": ["x", -1, 1.5, None, 1 << 70],
    "shard bytes": ["x", -1, 1.5, None, 1 << 70],
    "shard sha256": [0, None],
    "shard rows": ["x", -1, None],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in WRONG.items() for value in values])
def test_manifest_that_is_whole_but_not_sane(directory: Path, field: str, value: Any) -> None:
    body = json.loads((directory / "manifest.json").read_text())
    of, _, key = field.rpartition(" ")
    (body["shards"][1] if of else body)[key] = value
    del body["checksum"]
    body["checksum"] = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (directory / "manifest.json").write_text(json.dumps(body))
    with pytest.raises(ShardError, match=r"manifest.json is damaged \(.*\): run `python -m pipelines index"):
        ShardSet(directory)


@pytest.mark.parametrize("key", ["name", "samples", "bytes", "sha256"])
def test_shard_without_a_field(directory: Path, key: str) -> None:
    manifest = Manifest.read(directory)
    del manifest.shards[2][key]
    manifest.write(directory)
    with pytest.raises(ShardError, match=rf"manifest.json is damaged \(shards.2.{key} is missing\): run `python"):
        ShardSet(directory)


def test_index_is_missing(directory: Path) -> None:
    (directory / "index.npy").unlink()
    with pytest.raises(ShardError, match=r"index.npy is missing: run `python -m pipelines index"):
        ShardSet(directory)


@pytest.mark.parametrize("place", [10, 1000, -1])
def test_index_is_damaged(directory: Path, place: int) -> None:
    data = bytearray((directory / "index.npy").read_bytes())
    data[place] ^= 1
    (directory / "index.npy").write_bytes(data)
    with pytest.raises(ShardError, match=r"index.npy is damaged or of another shard set .*: run `python -m pipelines"):
        use(directory)


def without_sums(directory: Path) -> None:
    """Turns it into an older set, whose manifest has neither checksums of rows nor sides."""
    manifest = Manifest.read(directory)
    shards = [{key: value for key, value in shard.items() if key != "rows"} for shard in manifest.shards]
    replace(manifest, shards=shards, sides=[]).write(directory)


def test_the_index_is_not_read_at_opening_but_when_its_rows_are_taken(directory: Path) -> None:
    whole = ShardSet(directory)
    first, last = np.cumsum(whole.shard_samples)[:2]  # of shard 1, and behind it
    data = bytearray((directory / "index.npy").read_bytes())
    data[-len(whole) * SAMPLE.itemsize + (first + 3) * SAMPLE.itemsize] ^= 1
    (directory / "index.npy").write_bytes(data)
    shards = ShardSet(directory)
    others = np.r_[:first, last : len(whole)]
    np.testing.assert_array_equal(shards.labels(others), whole.labels(others))
    for _ in range(2):
        with pytest.raises(ShardError, match=r"index.npy is damaged .*checksum of the rows of shard-000001.tar diff"):
            shards.sizes(np.array([0, last - 1]))
    with pytest.raises(ShardError, match=r"index.npy is damaged"):
        shards.read(int(first))
    without_sums(directory)
    with pytest.raises(
        ShardError, match=r"index.npy is damaged or of another shard set \(sha256 differs\): run `python"
    ):
        ShardSet(directory)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("offset", 0),
        ("offset", 511),
        ("offset", 1 << 30),
        ("offset", (1 << 64) - 1),
        ("size", 0),
        ("size", 1 << 30),
        ("width", 0),
        ("height", 0),
        ("label", -1),
        ("label", 3),
        ("width", 71),
        ("height", 71),
        ("both", 73),
    ],
)
def test_rows_that_are_whole_but_not_sane(directory: Path, field: str, value: int) -> None:
    """With matching checksums, as from a buggy or hostile program."""
    rows = np.load(directory / "index.npy")
    manifest = Manifest.read(directory)
    low, high = np.cumsum([shard["samples"] for shard in manifest.shards])[:2]
    for name in ("width", "height") if field == "both" else (field,):
        rows[name][low + 5] = value
    np.save(directory / "index.npy", rows)
    shards = [dict(shard) for shard in manifest.shards]
    shards[1]["rows"] = zlib.crc32(rows[low:high].tobytes())
    digest = hashlib.sha256((directory / "index.npy").read_bytes()).hexdigest()
    replace(manifest, index_sha256=digest, shards=shards).write(directory)
    opened = ShardSet(directory)
    opened.labels(np.arange(low))
    with pytest.raises(
        ShardError, match=r"row 5 of shard-000001.tar (lies outside|has no pixels|has a label|has other sides)"
    ):
        opened.labels(np.array([low, low + 5]))
    with pytest.raises(ShardError, match=r"row 5 of shard-000001.tar"):
        _ = opened.index


@pytest.mark.parametrize("harm", ["shorter", "cut", "another dtype", "another shape", "empty", "a pickle"])
def test_index_that_is_no_list_of_these_rows(directory: Path, harm: str) -> None:
    path = directory / "index.npy"
    rows = np.load(path)
    match harm:
        case "shorter":
            np.save(path, rows[:-1])
        case "cut":
            os.truncate(path, path.stat().st_size // 2)
        case "another dtype":
            np.save(path, rows["label"])
        case "another shape":
            np.save(path, rows[None])
        case "empty":
            path.write_bytes(b"")
        case "a pickle":
            np.save(path, np.array([None] * len(rows), object), allow_pickle=True)
    with pytest.raises(
        ShardError, match=r"index.npy is damaged or of another shard set \(.*\): run `python -m pipelines"
    ):
        ShardSet(directory)


def test_a_set_of_an_earlier_day_is_looked_at_whole(directory: Path) -> None:
    whole, fingerprint = ShardSet(directory).index, ShardSet(directory).fingerprint
    without_sums(directory)
    old = ShardSet(directory)
    np.testing.assert_array_equal(old.index, whole)
    assert (old.sides, old.fingerprint) == ((72, 72), fingerprint)
    replace(Manifest.read(directory), classes=["amber", "blue"]).write(directory)
    with pytest.raises(ShardError, match="label 2 is out of range for 2 classes"):
        ShardSet(directory)


def test_sides_of_an_earlier_day_leave_out_the_quarantined(image_folder: Path, tmp_path: Path) -> None:
    """They decide whether images are resized, as they did then."""
    options = Options(shorter_side=90, keep_small=True)
    pack(ImageFolder(image_folder / "val"), tmp_path, options, split="val", workers=1)
    without_sums(tmp_path)
    shards = ShardSet(tmp_path)
    starts = np.cumsum(shards.shard_samples) - shards.shard_samples
    small = np.flatnonzero(shards.sizes(np.arange(len(shards))).min(axis=1) < 90)
    of = [shards.shard_of(int(sample)) for sample in small]
    lines = [{"shard": shards.names[k], "row": int(n - starts[k])} for k, n in zip(of, small, strict=True)]
    (tmp_path / "quarantine.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert ShardSet(tmp_path).sides == (90, 90)


def test_checksums_need_no_copy(directory: Path) -> None:
    rows = np.zeros(100_000, SAMPLE)
    expected = zlib.crc32(bytes(rows.nbytes))
    tracemalloc.start()
    assert checksum(rows) == expected
    assert tracemalloc.get_traced_memory()[1] < 10_000
    tracemalloc.stop()
    assert checksum(rows[::2]) == zlib.crc32(bytes(rows.nbytes // 2))


def test_a_manifest_with_a_field_of_a_later_day(directory: Path) -> None:
    body = json.loads((directory / "manifest.json").read_text()) | {"new field": 1}
    del body["checksum"]
    body["checksum"] = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (directory / "manifest.json").write_text(json.dumps(body))
    assert len(ShardSet(directory)) == 240


@pytest.fixture
def holes(tmp_path: Path) -> None:
    """For tests with a large sparse index: skips where it would fill the disk."""
    path = tmp_path / "hole"
    with open(path, "wb") as file:
        file.truncate(1 << 24)
    if path.stat().st_blocks * 512 > 1 << 20:
        pytest.skip(f"the file system of {tmp_path} has no holes: set TMPDIR to another")
    path.unlink()


@pytest.mark.usefixtures("holes")
def test_calls_and_memory_do_not_grow_with_the_set(tmp_path: Path) -> None:
    """Opening, by k ranks, sets of n shards, the first batch of each, and one in the middle of an epoch."""

    def first_batches(directory: Path, ranks: int) -> tuple[int, int]:
        tracemalloc.start()
        with counted() as calls:
            for _ in range(ranks):
                plan = sets.open_plan(directory)
                for start in (0, len(plan) // 2):
                    sets.batch(plan, start)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return len(calls), peak

    found = {}
    for samples, shards in ((10**4, 50), (10**6, 50), (10**4, 1000)):
        directory = tmp_path / f"{samples}-{shards}"
        sets.sparse(directory, samples, shards)
        found[samples, shards] = first_batches(directory, 1)[0]
        assert first_batches(directory, 3)[0] == 3 * found[samples, shards]
    assert set(found.values()) == {found[10**4, 50]}
    assert 0 < found[10**4, 50] < 20
    sets.sparse(tmp_path / "large", 10**8, 10**4)
    assert first_batches(tmp_path / "large", 1)[1] < 40e6  # a byte a sample would be 100 MB; a manifest of 10^4 is 10


def test_a_tar_is_looked_at_when_it_is_opened(directory: Path) -> None:
    shards = ShardSet(directory)
    first = int(shards.shard_samples[0])
    shards.labels(np.arange(len(shards)))
    for tar in directory.glob("shard-00000[1-9].tar"):
        tar.unlink()
    for sample in range(first):
        shards.read(sample)
    with pytest.raises(ShardError, match=r"shard-000001.tar is missing"):
        shards.read(first)


@pytest.mark.usefixtures("holes")
def test_quarantine_without_an_entry_for_each_sample(tmp_path: Path) -> None:
    sets.sparse(tmp_path, 10**8, 10**4)
    names = ShardSet(tmp_path).names
    lines = [{"shard": names[k], "row": row, "name": "x", "reason": "y"} for k, row in ((0, 3), (0, 1), (9_999, 9_999))]
    text = "".join(json.dumps(line) + "\n" for line in [*lines, {"shard": names[7], "name": "x", "reason": "missing"}])
    (tmp_path / "quarantine.jsonl").write_text(text)
    tracemalloc.start()
    shards = ShardSet(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 40e6
    tracemalloc.stop()
    assert (len(shards), shards.quarantined.tolist()) == (10**8, [1, 3, 10**8 - 1])
    digest = hashlib.sha256(shards.manifest.index_sha256.encode() + text.encode()).hexdigest()
    assert (shards.fingerprint, shards.earlier_fingerprint) == (shards.manifest.index_sha256, digest)
    rows: tuple[Any, ...] = (10_000, -1, "1", True, 1.0, None)
    wrong = [{"shard": names[0], "row": row} for row in rows]
    for line in (
        *wrong,
        {"shard": "other.tar", "row": 0},
        {"row": 0},
        {"shard": [], "row": 0},
        "row",
        ["row"],
        1,
        None,
    ):
        (tmp_path / "quarantine.jsonl").write_text(json.dumps(line))
        with pytest.raises(ShardError, match=r"quarantine.jsonl is damaged \(.*\): run `python -m pipelines verify"):
            ShardSet(tmp_path)


def test_index_of_another_set(directory: Path, other: Path) -> None:
    shutil.copy(other / "index.npy", directory)
    with pytest.raises(ShardError, match=r"index.npy is damaged or of another shard set"):
        use(directory)


MISMATCH = (
    r"shard-000001.tar is not the tar that was indexed: put the right one back, or run `python -m pipelines index"
)


def test_tar_of_another_pack(directory: Path, other: Path) -> None:
    assert [s["samples"] for s in Manifest.read(directory).shards] == [
        s["samples"] for s in Manifest.read(other).shards
    ]
    shutil.copy(other / "shard-000001.tar", directory)
    with pytest.raises(ShardError, match=MISMATCH):
        use(directory)


def test_tar_of_the_same_size_with_other_samples(directory: Path) -> None:
    tar = directory / "shard-000001.tar"
    size = tar.stat().st_size
    tar.write_bytes(renamed(tar))
    assert tar.stat().st_size == size
    with pytest.raises(ShardError, match=MISMATCH):
        use(directory)


def test_tars_in_each_others_place(directory: Path) -> None:
    for old, new in (("0", "x"), ("1", "0"), ("x", "1")):
        (directory / f"shard-00000{old}.tar").rename(directory / f"shard-00000{new}.tar")
    with pytest.raises(ShardError, match=r"shard-000000.tar is not the tar that was indexed"):
        use(directory)


def test_tar_is_missing(directory: Path) -> None:
    (directory / "shard-000001.tar").unlink()
    with pytest.raises(ShardError, match=r"shard-000001.tar is missing: put it back or pack .* anew"):
        use(directory)


@pytest.mark.parametrize("size", [0, 100_000, -1])
def test_tar_is_truncated(directory: Path, size: int) -> None:
    tar = directory / "shard-000001.tar"
    os.truncate(tar, size if size >= 0 else tar.stat().st_size + size)
    with pytest.raises(ShardError, match=MISMATCH):
        use(directory)


def test_label_is_out_of_range(directory: Path) -> None:
    replace(Manifest.read(directory), classes=["amber", "blue"]).write(directory)
    with pytest.raises(
        ShardError,
        match=r"index.npy is damaged .*has a label out of range for 2 classes.*: run",
    ):
        use(directory)


def test_zero_images(directory: Path) -> None:
    np.save(directory / "index.npy", np.empty(0, SAMPLE))
    digest = hashlib.sha256((directory / "index.npy").read_bytes()).hexdigest()
    manifest = Manifest.read(directory)
    empty = [shard | {"samples": 0} for shard in manifest.shards]
    replace(manifest, samples=0, shards=empty, index_sha256=digest).write(directory)
    with pytest.raises(ShardError, match="holds no samples: pack it from a source that has images"):
        ShardSet(directory)


@pytest.mark.parametrize("harm", ["exchanged", "truncated", "zeroed"])
def test_tar_is_harmed_after_opening(directory: Path, harm: str) -> None:
    shards = ShardSet(directory)
    first, last = (int(i) for i in np.cumsum(shards.shard_samples)[:2])  # of shard 1, and of the one after it
    tar = directory / "shard-000001.tar"
    shards.read(first)  # it is open now
    if harm == "exchanged":
        tar.write_bytes(renamed(tar))
    elif harm == "truncated":
        os.truncate(tar, 50_000)
    else:
        tar.write_bytes(bytes(tar.stat().st_size))
    shards.read(0)
    with pytest.raises(ShardError, match=MISMATCH):
        list(map(shards.read, range(first, last)))
