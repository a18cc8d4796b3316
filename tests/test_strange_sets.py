"""Shard sets that a stranger made, with checksums that are right: a sentence, exit code 2, no signal, little memory."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import tarfile
import tracemalloc
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.lib.format import magic
from numpy.typing import NDArray
from PIL import Image

from pipelines.indexing import index
from pipelines.limits import Limits, limited
from pipelines.manifest import CLASSES, ShardError
from pipelines.pack import Options, pack
from pipelines.pillow import claims
from pipelines.rows import mapped
from pipelines.scanned import WORK, read_scan, rows_of
from pipelines.shards import ShardSet
from pipelines.sources import ImageFolder
from pipelines.tars import HEADERS, RECORDS, tar_samples
from pipelines.verify import verify
from tests.helpers.launch import launch
from tests.helpers.strange import change_manifest, change_rows

pytestmark = pytest.mark.integration

Body = dict[str, Any]


@pytest.fixture
def directory(shard_sets: Path, tmp_path: Path) -> Path:
    shutil.copytree(shard_sets / "val", tmp_path / "set")
    return tmp_path / "set"


def shard(body: Body) -> Body:
    found: Body = body["shards"][1]
    return found


MANIFESTS: dict[str, Callable[[Body], Any]] = {
    r"mean.0 should be less than or equal to 1, and is nan": lambda b: b.update(mean=[float("nan")] * 3),
    r"mean.1 should be less than or equal to 1": lambda b: b.update(mean=[0.5, 1.5, 0.5]),
    r"mean should have at least 3 items": lambda b: b.update(mean=[0.5] * 2),
    r"std.2 should be greater than or equal to 0": lambda b: b.update(std=[0.1, 0.1, -0.1]),
    r"eigenvalues.0 should be greater than or equal to 0": lambda b: b.update(eigenvalues=[-1.0, 0.0, 0.0]),
    r"eigenvectors.0.0 should be less than": lambda b: b.update(eigenvectors=[[1e300] * 3] * 3),
    r"eigenvectors should have at most 3": lambda b: b.update(eigenvectors=[[1.0] * 3] * 4),
    r"classes should have at most 1000000": lambda b: b.update(classes=[""] * (CLASSES + 1)),
    r"classes is missing": lambda b: b.pop("classes"),
    r"stored.x.bool should be": lambda b: b.update(stored={"x": [[]]}),
    r"sides.1 should be less than or equal to 65535": lambda b: b.update(sides=[1, 65536]),
    r"sides should be the least": lambda b: b.update(sides=[2, 1]),
    r"samples is 64, and the shards have 63": lambda b: b.update(samples=64),
    r"shards has a name twice": lambda b: shard(b).update(name=b["shards"][0]["name"]),
    r"shards has a name that is not": lambda b: shard(b).update(name="../x.tar"),
    r"shards.1.samples should be less than or equal to 100000000": lambda b: shard(b).update(samples=1 << 47),
    r"shards.1.sha256 should have at least 64": lambda b: shard(b).update(sha256=""),
    r"shards.1 should be a": lambda b: b["shards"].__setitem__(1, "x"),
    r"version.* is 'x+', this program|format version 'x+, this program": lambda b: b.update(version="x" * 10**6),
}


@pytest.mark.parametrize("says", MANIFESTS)
def test_a_manifest(says: str, directory: Path) -> None:
    change_manifest(directory, MANIFESTS[says])
    with pytest.raises(ShardError, match=rf"manifest.json (is damaged|has).*{says}") as caught:
        ShardSet(directory)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("text", [b"[" * 10**6, b'{"a":' * 10**6, b"9" * 10**5, b'{"checksum": 1' + b"0" * 5000 + b"}"])
def test_a_manifest_that_is_deep_or_long(text: bytes, directory: Path) -> None:
    (directory / "manifest.json").write_bytes(text)
    with pytest.raises(ShardError, match=r"manifest.json is damaged \("):
        ShardSet(directory)
    index(directory, classes=None, split="val", workers=1)
    assert len(ShardSet(directory)) == 63


@pytest.mark.parametrize("name", ["manifest.json", "quarantine.jsonl"])
def test_a_file_of_a_terabyte_is_not_read(name: str, directory: Path) -> None:
    with open(directory / name, "ab") as file:
        file.truncate(1 << 40)
    with pytest.raises(OSError, match=rf"{name} has more than \d+ bytes: put the right file there"):
        ShardSet(directory)


def header(text: str, version: int = 1) -> bytes:
    size = struct.pack("<H" if version == 1 else "<I", len(text))
    return magic(version, 0) + size + text.encode()


ROW = "[('offset','<u8'),('size','<u4'),('width','<u2'),('height','<u2'),('label','<i4'),('name','<u4'),('crc','<u4')]"
HEADER = "{{'descr': {}, 'fortran_order': False, 'shape': {}, }}\n"


def as_npz(rows: NDArray[Any]) -> bytes:
    data = io.BytesIO()
    np.savez(data, rows)
    return data.getvalue()


INDEXES: dict[str, Callable[[NDArray[Any]], bytes]] = {
    "npz": as_npz,
    "a pickle": lambda _: b"cposix\nsystem\n(S'false'\ntR.",
    "objects": lambda _: header(HEADER.format("'|O'", "(63,)")) + b"x" * 63 * 8,
    "two dimensions": lambda rows: header(HEADER.format(ROW, "(63, 1)")) + rows.tobytes(),
    "2^60 rows": lambda rows: header(HEADER.format(ROW, f"({1 << 60},)")) + rows.tobytes(),
    "less than no rows": lambda rows: header(HEADER.format(ROW, "(-1,)")),
    "a shape of 10^1000": lambda rows: header(HEADER.format(ROW, f"({10**1000},)")) + rows.tobytes(),
    "rows of text": lambda rows: header(HEADER.format(ROW, "('a',)")) + rows.tobytes(),
    "version 2": lambda rows: header(HEADER.format(ROW, "(63,)"), 2) + rows.tobytes(),
    "version 9": lambda rows: header(HEADER.format(ROW, "(63,)"), 9) + rows.tobytes(),
    "a deep header": lambda _: header("[" * 60_000),
    "an expression": lambda _: header("{'descr': __import__('os'), 'fortran_order': False, 'shape': (63,)}"),
    "an expression of powers": lambda _: header("9**9**9"),
    "one byte": lambda _: b"\x93",
    "a byte more": lambda rows: header(HEADER.format(ROW, "(63,)")) + rows.tobytes() + b"\0",
    "a byte less": lambda rows: header(HEADER.format(ROW, "(63,)")) + rows.tobytes()[:-1],
}


@pytest.mark.parametrize("name", INDEXES)
def test_an_index(name: str, directory: Path) -> None:
    path = directory / "index.npy"
    path.write_bytes(INDEXES[name](np.load(path)))
    for use in (ShardSet, lambda at: verify(at, workers=1)):
        with pytest.raises(ShardError, match=r"index.npy is damaged or of another shard set \(.*\): run `python"):
            use(directory)
    with pytest.raises(ValueError):
        mapped(path)


def test_headers_that_claim_to_be_long_are_not_read(directory: Path) -> None:
    path = directory / "index.npy"
    path.write_bytes(magic(2, 0) + struct.pack("<I", 4 * 10**9))
    os.truncate(path, 5 * 10**9)
    tracemalloc.start()
    with pytest.raises(ShardError, match="its header is none that this program writes"):
        ShardSet(directory)
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()


def no_width(rows: NDArray[Any]) -> None:
    rows["width"] = 0


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("width", 0, "has no pixels"),
        ("height", 0, "has no pixels"),
        ("offset", 511, "lies outside the tar"),
        ("offset", (1 << 64) - 1, "lies outside the tar"),
        ("size", 0, "lies outside the tar"),
        ("label", -1, "has a label out of range for 3 classes"),
    ],
)
def test_a_row(field: str, value: int, says: str, older: bool, directory: Path) -> None:
    """Of today's sets, and of those of an earlier day, by whatever way it is taken."""
    change_rows(directory, lambda rows: rows[field].__setitem__(5, value), older=older)
    shards, five = ShardSet(directory), np.array([5])
    for take in (shards.rows, shards.sizes, shards.labels, shards.cached, lambda of: list(shards.reads(of))):
        with pytest.raises(ShardError, match=f"index.npy is damaged .*row 5 of shard-000000.tar {says}"):
            take(five)
    for look in (lambda: shards.read(5), lambda: shards.name(5), lambda: shards.index):
        with pytest.raises(ShardError, match=f"row 5 of shard-000000.tar {says}"):
            look()


