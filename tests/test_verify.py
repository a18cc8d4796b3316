"""`verify` finds bad samples, which are then never shown, and no damage silently gives a wrong label."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from pipelines import quarantine
from pipelines.__main__ import main
from pipelines.indexing import index
from pipelines.manifest import Manifest, ShardError
from pipelines.pack import Options, pack
from pipelines.rows import HEADER, checksum
from pipelines.shards import BadSample, ShardSet
from pipelines.sources import ImageFolder
from pipelines.verify import _Task, _verify_shard, verify
from tests.conftest import CLASSES, SIZES, TINTS, photograph

pytestmark = pytest.mark.integration


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Twelve images in one shard."""
    rng = np.random.default_rng(5)
    for name, tint in zip(CLASSES, TINTS, strict=True):
        (tmp_path / "folder" / name).mkdir(parents=True)
        for i in range(4):
            photograph(rng, *SIZES[i], tint).save(tmp_path / "folder" / name / f"{i}.jpg")
    pack(ImageFolder(tmp_path / "folder"), tmp_path / "set", Options(shorter_side=72), split="train", workers=1)
    return tmp_path / "set"


def poke(path: Path, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def test_a_good_set_has_no_problems(shard_sets: Path) -> None:
    assert verify(shard_sets / "val", workers=2) == []
    assert not (shard_sets / "val" / "quarantine.jsonl").exists()


def test_bad_samples_are_named_and_left_out(small: Path) -> None:
    """One that does not decode, one with another label than the index says, one with another label and other bytes."""
    before = ShardSet(small)
    tar = small / before.names[0]
    rows = before.index.copy()
    poke(tar, int(rows[2]["offset"]), b"garbage!")
    label = int(rows[7]["offset"]) - HEADER - HEADER  # .cls comes before .jpg: header, one block, header of the image
    wrong = (int(rows[7]["label"]) + 1) % 3
    poke(tar, label, str(wrong).encode())
    label = int(rows[9]["offset"]) - HEADER - HEADER
    poke(tar, label, str((int(rows[9]["label"]) + 1) % 3).encode())
    poke(tar, int(rows[9]["offset"]) + 15, b"!")  # a density in its JFIF header: it decodes all the same

    problems = verify(small, workers=1)
    assert [p.get("row") for p in problems] == [None, 2, 7, 9]
    assert problems[0]["reason"] == "its sha256 differs: copy it again"
    assert "cannot be read" in problems[1]["reason"]
    assert problems[1]["name"] in before.name(2)
    assert problems[2]["reason"] == "label differ from the index"
    assert problems[3]["reason"] == "label and crc differ from the index"

    after = ShardSet(small)
    assert after.quarantined.tolist() == [2, 7, 9]
    assert after.good.tolist() == [i for i in range(12) if i not in (2, 7, 9)]
    # A run that has met some of them goes on in the same order.
    np.testing.assert_array_equal(after.index, rows)
    assert after.shard_samples.tolist() == [12]
    assert after.fingerprint == before.fingerprint


def test_quarantine_over_several_shards(shard_sets: Path, tmp_path: Path) -> None:
    directory = tmp_path / "set"
    shutil.copytree(shard_sets / "train", directory)
    before = ShardSet(directory)
    ends = np.cumsum(before.shard_samples)
    bad = {0: 0, 1: int(before.shard_samples[1]) - 1, 3: 2}  # shard: row
    lines = [json.dumps({"shard": before.names[s], "row": row, "name": "x", "reason": "y"}) for s, row in bad.items()]
    (directory / "quarantine.jsonl").write_text("\n".join(lines) + "\n")
    after = ShardSet(directory)
    dropped = {int(ends[s] - before.shard_samples[s]) + row for s, row in bad.items()}
    assert after.quarantined.tolist() == sorted(dropped)
    assert [after.name(i) for i in range(len(after))] == [before.name(i) for i in range(len(before))]
    np.testing.assert_array_equal(after.index, before.index)


def test_missing_and_truncated_tars(shard_sets: Path, tmp_path: Path) -> None:
    directory = tmp_path / "set"
    shutil.copytree(shard_sets / "train", directory)
    names = ShardSet(directory).names
    (directory / names[0]).unlink()
    whole = (directory / names[1]).read_bytes()
    (directory / names[1]).write_bytes(whole[: len(whole) // 2])
    problems = verify(directory, workers=1)
    assert (problems[0]["name"], problems[0]["reason"]) == (names[0], "is missing")
    cut = [p for p in problems if p["shard"] == names[1]]
    assert any("not a whole, uncompressed tar" in p["reason"] for p in cut)
    assert sum("row" in p for p in cut) > 3


def test_a_tar_that_cannot_be_read_hides_no_other(shard_sets: Path, tmp_path: Path) -> None:
    directory = tmp_path / "set"
    shutil.copytree(shard_sets / "val", directory)
    shards = ShardSet(directory)
    poke(directory / shards.names[2], int(shards.index["offset"][shards.shard_samples[:2].sum()]), b"garbage!")
    (directory / shards.names[1]).unlink()
    (directory / shards.names[1]).mkdir()
    one, _, two = verify(directory, workers=1)
    assert one["name"] == shards.names[1]
    assert one["reason"].endswith("is a folder: put the right file there")
    assert (two["shard"], two["row"]) == (shards.names[2], 0)


@pytest.mark.parametrize("what", ["rows", "sides"])
def test_a_manifest_that_does_not_fit_the_index(small: Path, what: str) -> None:
    manifest = Manifest.read(small)
    if what == "rows":
        manifest.shards[0]["rows"] ^= 1
    else:
        manifest.sides[0] -= 1
    manifest.write(small)
    with pytest.raises(ShardError, match=rf"index.npy and manifest.json disagree \(.*{what}.*\): run `python -m pip"):
        verify(small, workers=1)


def insane(directory: Path, *, sums: bool) -> None:
    """Row 3 has an image without pixels, and all checksums match that, if there are any."""
    rows = np.load(directory / "index.npy")
    rows["width"][3] = 0
    np.save(directory / "index.npy", rows)
    manifest = Manifest.read(directory)
    (shard,) = (dict(shard) for shard in manifest.shards)
    shard["rows"] = checksum(rows)
    if not sums:
        del shard["rows"]
    digest = hashlib.sha256((directory / "index.npy").read_bytes()).hexdigest()
    sides = manifest.sides if sums else []
    replace(manifest, shards=[shard], index_sha256=digest, sides=sides).write(directory)


def test_the_row_that_cannot_be_right_is_named(small: Path) -> None:
    insane(small, sums=True)
    with pytest.raises(ShardError, match=r"disagree \(row 3 of shard-000000.tar has no pixels\): run `python"):
        verify(small, workers=1)


def test_an_insane_row_of_an_earlier_day_is_left_out(small: Path) -> None:
    insane(small, sums=False)
    (problem,) = verify(small, workers=1)
    assert (problem["row"], problem["reason"]) == (3, "width differ from the index")
    shards = ShardSet(small)
    assert (len(shards), shards.quarantined.tolist(), shards.sides) == (12, [3], (72, 72))
    shards.labels(shards.good)


def test_a_new_index_has_no_quarantine_of_an_old_one(image_folder: Path, tmp_path: Path) -> None:
    options = Options(shorter_side=72, shard_mb=0.2)
    (tmp_path / "folder").mkdir()
    for name in CLASSES:
        (tmp_path / "folder" / name).mkdir()
        for path in sorted((image_folder / "train" / name).iterdir())[:40]:
            shutil.copy(path, tmp_path / "folder" / name)
    out = tmp_path / "set"
    pack(ImageFolder(tmp_path / "folder"), out, options, split="x", workers=1)
    shards = ShardSet(out)
    for sample in (3, 50, 51, 119):
        row = shards.index[sample]
        poke(out / shards.names[shards.shard_of(sample)], int(row["offset"]), bytes(int(row["size"])))
    names = [shards.name(sample) for sample in range(120) if sample not in (3, 50, 51, 119)]
    assert sum("row" in problem for problem in verify(out, workers=1)) == 4
    assert ShardSet(out).quarantined.tolist() == [3, 50, 51, 119]
    index(out, classes=None, split="x", workers=1)  # which leaves out what does not decode
    assert not (out / "quarantine.jsonl").exists()
    shards = ShardSet(out)
    assert (len(shards), len(shards.quarantined)) == (116, 0)
    assert [shards.name(sample) for sample in range(len(shards))] == names


LINE = {"shard": "shard-000000.tar", "row": 3, "name": "x", "reason": "a person said so"}


@pytest.mark.parametrize("bound", [False, True])
def test_the_same_index_again_keeps_the_quarantine(small: Path, bound: bool) -> None:
    """Also one of an earlier version, which names no index."""
    head = [{"index": Manifest.read(small).index_sha256}] if bound else []
    (small / "quarantine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*head, LINE]))
    fingerprint = ShardSet(small).fingerprint
    index(small, classes=None, split="train", workers=1)
    assert (ShardSet(small).quarantined.tolist(), ShardSet(small).fingerprint) == ([3], fingerprint)


def test_a_quarantine_of_another_index_hits_nobody(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as after copying a set repaired elsewhere over this one."""
    path = small / "quarantine.jsonl"
    quarantine.write(small, "0" * 64, [LINE])
    for rank, told in (("0", 1), ("1", 0)):  # one of the ranks of a run tells
        monkeypatch.setenv("RANK", rank)
        shards = ShardSet(small)
        assert (len(shards), len(shards.quarantined), shards.earlier_fingerprint) == (12, 0, "")
        line = f"{path} belongs to another index and is not used: run `python -m pipelines verify {small}`\n"
        assert capsys.readouterr().err.count(line) == told
    index(small, classes=None, split="train", workers=1)
    assert not path.exists()
    quarantine.write(small, Manifest.read(small).index_sha256, [LINE])
    assert json.loads(path.read_text().splitlines()[0]) == {"index": Manifest.read(small).index_sha256}
    assert ShardSet(small).quarantined.tolist() == [3]
    for head in ("[", '{"index"', "1\n[]"):
        path.write_text(head)
        with pytest.raises(ShardError, match=r"quarantine.jsonl is damaged \(.*\): run `python -m pipelines verify"):
            ShardSet(small)


def test_what_verify_finds_on_a_read_only_file_system(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("sys.argv", ["pipelines", "verify", str(small), "--workers=1"])
    monkeypatch.setattr(quarantine, "write_atomically", read_only)
    monkeypatch.setattr(Path, "unlink", read_only)  # as the kernel says of a file that is not there, too
    assert main() == 0
    assert "all samples decode" in capsys.readouterr().out
    shards = ShardSet(small)
    poke(small / shards.names[0], int(shards.index["offset"][2]), b"garbage!")
    name = shards.name(2).removesuffix(".jpg")
    assert main() == 2
    told = capsys.readouterr()
    assert told.out.startswith("shard-000000.tar: its sha256 differs")
    assert f"{name}: cannot be read: cannot identify image file\n" in told.out
    assert "2 problems in " in told.err
    assert "but their list could not be written (Read-only file system): training will meet" in told.err


def test_reasons_are_the_same_in_every_process(small: Path) -> None:
    shards = ShardSet(small)
    poke(small / shards.names[0], int(shards.index["offset"][2]), b"garbage!")
    first, second = (verify(small, workers=1) and (small / "quarantine.jsonl").read_bytes() for _ in range(2))
    assert first == second
    assert b"cannot identify image file" in first
    assert b" at 0x" not in first
    index(small, classes=None, split="train", workers=1)
    (line,) = (small / "rejected.jsonl").read_text().splitlines()
    assert json.loads(line)["reason"] == "cannot identify image file"


@pytest.mark.integration
def test_fuzz_never_a_wrong_label(small: Path, tmp_path: Path) -> None:
    """Two thousand times: flip bytes in, or cut, the tar, the index or the manifest. Either there is a sentence, or all
    labels that can be read are the right ones under the right names."""
    rng = random.Random(0)
    truth = ShardSet(small)
    tar = truth.names[0]
    labels = {truth.name(i): int(truth.index[i]["label"]) for i in range(12)}
    pristine = {name: (small / name).read_bytes() for name in (tar, "index.npy", "manifest.json")}
    outcomes = {"sentence": 0, "right": 0}
    for _ in range(2000):
        name = rng.choice(sorted(pristine))
        data = bytearray(pristine[name])
        if rng.random() < 0.3:
            del data[rng.randrange(len(data)) :]
        else:
            for _ in range(rng.choice([1, 1, 2, 20])):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (small / name).write_bytes(data)
        try:
            opened = ShardSet(small)
            for i in range(len(opened)):
                opened.read(i)
                assert labels[opened.name(i)] == opened.index[i]["label"]
            assert opened.classes == list(CLASSES)
            outcomes["right"] += 1
        except (ShardError, BadSample) as error:
            assert str(error)
            assert "\n" not in str(error)
            outcomes["sentence"] += 1
        (small / name).write_bytes(pristine[name])
    assert min(outcomes.values()) > 100, outcomes


def test_fuzz_verify_names_what_it_finds(small: Path) -> None:
    """A few hundred damaged tars: verify never raises, and calls every one of them damaged."""
    rng = random.Random(1)
    tar = small / ShardSet(small).names[0]
    task = _Task(tar, ShardSet(small).manifest.shards[0]["sha256"], range(12))
    pristine = tar.read_bytes()
    for _ in range(300):
        data = bytearray(pristine)
        if rng.random() < 0.3:
            del data[rng.randrange(len(data)) :]
        for _ in range(rng.choice([1, 5, 50])):
            if data:
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        tar.write_bytes(data)
        problems = _verify_shard(task, tick=lambda: None)
        assert problems
        assert all(p["reason"] and p["name"] for p in problems)


def test_what_dali_cannot_decode_is_found(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A WebP with an alpha channel and EXIF: Pillow shows it. So `verify` is a remedy for all that training met; and
    `index` knows it, too. Several of them in one batch have ended DALI in SIGSEGV."""
    exif = Image.Exif()
    exif[0x010F] = "a maker"
    picture = io.BytesIO()
    Image.new("RGBA", (90, 90), (200, 100, 50, 128)).save(picture, "WEBP", lossless=True, exif=exif)
    photo = (image_folder / "val" / "amber" / "000.jpg").read_bytes()
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as tar:
        for i in range(3):
            tar.write({"__key__": f"{i}", "jpg": photo, "cls": "0"})
        for i in range(8):
            tar.write({"__key__": f"odd{i}", "webp": picture.getvalue(), "cls": "0"})
    index(tmp_path, classes=None, split="x", workers=1)
    assert "8 samples cannot be decoded by DALI" in capsys.readouterr().err
    assert ShardSet(tmp_path).quarantined.tolist() == list(range(3, 11))
    problems = verify(tmp_path, workers=1)
    reason = "cannot be decoded by DALI: write it as a plain JPEG"
    assert problems[0] == {"shard": "a.tar", "row": 3, "name": "a.tar/odd0.webp", "reason": reason}
    assert len(problems) == 8
    assert ShardSet(tmp_path).quarantined.tolist() == list(range(3, 11))
