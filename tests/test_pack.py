"""Packing: samples survive unchanged, bad files are named, and a killed pack ends in the same bytes."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import tracemalloc
import warnings
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import functional as F
from webdataset.tariterators import group_by_keys

from pipelines import origin, sources
from pipelines.errors import SourceError
from pipelines.indexing import index
from pipelines.manifest import Manifest, ShardError
from pipelines.origin import Fingerprints
from pipelines.pack import Options, finished, pack
from pipelines.scanned import WORK
from pipelines.shards import ShardSet
from pipelines.sources import ImageFolder, to_jpeg
from pipelines.tars import passed_over
from pipelines.torchvision_sets import Torchvision
from pipelines.unfinished import Work, working_folder
from pipelines.verify import verify
from tests.conftest import CLASSES, TINTS, photograph

ROOT = Path(__file__).parent.parent


def samples(directory: Path) -> list[dict[str, Any]]:
    tars = [str(tar) for tar in sorted(directory.glob("*.tar"))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves its files to the garbage collector
        return list(webdataset.WebDataset(tars, shardshuffle=False))


def pixels(data: bytes) -> NDArray[np.float64]:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), np.float64)


def members(path: Path) -> list[tarfile.TarInfo]:
    with tarfile.open(path) as tar:
        return tar.getmembers()


def files(directory: Path) -> dict[str, str]:
    """Hashes of all files under a directory."""
    found = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def rejections(directory: Path) -> dict[str, str]:
    lines = map(json.loads, (directory / "rejected.jsonl").read_text().splitlines())
    return {line["file"]: line["reason"] for line in lines}


def until(condition: Any, seconds: float = 30) -> Any:
    end = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.001)
    return result


def test_webdataset_reads_what_was_packed(shard_sets: Path, image_folder: Path) -> None:
    read = samples(shard_sets / "train")
    assert len(read) == 240
    found = set()
    for sample in read:
        name, number = sample["__key__"].split("-")[1:]
        path = image_folder / "train" / name / f"{number}.jpg"
        found.add(path)
        assert sample["cls"] == str(CLASSES.index(name)).encode()
        original = Image.open(io.BytesIO(path.read_bytes()))
        if min(original.size) == 72:
            assert sample["jpg"] == path.read_bytes()
        else:  # "the shorter side was of length 256": torchvision's resize is the reference
            expected = np.asarray(F.resize(original, [72]), np.float64)
            assert pixels(sample["jpg"]).shape == expected.shape
            assert abs(pixels(sample["jpg"]) - expected).mean() < 4  # what JPEG loses of the grain
    assert len(found) == 240
    assert sorted(s["cls"] for s in read[:30]) != [s["cls"] for s in read[:30]]  # shuffled


def test_manifest_describes_the_set(shard_sets: Path) -> None:
    directory = shard_sets / "train"
    manifest = Manifest.read(directory)
    read = samples(directory)
    flat = np.concatenate([pixels(sample["jpg"]).reshape(-1, 3) for sample in read]) / 255
    np.testing.assert_allclose(manifest.mean, flat.mean(0), rtol=1e-7)
    np.testing.assert_allclose(manifest.std, flat.std(0), rtol=1e-7)
    # The definition, and not a vector itself, since its sign is free: C v = l v, with orthonormal v, largest l first.
    covariance, vectors = np.cov(flat.T, bias=True), np.array(manifest.eigenvectors)
    np.testing.assert_allclose(covariance @ vectors, vectors * manifest.eigenvalues, atol=1e-8)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(3), atol=1e-8)
    assert manifest.eigenvalues == sorted(manifest.eigenvalues, reverse=True)

    assert (manifest.split, manifest.samples, manifest.classes) == ("train", 240, list(CLASSES))
    assert len(manifest.shards) >= 4
    for shard in manifest.shards:
        tar = directory / shard["name"]
        assert shard["bytes"] == tar.stat().st_size
        assert shard["sha256"] == hashlib.sha256(tar.read_bytes()).hexdigest()
        assert shard["samples"] == len(members(tar)) / 2
    rows = np.load(directory / "index.npy")
    ends = np.cumsum([shard["samples"] for shard in manifest.shards])
    pieces = np.split(rows, ends[:-1])
    assert [shard["rows"] for shard in manifest.shards] == [zlib.crc32(piece.tobytes()) for piece in pieces]
    assert manifest.sides == [72, 72]
    whole = io.BytesIO()  # written shard by shard, and yet as numpy would
    np.save(whole, rows)
    assert whole.getvalue() == (directory / "index.npy").read_bytes()
    stored = {"shorter_side": 72, "quality": 90, "shard_mb": 0.2, "seed": 0, "keep_small": False}
    assert manifest.stored == stored | {"unchanged": 60}, "one of four sizes has a shorter side of 72"
    assert sorted(files(directory)) == sorted(
        ["files.npy", "index.npy", "manifest.json", "rejected.jsonl", *(shard["name"] for shard in manifest.shards)]
    )


@pytest.mark.integration
def test_any_number_of_workers_gives_the_same_bytes(shard_sets: Path, image_folder: Path, tmp_path: Path) -> None:
    for workers in (1, 3):
        out = tmp_path / str(workers)
        options = Options(shorter_side=72, shard_mb=0.2)
        pack(ImageFolder(image_folder / "train"), out, options, split="train", workers=workers)
        assert files(out) == files(shard_sets / "train")
    another = Options(shorter_side=72, shard_mb=0.2, seed=1)
    pack(ImageFolder(image_folder / "train"), tmp_path / "seed", another, split="train", workers=2)
    assert {s["jpg"] for s in samples(tmp_path / "seed")} == {s["jpg"] for s in samples(tmp_path / "1")}
    assert [s["jpg"] for s in samples(tmp_path / "seed")] != [s["jpg"] for s in samples(tmp_path / "1")]


def test_a_finished_pack_is_left_alone(shard_sets: Path, image_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    shutil.copytree(shard_sets / "train", out)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    (out / ".pack").mkdir()  # as a kill after the last write leaves it
    source = ImageFolder(image_folder / "train")
    manifest = pack(source, out, Options(shorter_side=72, shard_mb=0.2), split="train", workers=1)
    assert manifest == Manifest.read(out)
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    told = "already holds 240 images in 5 shards, packed with --shorter-side 72 --shard-mb 0.2 and not 60, 64.0: "
    told += "pack into another directory, or remove .* with all of these first"
    with pytest.raises(ShardError, match=told):
        pack(source, out, Options(shorter_side=60), split="train", workers=1)


# Images of every kind. -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def strange(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, NDArray[np.float64]]]:
    """A folder of strange files, and the good ones as upright RGB."""
    root = tmp_path_factory.mktemp("strange")
    folder = root / "class" / "sub folder"
    folder.mkdir(parents=True)
    (root / "empty class").mkdir()
    image = photograph(np.random.default_rng(7), 90, 70, TINTS[0])
    rgb = np.asarray(image, np.float64)
    grey = np.asarray(image.convert("L"))
    greys = np.repeat(grey[..., None], 3, 2).astype(np.float64)
    colours = np.array([[200, 30, 30], [30, 200, 60], [20, 40, 220], [250, 240, 230]], np.uint8)
    blocks = np.repeat(np.repeat(np.arange(4, dtype=np.uint8).reshape(2, 2), 40, 0), 40, 1)
    palette = Image.fromarray(blocks, "L")
    palette.putpalette(colours.tobytes())
    palette.info["transparency"] = 0
    deep = Image.fromarray((grey.astype(np.uint16) << 8) + 77)
    exif = Image.Exif()
    exif[0x0112] = 6  # a camera that was held on its side: turn by 90 degrees clockwise to see it upright

    image.save(folder / "plain.jpg", quality=95)
    image.convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    Image.fromarray(grey).save(folder / "grey.jpg", quality=95)
    palette.save(folder / "palette.png")
    alpha = Image.fromarray(np.random.default_rng(8).integers(0, 256, grey.shape, np.uint8))
    Image.merge("RGBA", (*image.split(), alpha)).save(folder / "alpha.png")
    Image.merge("LA", (Image.fromarray(grey), alpha)).save(folder / "grey-alpha.png")
    deep.save(folder / "deep.png")
    image.rotate(90, expand=True).save(folder / "rotated.jpg", quality=95, exif=exif)
    deep.transpose(Image.Transpose.ROTATE_90).save(folder / "deep-rotated.png", exif=exif)
    image.save(folder / "named.jpg", format="PNG")
    image.save(folder / "ünï.cödé .v2.webp", lossless=True)
    good = dict.fromkeys(("plain", "cmyk", "alpha", "rotated", "named", "n-c-d-v2"), rgb)
    good |= dict.fromkeys(("grey", "grey-alpha", "deep", "deep-rotated"), greys)
    good["palette"] = colours[blocks].astype(np.float64)

    whole = (folder / "plain.jpg").read_bytes()
    (folder / "garbage.jpg").write_bytes(bytes(range(256)) * 20)
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.jpg").touch()
    (folder / "notes.txt").write_text("not an image")
    (folder / "gone.jpg").symlink_to(root / "nowhere")
    shutil.copy(folder / "plain.jpg", root / "loose.jpg")
    return root, good


def test_every_kind_of_image_becomes_upright_rgb(
    strange: tuple[Path, dict[str, NDArray[np.float64]]], tmp_path: Path
) -> None:
    root, good = strange
    options = Options(quality=95, keep_small=True)
    manifest = pack(ImageFolder(root), tmp_path / "set", options, split="x", workers=1)
    assert manifest.classes == ["class", "empty class"]
    read = {s["__key__"].split("class-sub-folder-")[1]: s["jpg"] for s in samples(tmp_path / "set")}
    assert set(read) == set(good)
    for name, expected in good.items():
        image = Image.open(io.BytesIO(read[name]))
        assert (image.format, image.mode) == ("JPEG", "RGB"), name
        assert image.getexif().get(0x0112, 1) == 1, name
        assert pixels(read[name]).shape == expected.shape, name
        assert abs(pixels(read[name]) - expected).mean() < 4, name
    folder = root / "class" / "sub folder"
    assert read["plain"] == (folder / "plain.jpg").read_bytes()

    reasons = rejections(tmp_path / "set")
    names = ("garbage.jpg", "truncated.jpg", "empty.jpg", "notes.txt", "gone.jpg")
    assert set(reasons) == {"loose.jpg"} | {f"class/sub folder/{name}" for name in names}
    assert "truncated" in reasons["class/sub folder/truncated.jpg"]
    assert "cannot identify image file" in reasons["class/sub folder/garbage.jpg"]
    assert "No such file" in reasons["class/sub folder/gone.jpg"]
    assert "no label" in reasons["loose.jpg"]


def test_small_images_are_enlarged(strange: tuple[Path, dict[str, NDArray[np.float64]]], tmp_path: Path) -> None:
    """ "the shorter side was of length 256", section 2: of every image, whatever it was."""
    root, good = strange
    manifest = pack(ImageFolder(root), tmp_path / "set", Options(quality=95), split="x", workers=1)
    read = {s["__key__"].split("class-sub-folder-")[1]: s["jpg"] for s in samples(tmp_path / "set")}
    assert set(read) == set(good)
    for name, image in good.items():
        expected = np.asarray(F.resize(Image.fromarray(image.astype(np.uint8)), [256]), np.float64)
        assert pixels(read[name]).shape == expected.shape, name
        assert min(expected.shape[:2]) == 256
        assert abs(pixels(read[name]) - expected).mean() < 4, name
    assert manifest.sides == [256, 256]


@pytest.mark.parametrize(
    ("side", "keep_small", "same"), [(72, False, True), (72, True, True), (73, True, True), (73, False, False)]
)
def test_what_has_its_size_already_is_not_encoded_anew(side: int, keep_small: bool, same: bool) -> None:
    image = photograph(np.random.default_rng(3), 100, 72, TINTS[0])
    data = encoded(image, "JPEG", quality=70)
    stored = to_jpeg(data, side, 95, keep_small).jpeg
    assert (stored == data) is same
    assert Image.open(io.BytesIO(stored)).size == ((100, 72) if same else (101, 73))
    assert to_jpeg(encoded(image, "PNG"), 72, 95, keep_small).jpeg != data


def test_an_image_that_would_become_too_long(tmp_path: Path) -> None:
    (tmp_path / "folder" / "a").mkdir(parents=True)
    Image.new("RGB", (2000, 2)).save(tmp_path / "folder" / "a" / "line.png")
    photograph(np.random.default_rng(3), 100, 72, TINTS[0]).save(tmp_path / "folder" / "a" / "b.png")
    pack(ImageFolder(tmp_path / "folder"), tmp_path / "set", Options(), split="x", workers=1)
    reason = "would have 256000x256 pixels, and a JPEG has at most 65500 a side: leave it out or pack with --keep-small"
    assert rejections(tmp_path / "set") == {"a/line.png": reason}
    pack(ImageFolder(tmp_path / "folder"), tmp_path / "kept", Options(keep_small=True), split="x", workers=1)
    assert ShardSet(tmp_path / "kept").sides == (2, 72)


@pytest.mark.parametrize(("size", "side", "has"), [((30, 9000), 25, "25x7500"), ((30, 9000), 0, "30x9000")])
def test_an_image_that_keep_small_would_not_help(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], side: int, has: str
) -> None:
    """Such as 300x90000 pixels, whose shorter side is above 256."""
    monkeypatch.setattr(sources, "JPEG_LONGEST", 6550)
    reason = f"would have {has} pixels, and a JPEG has at most 6550 a side: leave it out or cut it"
    for keep_small in (False, True):
        with pytest.raises(ValueError, match=f"^{reason}$"):
            to_jpeg(encoded(Image.new("L", size), "PNG"), side, 90, keep_small)


# The options of an earlier day, when small images were always kept. -------------------------------------


def earlier(source: ImageFolder, options: Options, split: str) -> str:
    """Fingerprint of a set in an earlier version: of names, without sizes."""
    names = ("shorter_side", "quality", "shard_mb", "seed")
    plan = [source.items, source.classes, split, {name: getattr(options, name) for name in names}]
    return hashlib.sha256(json.dumps(plan, default=str, ensure_ascii=False).encode()).hexdigest()


def test_fingerprints_of_an_earlier_day(image_folder: Path, tmp_path: Path) -> None:
    source = ImageFolder(image_folder / "val")
    for name, options in (("0", Options(0)), ("kept", Options(90, keep_small=True))):
        manifest = pack(source, tmp_path / name, options, split="val", workers=1)
        replace(manifest, source=earlier(source, options, "val")).write(tmp_path / name)
        assert pack(source, tmp_path / name, options, split="val", workers=1).source == earlier(source, options, "val")
    enlarged = pack(source, tmp_path / "enlarged", Options(90), split="val", workers=1)
    assert enlarged.source != earlier(source, Options(90), "val")
    with pytest.raises(ShardError, match="packed with --keep-small False and not True: pack into another directory"):
        pack(source, tmp_path / "enlarged", Options(90, keep_small=True), split="val", workers=1)


def test_a_finished_set_of_an_earlier_day_is_left_alone(image_folder: Path, tmp_path: Path) -> None:
    source, out = ImageFolder(image_folder / "val"), tmp_path / "set"
    pack(source, out, Options(90, keep_small=True), split="val", workers=1)
    before = files(out)
    for options in (Options(90), Options(90, keep_small=True)):
        assert pack(source, out, options, split="val", workers=1) == Manifest.read(out)
        assert finished(source, out, options, split="val") == Manifest.read(out)
    assert files(out) == before
    assert finished(source, tmp_path / "another", Options(), split="val") is None
    with pytest.raises(ShardError, match="packed with --shorter-side 90 --keep-small True and not 91, False"):
        finished(source, out, Options(91), split="val")


def test_an_unfinished_set_of_an_earlier_day(image_folder: Path, tmp_path: Path) -> None:
    source, options = ImageFolder(image_folder / "val"), Options(90)
    (tmp_path / ".pack").mkdir()
    (tmp_path / ".pack" / "plan").write_text(f"pack {earlier(source, options, 'val')}")
    with pytest.raises(
        ShardError, match="holds an unfinished pack that keeps small images: continue with --keep-small, pack into"
    ):
        pack(source, tmp_path, options, split="val", workers=1)
    assert pack(source, tmp_path, Options(90, keep_small=True), split="val", workers=1).sides == [72, 90]


def test_shorter_side_0_keeps_size_and_bytes(image_folder: Path, tmp_path: Path) -> None:
    pack(ImageFolder(image_folder / "val"), tmp_path, Options(shorter_side=0), split="val", workers=1)
    originals = {path.read_bytes() for path in (image_folder / "val").rglob("*.jpg")}
    assert {s["jpg"] for s in samples(tmp_path)} == originals
    assert not (tmp_path / "rejected.jsonl").read_text()


def test_nothing_to_pack(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "a").mkdir(parents=True)
    with pytest.raises(SourceError, match=r"no images to pack into .*: expected SRC/<class>/<image>"):
        pack(ImageFolder(source), tmp_path / "out", Options(), split="x", workers=1)
    (source / "a" / "x.jpg").write_text("garbage")
    with pytest.raises(ShardError, match=r"no usable image in .*: 1 were rejected, see .*rejected.jsonl"):
        pack(ImageFolder(source), tmp_path / "out", Options(), split="x", workers=1)
    with pytest.raises(SourceError, match="nowhere is not a folder: give the one whose sub-folders are the classes"):
        ImageFolder(tmp_path / "nowhere")
    with pytest.raises(SourceError, match="--quality is 100: it must lie between 1 and 95"):
        Options(quality=100)


# Kills. --------------------------------------------------------------------------------------------

SMALL = Options(shorter_side=72, shard_mb=0.02)


@pytest.fixture(scope="module")
def large_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images that take some milliseconds each, so that their pack can be killed halfway."""
    root = tmp_path_factory.mktemp("large")
    rng = np.random.default_rng(11)
    for name, tint in zip(CLASSES[:2], TINTS[:2], strict=True):
        (root / name).mkdir()
        for i in range(50):
            photograph(rng, 600, 500, tint).save(root / name / f"{i}.jpg")
    return root