def test_a_place_that_no_file_has(directory: Path) -> None:
    """A tar is looked at where its first row says."""
    change_rows(directory, lambda rows: rows["offset"].__setitem__(0, (1 << 64) - 1))
    with pytest.raises(ShardError, match=r"shard-000000.tar is not the tar that was indexed"):
        ShardSet(directory).read(1)


@pytest.mark.integration
@pytest.mark.slow
def test_a_run_on_rows_without_pixels(shard_sets: Path, tmp_path: Path) -> None:
    """One sentence and exit code 2, with and without a launcher, which does not start it again."""
    shutil.copytree(shard_sets, tmp_path / "sets")
    change_rows(tmp_path / "sets" / "train", no_width)
    for ranks, agent in ((0, ""), (2, "--max-restarts=3")):
        result = launch(tmp_path / "sets", tmp_path / f"run{ranks}", ranks=ranks, agent=agent)
        assert result.returncode == (2 if not ranks else 1), result.stderr[-2000:]
        assert "has no pixels): run `python -m pipelines index" in result.stdout + result.stderr
        assert "SIGSEGV" not in result.stderr
        status = json.loads((tmp_path / f"run{ranks}" / "status.json").read_text())
        assert status["state"] == "failed"
        if not ranks:
            assert "Traceback" not in result.stderr


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.parametrize("width", [1, 10, 14000])
@pytest.mark.parametrize("older", [False, True])
def test_a_run_on_rows_of_other_sizes(width: int, older: bool, shard_sets: Path, tmp_path: Path) -> None:
    """Than those of the images, as their headers say: they are replaced, and counted."""

    def lie(rows: NDArray[Any]) -> None:
        rows["width"][::9] = rows["height"][::9] = width

    shutil.copytree(shard_sets, tmp_path / "sets")
    change_rows(tmp_path / "sets" / "train", lie, older=older)
    result = launch(tmp_path / "sets", tmp_path / "run", "--train.max_steps=6", ranks=0)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "has other sides than the index says: another sample takes its place" in result.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line["loss"]) for line in lines if "loss" in line)


