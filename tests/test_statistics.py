"""`index --statistics`: headers say what decoded images say; what a sample estimates is as exact as it claims."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps
from PIL.PngImagePlugin import PngInfo

from pipelines import __main__ as pipelines
from pipelines import indexing, statistics
from pipelines.augment import Augment, random_views
from pipelines.indexing import index
from pipelines.manifest import Manifest, ShardError
from pipelines.rows import mapped
from pipelines.sample import read_sample
from pipelines.scan import scan_shard
from pipelines.scanned import WORK, rows_file
from pipelines.shards import INDEX, ShardSet
from pipelines.statistics import ALL, USUAL_EIGENVALUES, USUAL_EIGENVECTORS, draw, estimated, pixel_sums
from pipelines.tars import Member
from pipelines.verify import verify
from tests.conftest import TINTS, photograph

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of odd EXIF blocks
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="%d"/></x:xmpmeta>'


def photo(mode: str = "RGB", size: tuple[int, int] = (40, 24)) -> Image.Image:
    image = photograph(np.random.default_rng(size[0]), *size, TINTS[0])
    return (
        Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
        if mode == "I;16"
        else image.convert(mode)
    )


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def turning(way: int, endian: str = "<") -> bytes:
    exif = Image.Exif()
    exif.endian = endian
    exif[0x0112], exif[0x010F] = way, "a maker"
    return exif.tobytes()


def segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + (len(body) + 2).to_bytes(2, "big") + body


def with_segment(jpeg: bytes, marker: int, body: bytes) -> bytes:
    return jpeg[:2] + segment(marker, body) + jpeg[2:]


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def behind(png: bytes, kind: bytes, body: bytes) -> bytes:
    """The PNG with a chunk behind its pixels."""
    return png[:-12] + chunk(kind, body) + png[-12:]


def text(key: str, value: str, zip: bool = False) -> PngInfo:
    info = PngInfo()
    info.add_text(key, value, zip)
    return info


def jpegs() -> Iterator[tuple[str, bytes]]:
    plain = encoded(photo(), "JPEG", quality=90)
    for mode in ("RGB", "L", "CMYK"):
        yield f"{mode}.jpg", encoded(photo(mode), "JPEG", progressive=mode == "L", dpi=(72, 72))
    for way in range(10):
        yield f"way{way}.jpg", encoded(photo(), "JPEG", exif=turning(way, "<>"[way % 2]))
        yield f"xmp{way}.jpg", encoded(photo(), "JPEG", xmp=XMP % way)
    yield "both.jpg", encoded(photo(), "JPEG", exif=turning(6), xmp=XMP % 6)
    yield "twice.jpg", with_segment(encoded(photo(), "JPEG", exif=turning(8)), 0xE1, b"Exif\0\0more")
    yield "odd_exif.jpg", encoded(photo(), "JPEG", exif=b"Exif\0\0" + bytes(range(40)))
    yield "cut_exif.jpg", encoded(photo(), "JPEG", exif=turning(6)[:30])
    yield "no_exif.jpg", with_segment(plain, 0xE1, b"Exif\0\0")
    yield "several.jpg", encoded(photo(), "MPO", save_all=True, append_images=[photo("L").convert("RGB")])
    yield "turned_mpo.jpg", encoded(photo(), "MPO", save_all=True, append_images=[photo()], exif=turning(5))
    yield "icc.jpg", encoded(photo(), "JPEG", icc_profile=b"x" * 70_000, comment=b"y" * 300)
    yield "restarts.jpg", encoded(photo(), "JPEG", restart_marker_blocks=2)
    for name, marker, body in (
        ("photoshop", 0xED, b"Photoshop 3.0\0" + bytes(9)),
        ("short_photoshop", 0xED, b"Photoshop 3.0\x008BIM\4"),
        ("adobe", 0xEE, b"Adobe\0\x64\0\0\0\0\1"),
        ("short_adobe", 0xEE, b"Adobe"),
        ("short_jfif", 0xE0, b"JFIF"),
        ("bad_tables", 0xDB, b"\0" * 64),
        ("deep_tables", 0xDB, b"\x13" + b"\0\1" * 64),
    ):
        yield f"{name}.jpg", with_segment(plain, marker, body)
    for name, jpeg in (("bad_exif", encoded(photo(), "JPEG")), ("bad_exif_dpi", encoded(photo(), "JPEG", dpi=(9, 9)))):
        yield f"{name}.jpg", with_segment(jpeg, 0xE1, b"Exif\0\0garbage!" + XMP % 6)
    yield "filled.jpg", plain[:2] + b"\xff\xff\xff" + plain[2:]
    yield "junk.jpg", plain[:2] + b"junk" + plain[2:]
    at = plain.index(b"\xff\xc0")
    for name, field in (("flat", b"\x08\0\0\0\x28"), ("deep", b"\x0c\0\x18\0\x28"), ("huge", b"\x08\xff\xff\xff\xff")):
        yield f"{name}.jpg", plain[: at + 4] + field + plain[at + 9 :]
    yield "headless.jpg", plain[:at]
    yield "only_a_start.jpg", plain[:2]


def pngs() -> Iterator[tuple[str, bytes]]:
    plain = encoded(photo(), "PNG")
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        yield f"{mode.replace(';', '_')}.png", encoded(photo(mode), "PNG")
    yield "turned.png", encoded(photo(), "PNG", exif=turning(6))
    yield "turned_behind.png", behind(plain, b"eXIf", turning(7)[6:])
    yield "upright_behind.png", behind(plain, b"tEXt", b"date:create\x002020")
    raw = f"\nexif\n{len(turning(5)):8}\n{turning(5).hex()}\n"
    yield "raw.png", encoded(photo(), "PNG", pnginfo=text("Raw profile type exif", raw, zip=True))
    yield "raw_behind.png", behind(plain, b"tEXt", b"Raw profile type exif\0" + raw.encode())
    yield "xmp.png", encoded(photo(), "PNG", pnginfo=text("XML:com.adobe.xmp", (XMP % 6).decode()))
    yield "frames.png", encoded(photo(), "PNG", save_all=True, append_images=[photo("L").convert("RGB")])
    yield "named.jpg", plain
    yield "wide.png", encoded(Image.new("L", (70_000, 1)), "PNG")
    yield "claims.png", plain[:16] + b"\0\1\0\0\0\1\0\0" + plain[24:]


def others() -> Iterator[tuple[str, bytes]]:
    for mode in ("RGB", "RGBA"):
        yield f"{mode}.webp", encoded(photo(mode), "WEBP")
        yield f"turned{mode}.webp", encoded(photo(mode), "WEBP", lossless=True, exif=turning(8), xmp=XMP % 8)
    yield "frames.webp", encoded(photo(), "WEBP", save_all=True, append_images=[photo("L").convert("RGB")])
    yield "bmp.jpg", encoded(photo(), "BMP")
    yield "gif.jpg", encoded(photo(), "GIF")
    yield "tiff.png", encoded(photo(), "TIFF")
    yield "script.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n"
    yield "garbage.jpg", b"\xff\xd8\xff\xe0" + bytes(range(256)) * 8
    yield "nothing.png", b""


def write(path: Path, files: dict[str, bytes]) -> None:
    with webdataset.TarWriter(str(path)) as tar:
        for number, (name, data) in enumerate(files.items()):
            key, extension = name.split(".")
            tar.write({"__key__": f"{number:03d}{key}", extension: data, "cls": str(number % 3)})


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A set of two tars, and its images by the names in the tars."""
    folder, files = tmp_path_factory.mktemp("kinds"), dict([*jpegs(), *pngs(), *others()])
    names = list(files)
    write(folder / "a.tar", {name: files[name] for name in names[:40]})
    write(folder / "b.tar", {name: files[name] for name in names[40:]})
    return folder, files


