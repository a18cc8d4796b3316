"""Image folders: every file becomes a sample or is named with a reason, and a repeated pack recognises its work."""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipelines import __main__ as command
from pipelines import folders
from pipelines.errors import SourceError
from pipelines.indexing import index
from pipelines.manifest import Manifest, Shard, ShardError
from pipelines.pack import Options, finished, pack
from pipelines.scanned import Scan
from pipelines.shards import ShardSet
from pipelines.sources import ImageFolder
from pipelines.statistics import of_all

OPTIONS = Options(shorter_side=16, shard_mb=0.01)


def picture(path: Path, level: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (24, 16), (level, 90, 200)).save(path)
    return path


@pytest.fixture
def src(tmp_path: Path) -> Path:
    """Two classes of four images each."""
    for i in range(8):
        picture(tmp_path / "src" / ("ant", "bee")[i % 2] / f"{i}.jpg", 20 * i)
    return tmp_path / "src"


def told(source: ImageFolder | Path) -> dict[str, str]:
    """Rejected files of a source or a set, with reasons."""
    if isinstance(source, Path):
        lines = map(json.loads, (source / "rejected.jsonl").read_bytes().splitlines())
    else:
        lines = iter(source.rejected)
    return {line["file"]: line["reason"] for line in lines}


def pipelines(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr("sys.argv", ["pipelines", *map(str, words)])
    return command.main()


# What is found. ------------------------------------------------------------------------------------------


def test_links_are_followed_and_never_in_a_circle(src: Path) -> None:
    pool = src.parent / "pool"
    for name in ("cat/0.jpg", "more/0.jpg", "more/deep/1.jpg"):
        picture(pool / name)
    links = {
        "cat": "../pool/cat",  # a class
        "ant/more": "../../pool/more",  # a part of one
        "bee/more": "../../pool/more",  # of another one, too
        "ant/up": "..",
        "ant/out": "../..",  # from there the way would lead back
        "up": ".",
        "ant/gone": "../nowhere",
        "lost": "nowhere",
        "ant/self": "self",
    }
    for name, target in links.items():
        (src / name).symlink_to(target)
    (pool / "more" / "back").symlink_to("../../src/ant")  # a circle from ant alone
    os.mkfifo(src / "ant" / "pipe")  # to read it would wait for ever
    source = ImageFolder(src)
    assert source.classes == ["ant", "bee", "cat"]
    names = [item.name for item in source.items]
    ant = [f"ant/{i}.jpg" for i in (0, 2, 4, 6)]
    more = ["0.jpg", "deep/1.jpg"]
    bee = [f"bee/{i}.jpg" for i in (1, 3, 5, 7)] + [f"bee/more/{n}" for n in ("0.jpg", *ant_below(), "deep/1.jpg")]
    assert names == [*ant, *(f"ant/more/{name}" for name in more), *bee, "cat/0.jpg"]
    assert [item.label for item in source.items] == [0] * 6 + [1] * (len(names) - 7) + [2]
    reasons = told(source)
    back = "a link to a folder above it: not followed"
    assert {name for name, reason in reasons.items() if reason == back} == {
        *("up", "ant/up", "ant/out", "ant/more/back", "bee/more/back/up", "bee/more/back/more", "bee/more/back/out"),
    }
    for name in ("ant/gone", "lost"):
        assert reasons[name] == "No such file or directory: a link that leads nowhere"
    assert "symbolic links" in reasons["ant/self"]
    assert reasons["ant/pipe"] == "neither a file nor a folder"


def ant_below() -> list[str]:
    return [f"back/{i}.jpg" for i in (0, 2, 4, 6)]


def test_litter_is_passed_over_and_named(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    litter = {
        *("__MACOSX", "lost+found", ".Trash-1000", "ant/.ipynb_checkpoints", "bee/@eaDir", "ant/.DS_Store"),
        *("ant/._0.jpg", "bee/Thumbs.db", ".hidden"),
    }
    for name in litter:
        picture((src / name) / "0.jpg") if "." not in name[4:] or "ipynb" in name else (src / name).write_bytes(b"x")
    (src / "empty").mkdir()
    picture(src / "odd" / "0.jpg").write_bytes(b"garbage")
    assert pipelines(monkeypatch, "pack", "imagefolder", src, tmp_path / "set", "--shorter-side", 16) == 0
    out, err = capsys.readouterr()
    assert f"{src}: 4 classes: ant, bee, empty, odd\n" in err
    assert f"{tmp_path}/set: there is no image of empty, odd; labels count them as classes\n" in err
    assert "8 images of 4 classes in 1 shards, 0 MB; 1 rejected, 9 passed over, see " in out
    reasons = told(tmp_path / "set")
    assert {name for name, reason in reasons.items() if reason == "passed over: not an image"} == litter
    assert set(reasons) == {*litter, "odd/0.jpg"}
    assert ShardSet(tmp_path / "set").index["label"].tolist().count(0) == 4


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("where", ["src", "ant", "deep"])
def test_a_folder_that_cannot_be_read_is_an_error(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, where: str
) -> None:
    """Root can read every folder, so the system call is patched."""
    picture(src / "ant" / "deep" / "9.jpg")
    scandir = os.scandir

    def refusing(path: Any) -> Any:
        if os.path.basename(os.fsdecode(path)) == where:
            raise OSError(number, os.strerror(number), path)
        return scandir(path)

    monkeypatch.setattr(folders.os, "scandir", refusing)
    with pytest.raises(SourceError) as error:
        pack(ImageFolder(src), tmp_path / "set", OPTIONS, split="x", workers=1)
    folder = {"src": src, "ant": src / "ant", "deep": src / "ant" / "deep"}[where]
    remedy = "fix that and repeat the command, or move it away"
    assert str(error.value) == f"the folder {folder} cannot be read ({os.strerror(number)}): {remedy}"
    assert not (tmp_path / "set").exists()


class Mounted(ImageFolder):
    """A folder on a file system that fails while a file `down` lies beside it: for workers, or for all."""

    def load(self, reference: str) -> bytes:
        down = self.root.parent / "down"
        who = down.read_text() if down.exists() else ""
        if reference == "bee/3.jpg" and (who == "all" or (who and multiprocessing.parent_process())):
            raise OSError(errno.EIO, os.strerror(errno.EIO), self.root / reference)
        return super().load(reference)


@pytest.mark.parametrize("who", ["workers", "all"])
def test_a_file_that_cannot_be_read_is_no_damaged_image(src: Path, tmp_path: Path, who: str) -> None:
    """The pack ends, and the same command goes on when the mount is back; the trial of sizes must not pass it over,
    since another number of shards would mix two packs."""
    (tmp_path / "down").write_text(who)
    message = rf"the file {src}/bee/3\.jpg cannot be read \(Input/output error\): fix that and repeat the command, or"
    with pytest.raises(SourceError, match=message):
        pack(Mounted(src), tmp_path / "set", OPTIONS, split="x", workers=1)
    assert not (tmp_path / "set" / "manifest.json").exists()
    (tmp_path / "down").unlink()
    assert pack(Mounted(src), tmp_path / "set", OPTIONS, split="x", workers=1).samples == 8
    assert told(tmp_path / "set") == {}


def test_a_class_whose_name_is_not_utf8(src: Path, tmp_path: Path) -> None:
    """It cannot be stored in a manifest, so it is refused at once. File names are not kept and may be anything."""
    latin = os.fsencode(src) + b"/caf\xe9"
    os.mkdir(latin)
    with pytest.raises(SourceError) as error:
        pack(ImageFolder(src), tmp_path / "set", OPTIONS, split="x", workers=1)
    assert str(error.value) == rf"the class folder b'caf\xe9' in {src} has a name that is not UTF-8: rename it"
    assert not (tmp_path / "set").exists()
    os.rename(latin, os.fsencode(src) + "/café".encode())
    for name in (b"ant/\xe9.jpg", "café/ü.jpg".encode()):
        shutil.copy(src / "ant" / "0.jpg", os.path.join(os.fsencode(src), name))
    with open(os.path.join(os.fsencode(src), b"bee/\xe9.jpg"), "wb") as file:
        file.write(b"garbage")
    manifest = pack(ImageFolder(src), tmp_path / "set", OPTIONS, split="x", workers=1)
    assert (manifest.samples, manifest.classes) == (10, ["ant", "bee", "café"])
    assert list(told(tmp_path / "set")) == ["bee/\udce9.jpg"]


def test_a_tar_whose_name_is_not_utf8(src: Path, tmp_path: Path) -> None:
    pack(ImageFolder(src), tmp_path / "set", OPTIONS, split="x", workers=1)
    os.rename(tmp_path / "set" / "shard-000000.tar", os.fsencode(tmp_path / "set") + b"/\xe9.tar")
    with pytest.raises(ShardError, match=r"the tar b'\\xe9.tar' in .* has a name that is not UTF-8, or not in one"):
        index(tmp_path / "set", classes=None, split="x", workers=1)


def test_splits_in_place_of_classes(src: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for name in ("train", "validation", "Test"):
        shutil.copytree(src, tmp_path / "photos" / name)
    with pytest.raises(SourceError) as error:
        pack(ImageFolder(tmp_path / "photos"), tmp_path / "set", OPTIONS, split="x", workers=1)
    photos = f"{tmp_path}/photos"
    assert str(error.value) == (
        f"the folders of {photos}, Test, train, validation, look like splits and not like classes: pack {photos}/Test "
        f"and {photos}/train each by itself, or rename them if they are classes"
    )
    (tmp_path / "photos" / "tram").mkdir()  # then they may be classes
    ImageFolder(tmp_path / "photos").refuse_splits()
    for names in (("train2017", "val2017"), ("seg_train", "seg_test"), ("training_set", "test_set")):
        for name in names:
            (tmp_path / names[0] / "src" / name).mkdir(parents=True)
        with pytest.raises(SourceError, match="look like splits"):
            ImageFolder(tmp_path / names[0] / "src").refuse_splits()


# What was packed is known again. -----------------------------------------------------------------------


def test_a_source_that_has_changed(src: Path, tmp_path: Path) -> None:
    """A repaired image has another size and is never taken for the packed one; times are not part of a set."""
    whole = (src / "ant" / "0.jpg").read_bytes()
    (src / "ant" / "0.jpg").write_bytes(whole[:300])
    out = tmp_path / "set"
    manifest = pack(ImageFolder(src), out, OPTIONS, split="x", workers=1)
    assert list(told(out)) == ["ant/0.jpg"]
    os.utime(src / "bee" / "1.jpg", (0, 0))
    assert pack(ImageFolder(src), out, OPTIONS, split="x", workers=1) == manifest

    def refusal() -> str:
        with pytest.raises(ShardError) as error:
            pack(ImageFolder(src), out, OPTIONS, split="x", workers=1)
        return str(error.value)

    (src / "ant" / "0.jpg").write_bytes(whole)
    remedy = f"pack into another directory, or remove {out} with all of these first"
    held = f"{out} already holds 7 images in {len(manifest.shards)} shards, packed before the source changed"
    assert refusal() == f"{held} (1 of another size: ant/0.jpg): {remedy}"
    picture(src / "bee" / "9.jpg")
    (src / "bee" / "3.jpg").unlink()
    assert refusal() == f"{held} (1 of another size: ant/0.jpg; 1 new: bee/9.jpg; 1 gone): {remedy}"
    (out / "files.npy").write_bytes(b"garbage")
    assert "packed from another source, or into a directory of another name: pack into another directory" in refusal()
    index(out, classes=None, split="x", workers=1)
    assert "made into a set by `index`: pack into another directory, or remove" in refusal()


def test_the_same_files_at_another_time_give_the_same_bytes(src: Path, tmp_path: Path) -> None:
    pack(ImageFolder(src), tmp_path / "one", OPTIONS, split="x", workers=1)
    shutil.copytree(src, tmp_path / "copy", copy_function=shutil.copyfile)
    pack(ImageFolder(tmp_path / "copy"), tmp_path / "two", OPTIONS, split="x", workers=1)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_changed_files_of_the_same_size_are_counted(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("pack", "imagefolder", src, tmp_path / "set", "--shorter-side", 16)
    assert pipelines(monkeypatch, *words) == 0
    later = (tmp_path / "set" / "manifest.json").stat().st_mtime + 10
    os.utime(src / "ant" / "0.jpg", (later, later))
    capsys.readouterr()
    assert pipelines(monkeypatch, *words) == 0
    line = (
        "; already packed, 1 files of the source have a later date: to have it otherwise, pack into another directory\n"
    )
    assert capsys.readouterr().out.endswith(line)


def test_a_set_of_an_earlier_day_is_known_by_the_names_that_day_saw(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without sizes, without files behind links, with litter: it counts as packed, and what it lacks is reported."""
    out, options = tmp_path / "set", Options(shorter_side=16)
    manifest = pack(ImageFolder(src), out, options, split="set", workers=1)
    picture(tmp_path / "pool" / "0.jpg")
    (src / "ant" / "pool").symlink_to(tmp_path / "pool")
    (src / "ant" / ".DS_Store").touch()
    classes, items = ImageFolder(src)._before()
    names = [f"ant/{name}" for name in (".DS_Store", "0.jpg", "2.jpg", "4.jpg", "6.jpg")]
    assert [item.name for item in items] == names + [f"bee/{i}.jpg" for i in (1, 3, 5, 7)]
    stored = {"shorter_side": 16, "quality": 90, "shard_mb": 64, "seed": 0}
    kept = hashlib.sha256(json.dumps([items, classes, "set", stored]).encode()).hexdigest()
    then = hashlib.sha256(f"{kept}, small images enlarged".encode()).hexdigest()
    (out / "files.npy").unlink()
    replace(manifest, source=then).write(out)
    assert finished(ImageFolder(src), out, options, split="set") == Manifest.read(out)
    assert pipelines(monkeypatch, "pack", "imagefolder", src, out, "--shorter-side", 16) == 0
    line = "; already packed, without 1 files that are found now, with 1 files that are passed over now: "
    assert line in capsys.readouterr().out


# Where a set is made. -----------------------------------------------------------------------------------


def test_nothing_is_packed_among_what_is_the_users(src: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    shutil.copytree(src, photos)
    with pytest.raises(ShardError) as error:
        pack(ImageFolder(src), photos, OPTIONS, split="x", workers=1)
    assert str(error.value) == (
        f"{photos} holds ant, bee, which `pack` did not make: pack into an empty or a new directory"
    )
    assert sorted(os.listdir(photos)) == ["ant", "bee"]
    with pytest.raises(
        ShardError, match=r"lies in .*/src, whose folders are the classes: pack into a directory beside"
    ):
        pack(ImageFolder(src), src / "packed", OPTIONS, split="x", workers=1)
    assert sorted(os.listdir(src)) == ["ant", "bee"]
    (src / "linked").symlink_to(tmp_path / "pool")
    (tmp_path / "pool").mkdir()
    for inside in (src / "linked" / "set", tmp_path / "pool" / "set"):  # however it is reached
        with pytest.raises(ShardError, match="lies in"):
            pack(ImageFolder(src), inside, OPTIONS, split="x", workers=1)
    assert not list((tmp_path / "pool").iterdir())
    (src / "linked").unlink()
    for name in ("index.npy", "files.npy", "rejected.jsonl", "manifest.json"):  # of another program
        own = tmp_path / f"own {name}"
        own.mkdir()
        (own / name).write_text("{}")
        with pytest.raises(ShardError, match=r"which `pack` did not make|is another program's: move it away"):
            pack(ImageFolder(src), own, OPTIONS, split="x", workers=1)
        assert (own / name).read_text() == "{}"
    (tmp_path / "file").touch()
    with pytest.raises(ShardError, match="file is a file: name a directory to pack into"):
        pack(ImageFolder(src), tmp_path / "file", OPTIONS, split="x", workers=1)
    (tmp_path / "set" / "slurm").mkdir(parents=True)  # of `slurm submit pack`
    (tmp_path / "set" / ".DS_Store").touch()
    assert pack(ImageFolder(src), tmp_path / "set", OPTIONS, split="x", workers=1).samples == 8
    os.remove(tmp_path / "set" / "manifest.json")  # whose shards are these?
    with pytest.raises(ShardError, match=r"holds files\.npy, .*shard-000000\.tar.*, which `pack` did not make"):
        pack(ImageFolder(src), tmp_path / "set", OPTIONS, split="x", workers=1)


def test_the_deviation_of_a_channel_that_never_varies() -> None:
    """At any level: a rounding error below zero would give NaN, and a manifest that is reported as damaged."""
    for level in range(256):
        pixels = 16 * 16
        shard: Shard = {"name": "x.tar", "samples": 1, "bytes": 0, "sha256": ""}
        scan = Scan(shard, pixels, [level * pixels] * 3, [[level * level * pixels] * 3] * 3, [])
        assert of_all([], [scan]).std == [0, 0, 0], level