def test_images_of_more_pixels_than_allowed(shard_sets: Path) -> None:
    """Are no part of a set that is opened, until it is told that they are wanted."""
    shards = ShardSet(shard_sets / "train")
    most = int((shards.index["width"].astype(int) * shards.index["height"]).max())
    for pixels in (most, most - 1):
        with limited(Limits(pixels=pixels)):
            again = ShardSet(shard_sets / "train")
        too_many = pytest.raises(ShardError, match=f"has more than the {pixels} pixels of max_pixels")
        with nullcontext() if pixels == most else too_many:
            again.rows(np.arange(len(again)))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_the_sides_that_a_header_claims(kind: str) -> None:
    written = io.BytesIO()
    Image.new("RGB", (70, 40)).save(written, kind)
    data = written.getbuffer()
    assert claims(data, (70, 40))
    assert claims(data, (40, 70)), "it may be turned"
    for sides in ((70, 41), (70, 70), (1, 1)):
        assert not claims(data, sides)
    for end in (0, 1, 9, 20):
        assert not claims(data[:end], (70, 40))


def test_a_header_with_a_number_without_an_end(tmp_path: Path) -> None:
    """Over which tarfile of Python 3.11.7 takes a minute (CVE-2024-6232)."""
    info = tarfile.TarInfo("a.jpg")
    info.pax_headers = {"comment": "1" * 200_000}
    (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.PAX_FORMAT) + bytes(1024))
    with pytest.raises(ShardError, match="has a number without an end"):
        list(tar_samples(tmp_path / "a.tar"))


