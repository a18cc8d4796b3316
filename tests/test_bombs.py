"""Images of a stranger: none takes much more memory than its limit allows, and none starts a program."""

from __future__ import annotations

import io
import json
import os
import sys
import tarfile
import zlib
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageOps

from pipelines import pillow, sources
from pipelines.indexing import index
from pipelines.limits import USUAL, Limits, limited, limits
from pipelines.manifest import ShardError
from pipelines.pack import Options, pack
from pipelines.pillow import FORMATS, REFUSED, guarded, opened, strips, upright_rgb
from pipelines.sources import ImageFolder, Item, Source, jpeg_of, to_jpeg
from pipelines.verify import verify
from tests.conftest import TINTS, photograph
from tests.helpers import bombs
from tests.helpers.peak import Peak, peak

ORIENTATION = 0x0112
SLOW = 20  # seconds of a CPU


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def rejected(directory: Path) -> dict[str, str]:
    lines = map(json.loads, (directory / "rejected.jsonl").read_text().splitlines())
    return {line["file"]: line["reason"] for line in lines}


def some() -> Image.Image:
    return photograph(np.random.default_rng(5), 96, 72, TINTS[0])


def tar_of(path: Path, members: dict[str, bytes | int]) -> None:
    """A tar; a number is the size of a member that is not written, so that the disk does not hold it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = data if isinstance(data, int) else len(data)
            file.write(info.tobuf(tarfile.USTAR_FORMAT))
            file.write(b"" if isinstance(data, int) else data)
            file.truncate(end := -(-(file.tell() + (data if isinstance(data, int) else 0)) // 512) * 512)
            file.seek(end)
        file.write(bytes(1024))


# Formats. ---------------------------------------------------------------------------------------------


def test_each_format_of_pillow_is_decided() -> None:
    """One that a later Pillow brings may start a program, or open what it holds by any format."""
    Image.preinit()
    Image.init()
    known = {name for name in Image.OPEN if Image.OPEN[name][0].__module__.startswith("PIL.")}
    assert known <= FORMATS | set(" ".join(REFUSED).split())
    assert not FORMATS & set(" ".join(REFUSED).split())


@pytest.mark.filterwarnings("ignore:IM image format is deprecated")
def test_what_pillow_opens_packs() -> None:
    Image.init()
    done = []
    for name in sorted(FORMATS & set(Image.SAVE)):
        mode = {"XBM": "1", "MSP": "1", "BLP": "P", "SPIDER": "F"}.get(name, "RGB")
        data = encoded(some().convert(mode), name)
        assert Image.open(io.BytesIO(data)).format == opened(data).format
        assert Image.open(io.BytesIO(to_jpeg(data, 64, 90).jpeg)).format == "JPEG", name
        done.append(name)
    assert len(done) > 15


def test_a_format_that_a_user_has_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """As pillow-heif does when a source of one's own imports it."""

    def mine(file: io.BytesIO, _: str) -> Image.Image:
        return Image.frombytes("L", (8, 8), file.read()[4:])

    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    Image.register_open("MINE", mine, lambda prefix: prefix.startswith(b"mine"))
    assert Image.open(io.BytesIO(to_jpeg(b"mine" + bytes(64), 0, 90).jpeg)).size == (8, 8)


class Own(Source):
    """A source that opens its images itself."""

    classes = ("a",)
    items = (Item("0", "", 0),)

    def load(self, reference: str) -> Image.Image:
        with Image.open(reference) as image:
            image.load()
            return image


