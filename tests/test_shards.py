"""Shard sets that cannot be used: each says in one sentence what is wrong and what to do."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipelines.pack import Options, pack
from pipelines.shards import SAMPLE, Manifest, ShardError, ShardSet
from pipelines.sources import ImageFolder


@pytest.fixture
def directory(shard_sets: Path, tmp_path: Path) -> Path:
    """A shard set of its own for a test that harms it."""
    shutil.copytree(shard_sets / "train", tmp_path / "set")
    return tmp_path / "set"


@pytest.fixture(scope="module")
def other(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images in another order: as many samples in each shard, but others."""
    out = tmp_path_factory.mktemp("other") / "set"
    options = Options(shorter_side=72, shard_mb=0.2, seed=1)
    pack(ImageFolder(image_folder / "train"), out, options, split="train", workers=2)
    return out


def renamed(tar: Path) -> bytes:
    """The same tar with other keys: not a byte longer or shorter."""
    out = io.BytesIO()
    with tarfile.open(tar) as old, tarfile.open(fileobj=out, mode="w") as new:
        for member in old.getmembers():
            data = old.extractfile(member)
            member.name = f"9{member.name[1:]}"
            new.addfile(member, data)
    return out.getvalue()


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
    pack(ImageFolder(image_folder / "val"), tmp_path, Options(shorter_side=90), split="val", workers=1)
    assert ShardSet(tmp_path).sides == (72, 90)  # those of 72 were not enlarged


def test_no_shards(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ShardError, match=rf"no shards in {path}: make them with `python -m pipelines pack"):
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
    with pytest.raises(ShardError, match="format version 2, this program reads 1: pack anew"):
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
        ShardSet(directory)


def test_index_of_another_set(directory: Path, other: Path) -> None:
    shutil.copy(other / "index.npy", directory)
    with pytest.raises(ShardError, match=r"index.npy is damaged or of another shard set"):
        ShardSet(directory)


MISMATCH = (
    r"shard-000001.tar is not the tar that was indexed: put the right one back, or run `python -m pipelines index"
)


def test_tar_of_another_pack(directory: Path, other: Path) -> None:
    assert [s["samples"] for s in Manifest.read(directory).shards] == [
        s["samples"] for s in Manifest.read(other).shards
    ]
    shutil.copy(other / "shard-000001.tar", directory)
    with pytest.raises(ShardError, match=MISMATCH):
        ShardSet(directory)


def test_tar_of_the_same_size_with_other_samples(directory: Path) -> None:
    tar = directory / "shard-000001.tar"
    size = tar.stat().st_size
    tar.write_bytes(renamed(tar))
    assert tar.stat().st_size == size
    with pytest.raises(ShardError, match=MISMATCH):
        ShardSet(directory)


def test_tars_in_each_others_place(directory: Path) -> None:
    for old, new in (("0", "x"), ("1", "0"), ("x", "1")):
        (directory / f"shard-00000{old}.tar").rename(directory / f"shard-00000{new}.tar")
    with pytest.raises(ShardError, match=r"shard-000000.tar is not the tar that was indexed"):
        ShardSet(directory)


def test_tar_is_missing(directory: Path) -> None:
    (directory / "shard-000001.tar").unlink()
    with pytest.raises(ShardError, match=r"shard-000001.tar is missing: put it back or pack .* anew"):
        ShardSet(directory)


@pytest.mark.parametrize("size", [0, 100_000, -1])
def test_tar_is_truncated(directory: Path, size: int) -> None:
    tar = directory / "shard-000001.tar"
    os.truncate(tar, size if size >= 0 else tar.stat().st_size + size)
    with pytest.raises(ShardError, match=MISMATCH):
        ShardSet(directory)


def test_label_is_out_of_range(directory: Path) -> None:
    replace(Manifest.read(directory), classes=["amber", "blue"]).write(directory)
    with pytest.raises(ShardError, match="label 2 is out of range for 2 classes"):
        ShardSet(directory)


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