QUARANTINES: dict[str, Callable[[str], bytes]] = {
    "is no JSON|JSON|Expecting|recursion": lambda _: b"[" * 10**6,
    "row should be greater than or equal to 0": lambda name: line(name, -1),
    "row should be a valid integer": lambda name: line(name, True),
    "shard 'shard-000000.tar' has no row 281474976710655": lambda name: line(name, (1 << 48) - 1),
    "there is no shard 'x*$": lambda _: line("x" * 10**6, 0),
    "index should be a valid string": lambda _: b'{"index": 3}\n',
    "it should be an object": lambda _: b"[]",
}


def line(name: str, row: Any) -> bytes:
    return json.dumps({"shard": name, "row": row}).encode() + b"\n"


@pytest.mark.parametrize("says", QUARANTINES)
def test_a_quarantine(says: str, directory: Path) -> None:
    (directory / "quarantine.jsonl").write_bytes(QUARANTINES[says]("shard-000000.tar"))
    with pytest.raises(
        ShardError, match=r"quarantine.jsonl is damaged \(.*: run `python -m pipelines verify"
    ) as caught:
        ShardSet(directory)
    assert len(str(caught.value)) < 500
    index(directory, classes=None, split="val", workers=1)  # of another index: it is removed


def test_a_quarantine_of_many_lines(directory: Path) -> None:
    """Of the same sample, and with a name that is not UTF-8, as `verify` writes it."""
    more = b'{"shard": "shard-000000.tar", "row": 4, "name": "\\udcff.jpg"}\n'
    (directory / "quarantine.jsonl").write_bytes(line("shard-000000.tar", 3) * 100_000 + more)
    assert ShardSet(directory).quarantined.tolist() == [3, 4]