def test_no_program_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark, program = tmp_path / "mark", tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {mark}\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    picture = bombs.eps(64)
    for data in (picture, bombs.iptc(picture)):
        with pytest.raises(Exception):  # noqa: B017
            Image.open(io.BytesIO(data)).load()
        assert mark.exists(), "as it would be without the list"
        mark.unlink()
        monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
        with pytest.raises((ValueError, OSError), match=r"is PostScript|cannot identify image file"):
            to_jpeg(data, 64, 90)
        (tmp_path / "image.jpg").write_bytes(data)
        with pytest.raises(OSError, match="Unable to locate Ghostscript"):
            jpeg_of(Own(), Item("0", str(tmp_path / "image.jpg"), 0), 64, 90, False)
        assert not mark.exists()
    assert EpsImagePlugin.gs_binary is None


# Limits. ----------------------------------------------------------------------------------------------


def test_an_image_has_at_most_so_many_pixels() -> None:
    before = Image.MAX_IMAGE_PIXELS
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF"):
        data = encoded(Image.new("RGB", (60, 50)), kind)
        for most in (1, 1499, 1500, 2999):
            with (
                limited(Limits(pixels=most)),
                pytest.raises(ValueError, match=r"^has 3\d\d\d pixels, and \d+ are allow"),
            ):
                to_jpeg(data, 20, 90)
        with limited(Limits(pixels=3000)):
            assert to_jpeg(data, 20, 90)
    with limited(Limits(pixels=3000)), pytest.raises(ValueError, match=r"^has 4900 pixels, .* add --max-pixels 4900$"):
        to_jpeg(encoded(Image.new("RGB", (10, 10)), "PNG"), 70, 90)
    assert before == Image.MAX_IMAGE_PIXELS
    assert limits() == USUAL