@pytest.fixture(scope="module")
def unharmed(large_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unharmed") / "set"
    pack(ImageFolder(large_images), out, SMALL, split="set", workers=2)
    return out


def test_small_shards_are_never_empty(large_images: Path, tmp_path: Path) -> None:
    (tmp_path / "folder" / "class").mkdir(parents=True)
    for i in range(3):
        shutil.copy(large_images / "blue" / f"{i}.jpg", tmp_path / "folder" / "class")
    options = Options(shorter_side=0, shard_mb=0.01)  # an image has more
    manifest = pack(ImageFolder(tmp_path / "folder"), tmp_path / "set", options, split="x", workers=1)
    assert [shard["samples"] for shard in manifest.shards] == [1, 1, 1]
    assert len(ShardSet(tmp_path / "set")) == 3


def session(pid: int) -> list[int]:
    """Processes of a session, without zombies."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its = stat.read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(its) == pid and state != "Z":
            found.append(int(stat.parent.name))
    return found


@pytest.mark.integration
def test_a_killed_pack_continues_with_the_same_bytes(large_images: Path, unharmed: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    command = [sys.executable, "-m", "pipelines", "pack", "imagefolder", str(large_images), str(out)]
    command += ["--shorter-side", "72", "--shard-mb", "0.02", "--workers", "2"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True)
    until(lambda: list(out.glob(".pack/*.json")))
    assert len(session(process.pid)) >= 3  # it, and its workers
    process.send_signal(signal.SIGKILL)
    process.wait()
    until(lambda: not session(process.pid))
    assert not (out / "manifest.json").exists()
    finished = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}

    with pytest.raises(ShardError, match=r"has shards but no manifest.json: repeat the pack command"):
        ShardSet(out)
    with pytest.raises(ShardError, match="holds an unfinished pack of other files or file sizes, or with other"):
        pack(ImageFolder(large_images), out, Options(shorter_side=60, shard_mb=0.02), split="set", workers=1)
    with pytest.raises(ShardError, match="holds an unfinished pack"):  # its half would be taken for the whole
        index(out, classes=None, split="set", workers=1)

    pack(ImageFolder(large_images), out, SMALL, split="set", workers=2)  # what the command does
    assert files(out) == files(unharmed)
    kept = [name for name in finished if (out / name).stat().st_mtime_ns == finished[name]]
    assert len(kept) >= len(finished) - 2  # at most a shard a worker was done again


@pytest.mark.integration
@pytest.mark.slow
def test_an_interrupted_pack_says_that_the_same_command_continues(
    large_images: Path, unharmed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "set"
    command = [sys.executable, "-m", "pipelines", "pack", "imagefolder", str(large_images), str(out)]
    command += ["--shorter-side", "72", "--shard-mb", "0.02", "--workers", "2"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    until(lambda: list(out.glob(".pack/*.json")))
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does, to the workers too
    _, told = process.communicate()
    assert process.returncode == 130
    assert told.endswith("\ninterrupted: the same command continues\n")
    assert "Traceback" not in told
    pack(ImageFolder(large_images), out, SMALL, split="set", workers=2)  # what the command does
    assert files(out) == files(unharmed)


def test_a_killed_worker_is_an_error_and_the_pack_continues(large_images: Path, unharmed: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"

    def kill() -> None:
        until(lambda: list(out.glob(".pack/*.json")))
        multiprocessing.active_children()[0].kill()

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(ChildProcessError, match=r"a worker was killed, .*: repeat the command with fewer --workers"):
        pack(ImageFolder(large_images), out, SMALL, split="set", workers=2)
    killer.join()
    until(lambda: not multiprocessing.active_children())
    pack(ImageFolder(large_images), out, SMALL, split="set", workers=2)
    assert files(out) == files(unharmed)


def test_two_packs_into_one_directory(image_folder: Path, tmp_path: Path) -> None:
    source = ImageFolder(image_folder / "val")
    (tmp_path / ".pack").mkdir()
    with open(tmp_path / ".pack" / "plan", "a") as plan:
        fcntl.flock(plan, fcntl.LOCK_EX)
        with pytest.raises(ShardError, match="is being packed by another process: wait for it"):
            pack(source, tmp_path, Options(), split="val", workers=1)
    tars = tmp_path / "tars"
    tars.mkdir()
    (tars / "mine.tar").touch()
    with pytest.raises(ShardError, match=r"holds mine\.tar, which `pack` did not make: pack into an empty or a new"):
        pack(source, tars, Options(), split="val", workers=1)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As Lustre is often mounted: the pack is made, with a warning."""

    def flock(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with working_folder(tmp_path, Fingerprints("x"), Work.INDEX):
        assert (tmp_path / WORK / "plan").read_text() == "index x"
    said = f"{tmp_path} cannot be locked ({os.strerror(number)}): make sure that no other process packs into it\n"
    assert capsys.readouterr().err == said


def test_a_set_that_another_has_finished_meanwhile(image_folder: Path, tmp_path: Path) -> None:
    """While this one was still listing its source, which may take minutes: the set is not overwritten."""
    options, before = Options(shorter_side=64), origin.fingerprints

    def late(*args: Any) -> Fingerprints:
        found = before(*args)
        if not (tmp_path / "set" / "manifest.json").exists() and args[0].root.name == "train":
            pack(ImageFolder(image_folder / "val"), tmp_path / "set", options, split="set", workers=1)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(origin, "fingerprints", late)
        with pytest.raises(ShardError, match="already holds 63 images"):
            pack(ImageFolder(image_folder / "train"), tmp_path / "set", options, split="set", workers=1)
    assert len(ShardSet(tmp_path / "set")) == 63


# Tars of other tools. ------------------------------------------------------------------------------


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mtime = len(data), 1.5  # type: ignore[assignment]  # a fraction: a PAX header, as webdataset's
    tar.addfile(member, io.BytesIO(data))


@pytest.fixture
def foreign(tmp_path: Path) -> tuple[Path, dict[str, tuple[bytes, int]]]:
    """Tars as made by other tools, and their good samples: image and label by key."""
    rng = np.random.default_rng(13)
    good: dict[str, tuple[bytes, int]] = {}

    def image(kind: str, **options: Any) -> bytes:
        width, height = rng.integers(60, 120, 2).tolist()
        return encoded(photograph(rng, width, height, TINTS[1]), kind, **options)

    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for i, extension in enumerate(("png", "jpg", "webp", "JPEG")):
            key = f"./some.folder/{'long' * 30}-{i}"
            good[key] = image({"jpg": "JPEG"}.get(extension, extension)), i
            add(tar, f"{key}.{extension}", good[key][0])
            add(tar, f"{key}.seg.png", b"a mask of another kind")
            add(tar, f"{key}.json", b"{}")
            add(tar, f"{key}.cls", f"{i}\n".encode())
        member = tarfile.TarInfo("some.folder")
        member.type = tarfile.DIRTYPE
        tar.addfile(member)
        add(tar, "lonely.jpg", image("JPEG"))
        add(tar, "word.jpg", image("JPEG"))
        add(tar, "word.cls", b"cat")
        add(tar, "negative.jpg", image("JPEG"))
        add(tar, "negative.cls", b"-1")
        add(tar, "gif.jpg", image("GIF"))
        add(tar, "gif.cls", b"0")
        add(tar, "broken.jpg", image("JPEG")[:-400])
        add(tar, "broken.cls", b"0")
        add(tar, "wide.png", encoded(Image.new("L", (70_000, 1)), "PNG"))
        add(tar, "wide.cls", b"0")
    with webdataset.TarWriter(str(tmp_path / "b.tar")) as writer:
        for i, (extension, kind) in enumerate((("webp", "WEBP"), ("jpeg", "JPEG"), ("png", "PNG"))):
            good[f"b{i}"] = image(kind), 2 * i
            writer.write({"__key__": f"b{i}", extension: good[f"b{i}"][0], "cls": 2 * i, "json": {"caption": "x"}})
    return tmp_path, good


def test_index_reads_the_tars_of_other_tools(foreign: tuple[Path, dict[str, tuple[bytes, int]]]) -> None:
    directory, good = foreign
    manifest = index(directory, classes=None, split="x", workers=1)
    assert manifest.classes == ["0", "1", "2", "3", "4"]
    shards = ShardSet(directory)
    assert [shards.read(i).tobytes() for i in range(len(shards))] == [data for data, _ in good.values()]
    assert shards.index["label"].tolist() == [label for _, label in good.values()]
    sizes = [list(Image.open(io.BytesIO(data)).size) for data, _ in good.values()]
    assert shards.sizes(np.arange(len(shards))).tolist() == sizes
    assert shards.name(5) == "b.tar/b1.jpeg"
    reasons = rejections(directory)
    assert set(reasons) == {f"a.tar/{k}" for k in ("lonely", "word", "negative", "gif", "broken", "wide")}
    assert "needs one of jpg, jpeg, png, webp, and cls or json, has jpg" in reasons["a.tar/lonely"]
    assert "GIF" in reasons["a.tar/gif"]
    assert "truncated" in reasons["a.tar/broken"]
    assert "70000x1" in reasons["a.tar/wide"]
    flat = np.concatenate([pixels(data).reshape(-1, 3) for data, _ in good.values()]) / 255
    np.testing.assert_allclose(manifest.mean, flat.mean(0), rtol=1e-7)


def test_index_and_class_names(foreign: tuple[Path, dict[str, tuple[bytes, int]]]) -> None:
    directory, _ = foreign
    with pytest.raises(ShardError, match=r"label 4 is out of range for 3 classes, .*: name all of them in --classes"):
        index(directory, classes=["a", "b", "c"], split="x", workers=1)
    assert index(directory, classes=list("abcde"), split="x", workers=1).classes == list("abcde")
    (directory / "index.npy").unlink()
    assert index(directory, classes=None, split="x", workers=1).classes == list("abcde")  # those of the old manifest
    assert len(ShardSet(directory)) == 7


def write_tar(path: Path, *files: tuple[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            add(tar, name, data)


def shades(n: int) -> list[bytes]:
    return [encoded(Image.new("RGB", (8, 9), (20 * i, 90, 0)), "PNG") for i in range(n)]


def test_samples_that_all_bear_one_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each image with its label is a sample, also for `verify`; a message says that webdataset's reader does not."""
    images = shades(6)
    pairs = [member for i, data in enumerate(images) for member in (("img.png", data), ("img.CLS", b"%d" % (i % 2)))]
    write_tar(tmp_path / "a.tar", *pairs)
    with pytest.raises(ValueError, match="duplicate file name in tar file"):
        list(group_by_keys({"fname": name, "data": data, "__url__": "x"} for name, data in pairs))
    assert index(tmp_path, classes=None, split="x", workers=1).std[1:] == [0, 0], (
        "not nearly, and no square root of less"
    )
    shards = ShardSet(tmp_path)
    assert [shards.read(i).tobytes() for i in range(len(shards))] == images
    assert shards.index["label"].tolist() == [0, 1] * 3
    assert rejections(tmp_path) == {}
    assert "5 samples have the same name as the one before them (a.tar)" in capsys.readouterr().err
    assert verify(tmp_path, workers=1) == []


def test_a_label_of_another_image_is_never_taken(tmp_path: Path) -> None:
    a, b, c, d = shades(4)
    write_tar(
        tmp_path / "a.tar",
        *(("img.png", a), ("img.png", b), ("img.cls", b"0"), ("img.cls", b"1")),
        *(("good.png", c), ("good.cls", b"1")),
        *(("two.png", d), ("two.webp", a), ("two.cls", b"0")),
    )
    index(tmp_path, classes=None, split="x", workers=1)
    shards = ShardSet(tmp_path)
    assert [shards.read(i).tobytes() for i in range(len(shards))] == [c, d]
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert reasons == [
        *["shares its name with others that do not form whole samples, one after the other"] * 4,
        "another image of the same key is used",
    ]


def test_a_tar_made_on_a_mac(tmp_path: Path) -> None:
    """Companion files are skipped, as by webdataset; each member that is not a sample is named with its reason."""
    images = shades(3)
    files = [
        (f"in/{i}.{e}", d) for i, image in enumerate(images) for e, d in (("png", image), ("cls", b"%d" % (i % 2)))
    ]
    companion = b"\0\5\x16\7\0\2\0\0Mac OS X" + bytes(60)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for kind, name in ((tarfile.DIRTYPE, "in"), (tarfile.SYMTYPE, "in/9.png"), (tarfile.FIFOTYPE, "pipe.png")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "0.png"
            tar.addfile(member)
        for name, data in files:
            add(tar, f"in/._{name[3:]}", companion)
            add(tar, name, data)
        add(tar, "in/.DS_Store", b"?")
        add(tar, "README", b"?")
        add(tar, "LICENSE.txt", b"?")
    index(tmp_path, classes=None, split="x", workers=1)
    assert [sample["png"] for sample in samples(tmp_path) if "png" in sample] == images
    shards = ShardSet(tmp_path)
    assert [shards.read(i).tobytes() for i in range(len(shards))] == images
    assert verify(tmp_path, workers=1) == []
    told = rejections(tmp_path)
    assert {told.pop(f"a.tar/in/._{name[3:]}") for name, _ in files} == {
        "AppleDouble companion of a file (._name), which a Mac writes"
    }
    assert told == {
        "a.tar/in/9.png": "is a link: write the tar with --dereference --hard-dereference",
        "a.tar/pipe.png": "is not a regular file",
        "a.tar/in/.DS_Store": "its name begins with a dot",
        "a.tar/README": "has no extension",
        "a.tar/LICENSE": "needs one of jpg, jpeg, png, webp, and cls or json, has txt",
    }


def test_labels_that_are_ids(tmp_path: Path) -> None:
    """No unbounded number of class names is made up; a few classes without images belong to another split."""
    for top, classes in ((999, 1000), (1000, 0), (20_000_000, 0), (2**31 - 1, 0)):
        write_tar(tmp_path / "a.tar", *(("a.png", shades(1)[0]), ("a.cls", b"%d" % top)))
        if classes:
            assert len(index(tmp_path, classes=None, split="x", workers=1).classes) == classes
            (tmp_path / "manifest.json").unlink()
            continue
        tracemalloc.start()
        with pytest.raises(ShardError, match=rf"label {top} would make {top + 1} classes of 1 images, .* in --classes"):
            index(tmp_path, classes=None, split="x", workers=1)
        assert tracemalloc.get_traced_memory()[1] < 10e6
        tracemalloc.stop()
    assert not (tmp_path / "manifest.json").exists()


def test_index_makes_a_packed_set_anew(shard_sets: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    shutil.copytree(shard_sets / "val", out)
    before = ShardSet(out)
    after = index(out, classes=None, split="val", workers=1)
    for name in ("samples", "classes", "shards", "index_sha256", "mean", "std", "eigenvalues", "eigenvectors"):
        assert getattr(after, name) == getattr(before.manifest, name), name


@pytest.mark.parametrize("harm", ["inside a header", "inside an image", "between samples", "header", "gzip", "none"])
def test_index_of_a_harmed_tar(shard_sets: Path, tmp_path: Path, harm: str) -> None:
    tar = tmp_path / "a.tar"
    whole = (shard_sets / "val" / "shard-000001.tar").read_bytes()
    member = members(shard_sets / "val" / "shard-000001.tar")[10]
    match harm:
        case "inside a header":
            tar.write_bytes(whole[: member.offset + 300])
        case "inside an image":
            tar.write_bytes(whole[: member.offset_data + 300])
        case "between samples":
            tar.write_bytes(whole[: member.offset])
        case "header":
            tar.write_bytes(whole[: member.offset] + b"?" + whole[member.offset + 1 :])
        case "gzip":
            with tarfile.open(tar, "w:gz") as packed:
                add(packed, "a.jpg", b"")
        case "none":
            with pytest.raises(ShardError, match=r"no shards in .*: expected uncompressed \*.tar files"):
                index(tmp_path, classes=None, split="x", workers=1)
            return
    with pytest.raises(ShardError, match=r"a.tar is not a whole, uncompressed tar .*: copy or make it anew"):
        index(tmp_path, classes=None, split="x", workers=1)


# Data sets of torchvision. ---------------------------------------------------------------------------


def test_torchvision_names() -> None:
    with pytest.raises(SourceError, match=r"torchvision has no data set 'no-such-set'; it has .*FashionMNIST"):
        _ = Torchvision("no-such-set", Path("raw"), True).items
    with pytest.raises(SourceError, match="EuroSAT has no train and test split: save it as folders and pack those"):
        _ = Torchvision("eurosat", Path("raw"), True).items


def test_torchvision_with_other_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pets have trainval and test: the matching split is taken. If none matches, the available ones are named."""
    folder = tmp_path / "oxford-iiit-pet"
    (folder / "images").mkdir(parents=True)
    (folder / "annotations").mkdir()
    for split, count in (("trainval", 3), ("test", 2)):
        lines = [f"pet{i}_{split} {i + 1} 1 1" for i in range(count)]
        (folder / "annotations" / f"{split}.txt").write_text("\n".join(lines))
        for i in range(count):
            Image.new("RGB", (20, 30)).save(folder / "images" / f"pet{i}_{split}.jpg")
    for training, count in ((True, 3), (False, 2)):
        source = Torchvision("oxfordiiitpet", tmp_path, training)
        assert [item.label for item in source.items] == list(range(count))
        assert source.classes == [f"Pet{i}" for i in range(count)]
        assert source.load(0).size == (20, 30)

    def offline(*_: Any, **__: Any) -> Any:
        raise OSError("network is unreachable")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    with pytest.raises(SourceError, match=r"Imagenette is unavailable \(network is unreachable\)"):  # has train and val
        _ = Torchvision("imagenette", tmp_path, False).items
    told = "Places365 has the splits .*'train-challenge'.* and neither train nor trainval: save it as folders and pack"
    with pytest.raises(SourceError, match=told):
        _ = Torchvision("places365", tmp_path, True).items


def test_torchvision_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> Any:
        raise OSError("network is unreachable")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    with pytest.raises(SourceError, match=r"STL10 is unavailable \(.*\): fetch it where there is a network and put it"):
        _ = Torchvision("stl10", tmp_path, True).items
    monkeypatch.setattr("pipelines.torchvision_sets.INSTALLED", tmp_path)
    monkeypatch.setattr("subprocess.Popen", None)  # no package manager is called
    with pytest.raises(SourceError, match=r"FashionMNIST is unavailable \(.*\): .* install Debian's package dataset-"):
        _ = Torchvision("fashion-mnist", tmp_path, True).items


def test_what_index_does_not_touch(image_folder: Path, tmp_path: Path) -> None:
    """Files of another program under our names, pipes, dangling links, tars with another extension."""
    directory = tmp_path / "foreign"
    directory.mkdir()
    photo = (image_folder / "val" / "amber" / "000.jpg").read_bytes()
    with webdataset.TarWriter(str(directory / "a.tar")) as tar:
        tar.write({"__key__": "a", "jpg": photo, "cls": "0"})
    for name, text in (("manifest.json", '{"my": "own"}'), ("index.npy", "features")):
        (directory / name).write_text(text)
        with pytest.raises(ShardError, match=rf"{name} is (another program's|not an index of ours): move it away"):
            index(directory, classes=None, split="x", workers=1)
        assert (directory / name).read_text() == text
        (directory / name).unlink()
    shutil.copy(directory / "a.tar", directory / "b.TAR")
    os.mkfifo(directory / "c.tar")
    (directory / "d.tar").symlink_to("nowhere")
    (directory / "e.tar").mkdir()
    assert passed_over(directory, [directory / "a.tar"]) == "b.TAR, c.tar, d.tar and 1 more"
    with pytest.raises(
        ShardError, match=r"/d.tar is a link to nowhere, where nothing is: mount its file system, or put"
    ):
        index(directory, classes=None, split="x", workers=1)
    (directory / "d.tar").unlink()
    assert index(directory, classes=None, split="x", workers=1).samples == 1


def test_a_pack_among_tars_whose_index_was_begun(image_folder: Path, tmp_path: Path) -> None:
    """They belong to somebody: no message advises removing them."""
    (tmp_path / "shard-000000.tar").touch()
    (tmp_path / ".pack").mkdir()
    (tmp_path / ".pack" / "plan").write_text("index x")
    with pytest.raises(ShardError, match="holds 1 tars whose index was begun: pack into another directory, or"):
        pack(ImageFolder(image_folder / "val"), tmp_path, Options(), split="foreign", workers=1)


@pytest.mark.parametrize("label", ["1_0", "+1", "-1", "", "1.0", "9" * 30])
def test_a_label_is_digits(label: str, tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as tar:
        tar.write({"__key__": "a", "png": encoded(Image.new("RGB", (8, 8)), "PNG"), "cls": label})
    with pytest.raises(ShardError, match=r"is not a class number: for classes by name pack folders \(1\)"):
        index(tmp_path, classes=None, split="x", workers=1)