@pytest.fixture
def begun(image_folder: Path, tmp_path: Path) -> Path:
    """A set whose shards are packed, and that is not finished."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.pack.finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            pack_val(image_folder, tmp_path / "begun")
    return tmp_path / "begun"


def pack_val(image_folder: Path, out: Path) -> None:
    pack(ImageFolder(image_folder / "val"), out, Options(shorter_side=72, shard_mb=0.06), split="val", workers=1)


SCANS: dict[str, Callable[[Body], Any]] = {
    "it is of another tar": lambda scan: scan["shard"].update(name="../x.tar"),
    "it is of another tar ": lambda scan: scan["shard"].update(bytes=7),
    "shard.samples should be": lambda scan: scan["shard"].update(samples=-1),
    "pixels should be a valid integer": lambda scan: scan.update(pixels=float("nan")),
    "pixels or odd are not": lambda scan: scan.update(pixels=0),
    "pixels or odd are not ": lambda scan: scan.update(odd=[10**6]),
    "total or products are larger": lambda scan: scan.update(total=[10**30] * 3),
    "total should have at most 3": lambda scan: scan.update(total=[1] * 4),
    "rejected should be a list": lambda scan: scan.update(rejected=[{"file": 1}]),
    "products is missing": lambda scan: scan.pop("products"),
}


@pytest.mark.parametrize("says", SCANS)
def test_a_scan_of_an_unfinished_set(says: str, begun: Path, image_folder: Path) -> None:
    path = begun / WORK / "shard-000001.tar.json"
    scan = json.loads(path.read_text())
    SCANS[says](scan)
    path.write_text(json.dumps(scan))
    with pytest.raises(ShardError, match=rf"{path} is damaged \({says.strip()}.*: remove it, and repeat the command"):
        pack_val(image_folder, begun)
    path.unlink()
    pack_val(image_folder, begun)
    assert len(ShardSet(begun)) == 63


def test_rows_of_an_unfinished_set(begun: Path, image_folder: Path) -> None:
    tar = begun / "shard-000001.tar"
    path = begun / WORK / "shard-000001.tar.npy"
    rows = np.load(path)
    lies = rows.copy()
    lies["width"][3] = 0
    for wrong, says in ((rows[1:], r"it has \d+ rows for \d+ samples"), (lies, "row 3 has no pixels")):
        np.save(path, wrong)
        with pytest.raises(ShardError, match=rf"npy is damaged \({says}\): remove it and .*json, and repeat"):
            pack_val(image_folder, begun)
    np.savez(path.with_suffix(""), rows)
    os.replace(f"{path.with_suffix('')}.npz", path)
    with pytest.raises(ShardError, match="npy is damaged"):
        rows_of(tar, read_scan(tar))


def test_a_plan_of_an_unfinished_set(begun: Path, image_folder: Path) -> None:
    (begun / WORK / "plan").write_bytes(b"\xff" * 10**6)
    with pytest.raises(ShardError, match="holds an unfinished pack of other files"):
        pack_val(image_folder, begun)


def tar_of(path: Path, *pieces: bytes) -> Path:
    path.write_bytes(b"".join(pieces))
    return path


def member(name: str = "a.cls", size: int = 1, kind: bytes = tarfile.REGTYPE) -> bytes:
    """The header of a member, as GNU tar writes it, which can say any size."""
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


BLOCK, END = b"1".ljust(512, b"\0"), bytes(10240)


def hostile(size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A header with the size in base 256, which may be negative."""
    raw = bytearray(member(kind=kind))
    raw[124:136] = (
        b"\xff" * 4 + size.to_bytes(8, "big", signed=True) if size < 0 else b"\x80" + size.to_bytes(11, "big")
    )
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw)
    return bytes(raw)


def pax(name: bytes, value: bytes) -> bytes:
    size = len(name) + len(value) + 3
    while len(str(size)) + len(name) + len(value) + 3 != size:
        size = len(str(size)) + len(name) + len(value) + 3
    return b"%d %s=%s\n" % (size, name, value)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def attributes(data: bytes, kind: bytes = tarfile.XHDTYPE) -> bytes:
    return member("pax", len(data), kind) + padded(data)