def test_a_source_of_ones_own_has_the_same_limit(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(encoded(Image.new("RGB", (60, 50)), "PNG"))
    item = Item("0", str(tmp_path / "image"), 0)
    for most in (1000, 2999):
        with limited(Limits(pixels=most)), pytest.raises(ValueError, match="has 3000 pixels"):
            jpeg_of(Own(), item, 0, 90, False)
    assert jpeg_of(Own(), item, 0, 90, False)


@pytest.mark.integration
def test_limits_of_pack_index_and_verify(tmp_path: Path) -> None:
    folder, out, small = tmp_path / "folder" / "a", tmp_path / "set", encoded(Image.new("RGB", (60, 50)), "PNG")
    folder.mkdir(parents=True)
    (folder / "small.png").write_bytes(small)
    (folder / "wide.png").write_bytes(encoded(Image.new("RGB", (70, 50)), "PNG"))
    (folder / "long.png").write_bytes(small + bytes(9000))
    source, chosen = ImageFolder(tmp_path / "folder"), Options(0, max_pixels=3000, max_bytes=9000)
    assert pack(source, out, chosen, split="x", workers=1).stored["max_pixels"] == 3000
    reasons = {
        "a/wide.png": "has 3500 pixels, and 3000 are allowed: leave it out, or add --max-pixels 3500",
        "a/long.png": f"has {len(small) + 9000} bytes, and 9000 are allowed: leave it out, or add --max-bytes "
        f"{len(small) + 9000}",
    }
    assert rejected(out) == reasons
    pack(source, out, chosen, split="x", workers=1)
    for other, told in ((Options(0), "9000 and not"), (Options(0, max_bytes=9000), "3000 and not 2000")):
        with pytest.raises(ShardError, match=f"packed with --max-pixels .*{told}"):
            pack(source, out, other, split="x", workers=1)
    assert {"max_pixels", "max_bytes"}.isdisjoint(Options().stored)
    assert asdict(Options()).keys() - Options().stored.keys() == {"max_pixels", "max_bytes"}

    members = {"0.png": small, "0.cls": b"0", "1.png": (folder / "wide.png").read_bytes(), "1.cls": b"0"}
    members |= {"2.png": small + bytes(9000), "2.cls": b"0", "3.png": small, "3.cls": b"0" + b" " * 64}
    tar_of(tmp_path / "tars" / "a.tar", dict(members))
    index(tmp_path / "tars", classes=None, split="x", workers=1, allowed=chosen.limits)
    told = rejected(tmp_path / "tars")
    assert [told["a.tar/1"], told["a.tar/2"]] == list(reasons.values())
    assert told["a.tar/3"] == "its cls has 65 bytes, and a class number at most 64"
    assert index(tmp_path / "tars", classes=None, split="x", workers=1).samples == 3
    one, two = verify(tmp_path / "tars", workers=1, allowed=chosen.limits)
    assert one["reason"] == f"cannot be read: {reasons['a/wide.png']}"
    assert two["reason"] == f"cannot be read: {reasons['a/long.png']}"
    assert verify(tmp_path / "tars", workers=1) == []


# Less memory for the same result. ----------------------------------------------------------------------


def test_strips_are_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = np.asarray(some(), np.float64).reshape(-1, 3)
    for pixels in (1, 200, 96 * 72, 1 << 20):
        monkeypatch.setattr(pillow, "STRIP", pixels)
        parts = [strip.astype(np.float64).reshape(-1, 3) for _, strip in strips(some())]
        assert np.array_equal(np.concatenate(parts), whole)
        assert np.array_equal(sum(part.T @ part for part in parts), whole.T @ whole), "sums of integers: the same bits"


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "CMYK", "1", "LA", "I", "I;16", "I;16B"])
def test_what_is_made_of_an_image_has_not_changed(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Pillow makes it of the whole image at once."""
    monkeypatch.setattr(pillow, "STRIP", 1000)
    if mode.startswith("I"):
        levels = np.random.default_rng(0).integers(-9 if mode == "I" else 0, 70000 if mode == "I" else 65536, (72, 96))
        image = Image.fromarray(levels.astype({"I": "<i4", "I;16": "<u2", "I;16B": ">u2"}[mode]))
        expected = Image.fromarray((levels.clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    else:
        image = some().convert(mode)
        expected = image.convert("RGB")
    assert image.mode == mode
    assert np.array_equal(np.asarray(upright_rgb(image)), np.asarray(expected))
    for way in range(10):
        image.getexif()[ORIENTATION] = way
        turned = ImageOps.exif_transpose(expected.copy() if way == 0 else _with(expected, way))
        assert np.array_equal(np.asarray(upright_rgb(image)), np.asarray(turned)), way


def _with(image: Image.Image, way: int) -> Image.Image:
    copy = image.copy()
    copy.getexif()[ORIENTATION] = way
    return copy


@pytest.mark.parametrize("kind", ["JPEG", "MPO"])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_large_jpeg_is_reduced_while_it_is_decoded(kind: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    image = photograph(np.random.default_rng(5), 640, 480, TINTS[0]).convert(mode)
    turned = Image.Exif()
    turned[ORIENTATION] = 6
    data = encoded(image, kind, quality=95, exif=turned)
    full = np.asarray(Image.open(io.BytesIO(to_jpeg(data, 50, 95).jpeg)), np.float64)
    assert to_jpeg(data, 480, 95).jpeg != data
    monkeypatch.setattr(sources, "DRAFT", 1000)
    sizes = list[tuple[int, int]]()
    monkeypatch.setattr(sources, "upright_rgb", lambda image: (sizes.append(image.size), upright_rgb(image))[1])
    less = np.asarray(Image.open(io.BytesIO(to_jpeg(data, 50, 95).jpeg)), np.float64)
    assert sizes == [(80, 60)]
    assert full.shape == less.shape == (66, 50, 3)
    assert abs(full - less).mean() < 4


# What commands take. ----------------------------------------------------------------------------------

ALLOWED = "pixels, and 200000000 are allowed"
HOLE = 1 << 30  # bytes of a member that are not written; a tar is read whole for its hash
PIXELS = 64e6  # of each large image that is taken


def hostile() -> dict[str, tuple[bytes | int, str]]:
    """Files, or the size of one that is not written, and why they are left out, if they are."""
    text = zlib.compress(bytes(1 << 20), 9)
    texts = b"".join(bombs.chunk(b"zTXt", b"%d\0\0" % k + text) for k in range(1000))
    profile = bombs.chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(1 << 28), 9))
    entries = bombs.chunk(b"eXIf", bombs.exif(4000, 1 << 20))
    return {
        "pixels": (bombs.png(30000, 30000, 0), ALLOWED),
        "claim": (bombs.jpeg(22000, 22000), ALLOWED),
        "text": (bombs.png(64, 64, extra=texts), "Too much memory used in text chunks"),
        "profile": (bombs.png(64, 64, extra=profile), "Decompressed data too large"),
        "exif": (bombs.png(64, 64, extra=entries), ""),
        "sparse": (10 << 30, "bytes, and 500000000 are allowed"),
    }


def large() -> dict[str, tuple[bytes | int, str]]:
    return {
        "colour": (bombs.png(8000, 8000), ""),
        "deep": (bombs.png(8000, 8000, 0, 16), ""),
        "progressive": (bombs.jpeg(8000, 8000, progressive=True), ""),
    }


def commands(root: Path, files: dict[str, tuple[bytes | int, str]]) -> dict[str, Peak]:
    """Packs a folder with these files, then indexes and verifies a tar with them, in which a label has a GB too."""
    folder, tars, plain = root / "folder" / "a", root / "tars", encoded(some(), "PNG")
    folder.mkdir(parents=True)
    members: dict[str, bytes | int] = {"plain.png": plain, "plain.cls": b"0"}
    (folder / "plain.png").write_bytes(plain)
    for name, (data, _) in files.items():
        (folder / f"{name}.jpg").write_bytes(b"" if isinstance(data, int) else data)
        if isinstance(data, int):
            os.truncate(folder / f"{name}.jpg", data)
        members |= {f"{name}.png": min(data, HOLE) if isinstance(data, int) else data, f"{name}.cls": b"0"}
    if files:
        members |= {"label.png": plain, "label.cls": HOLE, "labels.png": plain, "labels.json": HOLE}
    tar_of(tars / "a.tar", members)
    took = {}
    for verb, words, out in (
        ("pack", ["imagefolder", str(root / "folder"), str(root / "set")], root / "set"),
        ("index", [str(tars)], tars),
        ("verify", [str(tars)], tars),
    ):
        took[verb] = peak(sys.executable, "-m", "pipelines", verb, *words, "--workers", "1")
        assert took[verb].code == 0, took[verb].text
        told = rejected(out)
        for name, (_, reason) in files.items():
            why = told.pop(f"a/{name}.jpg" if out == root / "set" else f"a.tar/{name}", "")
            assert reason in why, name
            assert bool(reason) == bool(why), why
        holes = ("cls", "json") if files and out == tars else ()
        assert [f"its {name} has {HOLE} bytes" in why for name, why in zip(holes, told.values(), strict=True)] == [
            True
        ] * len(holes)
    return took


@pytest.mark.integration
@pytest.mark.slow
def test_what_commands_take(tmp_path: Path) -> None:
    """Of memory, and of the CPUs' seconds, beside what they take for an ordinary image."""
    usual = commands(tmp_path / "usual", {})
    for name, files, pixels in (("hostile", hostile(), 0.0), ("large", large(), PIXELS)):
        for verb, took in commands(tmp_path / name, files).items():
            # Of the large ones `index` has DALI decode the deep one, as `verify` does with all: 700 MB to begin with.
            least = usual["verify" if verb == "index" and pixels else verb].mb
            assert took.mb < least + 150 + 16 * pixels / 1e6, (name, verb)
            assert took.seconds < usual[verb].seconds + SLOW * (2 if pixels else 1), (name, verb)


def test_an_animation_is_its_first_frame() -> None:
    with guarded():
        assert opened(bombs.gif(100_000)).size == (64, 64)