def indexed(folder: Path, at: Path, mode: str, workers: int = 2) -> Manifest:
    at.mkdir(exist_ok=True)
    for tar in folder.glob("*.tar"):
        shutil.copy2(tar, at)
    return index(at, classes=None, split="x", workers=workers, statistics=mode)


@pytest.mark.integration
def test_headers_give_the_index_that_decoding_gives(kinds: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    """Of all kinds of images, what is left out and what DALI refuses included; and it is what Pillow says."""
    folder, files = kinds
    for mode in (ALL, "imagenet", "sample:20"):
        indexed(folder, tmp_path / mode, mode)
    for mode in ("imagenet", "sample:20"):
        for name in (INDEX, "rejected.jsonl", "quarantine.jsonl"):
            expected = (tmp_path / ALL / name).read_bytes()
            assert (tmp_path / mode / name).read_bytes() == expected, (mode, name)
    shards = ShardSet(tmp_path / "imagenet")
    assert len(shards) > 45
    by_name = {f"{number % 40:03d}{name}": name for number, name in enumerate(files)}
    for sample, (width, height) in enumerate(shards.sizes(np.arange(len(shards))).tolist()):
        image = Image.open(io.BytesIO(files[by_name[shards.name(sample).partition("/")[2]]]))
        assert ImageOps.exif_transpose(image).size == (width, height), shards.name(sample)


def test_headers_with_random_damage() -> None:
    """What decodes has the same row by its header; what the header refuses does not decode."""
    rng, accepted = np.random.default_rng(0), 0
    small = {name: photo(size=(12, 7)) for name in ("JPEG", "MPO", "PNG", "WEBP", "BMP")}
    images = [encoded(image, kind, exif=turning(6)) for kind, image in small.items() if kind != "BMP"]
    images += [encoded(image, kind) for kind, image in small.items()]
    images.append(behind(encoded(small["PNG"], "PNG"), b"eXIf", turning(7)[6:]))
    for harm in range(3000):
        data = bytearray(images[harm % len(images)])
        for _ in range(1 + harm % 2):
            place = rng.integers(len(data) if harm % 3 else min(len(data), 200))
            data[place] = rng.integers(256)
        file = io.BytesIO(bytes(512) + b"1".ljust(512) + bytes(512) + data)
        members = {"cls": Member("a.cls", 512, 1), "jpg": Member("a.jpg", 1536, len(data))}
        found = list[Any]()
        for decode in (True, False):
            try:
                sample = read_sample(file, members, decode=decode)
                found.append((sample.row, sample.turned, sample.plain))
            except Exception as error:
                found.append(type(error))
        assert found[0] == found[1] or isinstance(found[0], type), (harm, found, bytes(data))
        accepted += not isinstance(found[0], type)
    assert accepted > 1000


def test_no_image_is_decoded(
    kinds: tuple[Path, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = []
    for decode in (True, False):
        if not decode:
            monkeypatch.setattr(ImageFile.ImageFile, "load", None)
            monkeypatch.setattr(Image.Image, "load", lambda self: None)
        at = tmp_path / str(decode)
        (at / WORK).mkdir(parents=True)
        shutil.copy(kinds[0] / "a.tar", at)
        scan_shard(at / "a.tar", [], count=False, decode=decode)
        rows.append(mapped(rows_file(at / "a.tar")).tobytes())
    assert len(rows[0]) > 500
    assert rows[0] == rows[1]


@pytest.mark.integration
def test_a_truncated_image(tmp_path: Path) -> None:
    """Its header is right: it is found if it is drawn, and by `verify`."""
    files = {f"{i}.jpg": encoded(photo(size=(40 + i, 30)), "JPEG") for i in range(10)}
    files["3.jpg"] = files["3.jpg"][:-60]
    (tmp_path / "from").mkdir()
    write(tmp_path / "from" / "a.tar", files)
    assert indexed(tmp_path / "from", tmp_path / "all", ALL).samples == 9
    assert indexed(tmp_path / "from", tmp_path / "none", "imagenet").samples == 10
    assert not (tmp_path / "none" / "quarantine.jsonl").exists()
    manifest = indexed(tmp_path / "from", tmp_path / "some", "sample:10")
    assert (manifest.samples, manifest.estimate and manifest.estimate.images) == (10, 9)
    assert manifest.mean == Manifest.read(tmp_path / "all").mean
    found = [json.loads(line) for line in (tmp_path / "some" / "quarantine.jsonl").read_text().splitlines()]
    (problem,) = verify(tmp_path / "none", workers=1)
    assert found == [{"index": manifest.index_sha256}, problem | {"name": "a.tar/0033.jpg"}]
    assert problem["row"] == 3
    assert ShardSet(tmp_path / "some").good.tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    write(tmp_path / "from" / "a.tar", {name: data[:-60] for name, data in files.items()})
    with pytest.raises(
        ShardError, match=r"0 of 5 images drawn can be decoded \(cannot be read: .*draw more with --stat"
    ):
        indexed(tmp_path / "from", tmp_path / "bad", "sample:5")


@pytest.mark.integration
def test_a_sample_of_a_set(shard_sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bytes with any number of workers and after a kill, whose scans no other mode takes; near to what all
    images say."""
    whole, expected = Manifest.read(shard_sets / "train"), list[bytes]()
    for workers in (1, 2, 3):
        manifest = indexed(shard_sets / "train", tmp_path / str(workers), "sample:100", workers)
        expected.append((tmp_path / str(workers) / "manifest.json").read_bytes())
    assert len(set(expected)) == 1
    assert manifest.index_sha256 == whole.index_sha256
    estimate = manifest.estimate
    assert estimate
    assert estimate.images == 100
    for name in ("mean", "std", "eigenvalues"):
        values, errors, true = (np.array(getattr(of, name)) for of in (manifest, estimate, whole))
        assert (errors > 0).all()
        assert (abs(values - true) < 4 * errors).all(), name
        assert (errors < true).all(), name

    at = tmp_path / "killed"
    with monkeypatch.context() as killed:
        killed.setattr(statistics, "parallel", None)
        with pytest.raises(TypeError):
            indexed(shard_sets / "train", at, "sample:100")
    assert list((at / WORK).glob("*.json"))
    assert indexed(shard_sets / "train", at, ALL).mean == whole.mean
    with monkeypatch.context() as killed:
        killed.setattr(indexing, "finish", None)
        with pytest.raises(TypeError):
            indexed(shard_sets / "train", at, ALL)
        killed.undo()
    indexed(shard_sets / "train", at, "sample:100")
    assert (at / "manifest.json").read_bytes() == expected[0]
    assert indexed(shard_sets / "train", at, "sample:240").mean == whole.mean
    everything = Manifest.read(at).estimate
    assert everything
    assert everything.mean == everything.std == everything.eigenvalues == [0, 0, 0]


def population(rng: np.random.Generator, images: int) -> NDArray[np.int64]:
    """Sums of images of very different numbers of pixels, the larger ones brighter."""
    pixels = np.exp(rng.normal(11, 0.5, images)).astype(np.int64)
    light = rng.normal(0, 40, (images, 1)) + 15 * (np.log(pixels)[:, None] - 11)
    means = (np.array([125.0, 115, 105]) + light + rng.normal(0, 12, (images, 3)) * [1.0, 0.2, 1.2]).clip(5, 250)
    noise = rng.gamma(4, 12, (images, 1, 1)) ** 2 * np.array([[1.0, 0.9, 0.8], [0.9, 1, 0.9], [0.8, 0.9, 1]])
    squares = noise + means[:, :, None] * means[:, None, :]
    sums = np.concatenate([np.ones((images, 1)), means, squares.reshape(-1, 9)], axis=1) * pixels[:, None]
    return np.rint(sums).astype(np.int64)


def test_a_standard_error_is_what_it_claims() -> None:
    """1,000 samples of 150 of 600 images scatter as they say, and 95 % intervals cover the truth that often."""
    rng = np.random.default_rng(0)
    sums, draws = population(rng, 600), 1000
    whole = estimated(sums, 600)
    names = ("mean", "std", "eigenvalues")
    truth = np.array([getattr(whole, name) for name in names])
    found = [estimated(sums[rng.choice(600, 150, replace=False)], 600) for _ in range(draws)]
    values = np.array([[getattr(one, name) for name in names] for one in found])
    errors = np.array([[getattr(one.estimate, name) for name in names] for one in found])
    np.testing.assert_allclose(np.sqrt((errors**2).mean(0)) / values.std(0), 1, atol=0.08)
    np.testing.assert_allclose((abs(values - truth) < 1.96 * errors).mean(0), 0.95, atol=0.025)
    # Pixels are no independent draws, nor do images weigh the same: both would be far off.
    naive = np.sqrt(truth[1] ** 2 / (150 * sums[:, 0].mean()))
    assert (naive < 0.1 * values.std(0)[0]).all()


def test_a_sample_is_without_replacement_and_any_image_may_be_drawn() -> None:
    for of, images in ((10, 4), (1000, 999), (1_281_167, 20_000), (5, 5), (5, 9), (1, 2)):
        drawn = draw(of, images)
        assert len(set(drawn.tolist())) == len(drawn) == min(of, images)
        assert (np.diff(drawn) > 0).all()
        assert min(drawn) >= 0
        assert max(drawn) < of
    counts, _ = np.histogram(draw(1_281_167, 20_000), 20, (0, 1_281_167))
    assert ((counts - 1000) ** 2 / 1000).sum() < 43.8  # chi squared, 19 degrees of freedom: 0.1 %


def test_sums_are_those_of_the_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    for step in (1 << 20, 100):
        monkeypatch.setattr(statistics, "STRIP", step)
        pixels = rng.integers(0, 256, (37, 53, 3), np.uint8)
        flat = pixels.reshape(-1, 3).astype(np.int64)
        expected = [len(flat), *flat.sum(0), *(flat.T @ flat).ravel()]
        assert pixel_sums(Image.fromarray(pixels)).tolist() == expected


def test_the_usual_values_of_imagenet() -> None:
    """fb.resnet.torch, datasets/imagenet.lua: its vectors are columns, and a sign is free. Of all pixels of ImageNet,
    pytorch/vision#1439 found deviations of 0.2806, 0.2736 and 0.2877, more than the usual ones."""
    theirs = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
    vectors, values = np.array(USUAL_EIGENVECTORS), np.array(USUAL_EIGENVALUES)
    np.testing.assert_allclose(vectors, theirs * [-1, 1, -1], atol=0)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(3), atol=2e-4)
    covariance = vectors @ np.diag(values) @ vectors.T
    np.testing.assert_allclose(covariance @ vectors, vectors * values, atol=1e-4)
    np.testing.assert_allclose(np.sqrt(np.diag(covariance)), [0.2806, 0.2736, 0.2877], atol=0.004)
    assert (np.sqrt(np.diag(covariance)) > 1.2 * np.array(statistics.USUAL_STD)).all()
    # As `estimated` chooses signs: the sums of two images that differ along a vector.
    for k in range(3):
        grey = np.array([128.0, 128, 128])
        levels = np.rint([grey + 100 * theirs[:, k], grey - 100 * theirs[:, k]]).astype(np.uint8)
        first = np.array(estimated(np.array([pixel_sums(Image.fromarray(levels[None]))]), 1).eigenvectors)[:, 0]
        np.testing.assert_allclose(first, vectors[:, k], atol=0.01)
    size = np.full((20_000, 2), 256)
    views = random_views(size, Augment(), vectors * values, seed=0, epoch=0, start=0)
    assert 4 < np.sqrt((views.shift**2).sum(1).mean()) < 6


FIELDS = "split samples classes shards index_sha256 mean std eigenvalues eigenvectors stored source sides version"


@pytest.mark.integration
def test_the_manifest(shard_sets: Path, tmp_path: Path) -> None:
    """Nothing is added to those of `pack` and of all images; what stands in others is checked."""
    at = tmp_path / "set"
    assert list(json.loads((shard_sets / "train" / "manifest.json").read_text())) == [*FIELDS.split(), "checksum"]
    assert indexed(shard_sets / "val", at, ALL) == Manifest.read(at)
    assert list(json.loads((at / "manifest.json").read_text())) == [*FIELDS.split(), "checksum"]
    assert indexed(shard_sets / "val", at, "imagenet") == Manifest.read(at)
    usual = Manifest.read(at)
    assert (usual.mean, usual.std) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert usual.usual == "imagenet"
    assert indexed(shard_sets / "val", at, "sample:30") == Manifest.read(at)
    good = json.loads((at / "manifest.json").read_text())
    for field, value, says in (
        ("mean", [0.1, float("nan"), 0.1], "estimate.mean.1 should be a finite"),
        ("std", [0.1, 0.1, -0.1], "estimate.std.2 should be greater"),
        ("eigenvalues", [0.1], "estimate.eigenvalues should have at least 3"),
        ("eigenvalues", [float("inf")] * 3, "estimate.eigenvalues.0 should be a finite"),
        ("images", 0, "estimate.images should be greater"),
        ("images", 64, "estimate.images is 64, and there are 63 samples"),
        ("images", "3", "estimate.images should be a valid integer"),
        ("usual", "imagenet", "estimate and usual should not be there together"),
        ("usual", "else", "usual should be '' or 'imagenet'"),
    ):
        body = json.loads(json.dumps(good))
        del body["checksum"]
        (body if field == "usual" else body["estimate"])[field] = value
        body["checksum"] = checksum_of(body)
        (at / "manifest.json").write_text(json.dumps(body))
        with pytest.raises(ShardError, match=says):
            Manifest.read(at)


def checksum_of(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


@pytest.mark.integration
def test_what_is_told(
    shard_sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    at = tmp_path / "set"
    shutil.copytree(shard_sets / "val", at)

    def said(*words: str, code: int = 0) -> str:
        monkeypatch.setattr("sys.argv", ["pipelines", "index", str(at), *words, "--workers", "1"])
        assert pipelines.main() == code
        told = capsys.readouterr()
        return told.out if code == 0 else told.err

    assert f"{at}: statistics of all 63 images: mean (0." in said()
    assert f"{at}: statistics of 20 of 63 images: mean (0." in (sampled := said("--statistics", "sample:20"))
    assert sampled.count(" +- 0.0") == 6
    usual = "statistics are the usual ones of ImageNet, not of these images: mean (0.485, 0.456, 0.406), standard"
    assert usual in said("--statistics=imagenet")
    for wrong in ("half", "sample", "sample:1", "sample:x", "sample:-3", "sample:²", f"sample:{10**30}"):
        assert "is not all, sample:N (N images, 2 or more) or imagenet" in said("--statistics", wrong, code=2)


def test_the_usual_mode(shard_sets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting stops as soon as the answer is known."""
    tars = sorted((shard_sets / "train").glob("*.tar"))
    read = list[Path]()
    samples = statistics.tar_samples

    def counted(tar: Path) -> Iterator[Any]:
        for one in samples(tar):
            read.append(tar)
            yield one

    monkeypatch.setattr(statistics, "tar_samples", counted)
    assert statistics.usual_mode(tars) == ALL
    assert not read
    for many, mode, most in ((240, ALL, 240), (239, "sample:20000", 240), (100, "sample:20000", 101)):
        monkeypatch.setattr(statistics, "MANY", many)
        read.clear()
        assert statistics.usual_mode(tars) == mode
        assert len(read) <= most


@pytest.mark.integration
def test_a_large_set_is_sampled(
    shard_sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(shard_sets / "val", tmp_path / "set")
    monkeypatch.setattr(statistics, "MANY", 60)
    monkeypatch.setattr(statistics, "ENOUGH", 30)
    estimate = index(tmp_path / "set", classes=None, split="x", workers=1).estimate
    assert estimate
    assert estimate.images == 30
    assert "--statistics all decodes all" in capsys.readouterr().err


def test_sums_beyond_64_bits() -> None:
    """Those of a set as large as may be are exact: a constant channel has no deviation."""
    sums = np.array([[200_000_000, *[200 * 200_000_000] * 3, *[200**2 * 200_000_000] * 9]] * 5)
    found = estimated(np.repeat(sums, 10_000, axis=0), 10**9)
    assert found.std == [0, 0, 0]
    assert found.estimate
    assert found.estimate.mean == found.estimate.std == [0, 0, 0]