TARS = {
    "a member longer than the file": hostile(1 << 40) + BLOCK + END,
    "a member of 2^80 bytes": hostile(1 << 80) + BLOCK + END,
    "a member of -1 bytes": hostile(-1) + BLOCK + END,
    "a member of -1024 bytes": member() + BLOCK + hostile(-1024) + BLOCK + END,
    "attributes of 4 GB": hostile(4 << 30, tarfile.XHDTYPE) + BLOCK + END,
    "attributes of -512 bytes": hostile(-512, tarfile.XHDTYPE) + BLOCK + END,
    "a name of 4 GB": hostile(4 << 30, tarfile.GNUTYPE_LONGNAME) + BLOCK + END,
    "attributes that are long": attributes(pax(b"x", b"y" * HEADERS)) + member() + BLOCK + END,
    "attributes that are none": attributes(b"abc") + member() + BLOCK + END,
    "a size that is no number": attributes(pax(b"size", b"9" * 5000)) + member() + BLOCK + END + b"x",
    "a size that is negative": attributes(pax(b"size", b"-5120")) + member() + BLOCK + END,
    "attributes of attributes": attributes(b"") * 3000 + member() + BLOCK + END,
    "many global attributes": b"".join(
        attributes(b"".join(pax(b"k%d" % (1000 * i + k), b"") for k in range(1000)), tarfile.XGLTYPE) + member() + BLOCK
        for i in range(1 + RECORDS // 500)
    )
    + END,
    "an end inside a header": member() + BLOCK + member()[:100],
    "no end": member() + BLOCK,
    "nothing": b"",
    "a compressed one": b"\x1f\x8b" + bytes(600),
}


@pytest.mark.parametrize("name", TARS)
def test_a_tar(name: str, tmp_path: Path) -> None:
    path = tar_of(tmp_path / "x.tar", TARS[name])
    os.truncate(path, max(path.stat().st_size, (5 << 30) if "4 GB" in name else 0))  # a hole
    tracemalloc.start()
    try:
        list(tar_samples(path))
    except ShardError as error:
        assert str(error).startswith(f"{path} is not a whole, uncompressed tar (")
        assert "\n" not in str(error)
    else:
        assert name in ("a size that is no number", "attributes that are none")  # as tarfile takes them
    assert tracemalloc.get_traced_memory()[1] < 30e6
    tracemalloc.stop()


def test_members_that_are_no_images(tmp_path: Path) -> None:
    """Are left out, with the reason: sparse ones claim any size, and links lead elsewhere."""
    sparse = attributes(
        pax(b"GNU.sparse.major", b"0") + pax(b"GNU.sparse.map", b"0,1") + pax(b"GNU.sparse.size", b"%d" % (1 << 60))
    )
    links = (
        member("b.jpg", 0, tarfile.LNKTYPE) + member("c.jpg", 0, tarfile.SYMTYPE) + member("d.jpg", 0, tarfile.FIFOTYPE)
    )
    named = attributes(pax(b"path", b"e\0f\n.jpg")) + member()
    path = tar_of(tmp_path / "x.tar", sparse + member("a.jpg") + BLOCK, links, named + BLOCK, END)
    left = dict[str, str]()
    samples = list(tar_samples(path, left.__setitem__))
    assert {name: reason.partition(":")[0] for name, reason in left.items()} == {
        "a.jpg": "is stored with holes",
        "b.jpg": "is a link",
        "c.jpg": "is a link",
        "d.jpg": "is not a regular file",
    }
    assert [key for key, _ in samples] == ["e\0f\n"]


def test_a_million_members_are_not_kept(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "x.tar", member("a", 0) * 20_000, END)
    tracemalloc.start()
    assert list(tar_samples(path)) == []
    assert tracemalloc.get_traced_memory()[1] < 2e6
    tracemalloc.stop()


def test_tars_that_are_links(directory: Path, tmp_path: Path) -> None:
    """To tars elsewhere: a user has linked them, and they are only read."""
    for tar in sorted(directory.glob("*.tar")):
        tar.rename(tmp_path / tar.name)
        tar.symlink_to(tmp_path / tar.name)
    shards = ShardSet(directory)
    shards.check_tars(sizes=True)
    assert [len(shards.read(k)) > 0 for k in range(63)] == [True] * 63
    assert verify(directory, workers=1) == []


@pytest.mark.parametrize("name", ["a\nb.tar", "\x1b[2J.tar", "a\0.tar", "..", "/dev/zero"])
def test_names_of_tars(name: str, directory: Path) -> None:
    change_manifest(directory, lambda body: shard(body).update(name=name))
    with pytest.raises(ShardError, match="shards has a name that is not that of a file in the set"):
        ShardSet(directory)
    if name.endswith(".tar") and "\0" not in name:
        (directory / "shard-000001.tar").rename(directory / name)
        with pytest.raises(ShardError, match=r"has a name that is not UTF-8, or not in one line: rename it"):
            index(directory, classes=None, split="val", workers=1)


def test_names_of_classes_and_samples_are_printed_in_their_line(directory: Path) -> None:
    change_manifest(directory, lambda body: body.update(classes=["a\nb", "\x1b[2Jc", "d"]))
    assert ShardSet(directory).classes == ["a\\nb", "\\x1b[2Jc", "d"]
    data = directory / "shard-000000.tar"
    rows = np.load(directory / "index.npy")
    raw = bytearray(data.read_bytes())
    place = int(rows["offset"][1]) - 512
    raw[place + 2] = ord("\n")
    data.write_bytes(raw)
    assert "\\n" in ShardSet(directory)._name(0, place + 512)
