"""What `pack` says: before, of a disk that is too small; meanwhile; and at the end, of what became of each image."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from pipelines import room, speech
from pipelines.__main__ import main
from pipelines.errors import SourceError
from pipelines.manifest import Manifest
from pipelines.pack import Options, estimates, pack_share
from pipelines.sources import ImageFolder, Item, Source
from tests.conftest import TINTS, photograph

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parent.parent
OPTIONS = Options(shorter_side=72, shard_mb=0.2)  # those of `shard_sets`


def call(monkeypatch: pytest.MonkeyPatch, *args: object) -> int:
    monkeypatch.setattr("sys.argv", ["pipelines", *map(str, args)])
    return main()


# Room. -------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file system of 600 kB: a real one where root may mount it, otherwise what the kernel would say of one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = not subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=600k", "none", disk], capture_output=True
    ).returncode
    if not mounted:
        said = SimpleNamespace(f_blocks=150, f_bavail=150, f_frsize=4096)
        monkeypatch.setattr(os, "statvfs", lambda _: said)
    yield disk
    if mounted:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_estimate_is_near_the_size(split: str, shard_sets: Path, image_folder: Path, tmp_path: Path) -> None:
    options = Options(shorter_side=72, shard_mb=0.2 if split == "train" else 0.06)
    (guess,) = estimates([(ImageFolder(image_folder / split), tmp_path / "set")], options)
    assert guess is not None
    size = sum(path.stat().st_size for path in (shard_sets / split).iterdir())
    assert abs(guess.bytes - size) < 0.05 * size
    assert guess.shards == len(list((shard_sets / split).glob("*.tar")))
    assert guess.error < 0.1 * size
    assert not (tmp_path / "set").exists()


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(
    image_folder: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("pack", "imagefolder", image_folder / "train", small_disk / "sets" / "train", "--shorter-side", 72)
    assert call(monkeypatch, *words) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    told = (
        rf"error: {small_disk}/sets/train would take about (\d\.\d) MB more, and 0\.6 MB are free on the file system "
    )
    found = re.fullmatch(told + rf"of {small_disk}: make room there, or pack into a directory on another disk", said)
    assert found
    assert float(found[1]) > 0.6
    assert not list(small_disk.iterdir())


def test_both_sets_are_looked_at_before_the_first_is_packed(
    image_folder: Path, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One has room, but not both."""
    source = ImageFolder(image_folder / "val")
    sets = [(source, small_disk / name) for name in ("train", "val")]
    big = Options(shorter_side=120)
    (guess,) = estimates(sets[:1], big)
    assert guess is not None
    assert guess.bytes < 600_000 < 1.9 * guess.bytes
    with pytest.raises(SourceError, match=f"{small_disk}/train and {small_disk}/val would take about"):
        estimates(sets, big)
    assert estimates([*sets[:1], (source, tmp_path / "elsewhere")], big)


@pytest.mark.integration
def test_what_is_there_is_needed_no_more(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = ImageFolder(image_folder / "train"), tmp_path / "set"
    pack_share(source, out, OPTIONS, (0, 2), split="set", workers=2)
    there = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    (guess,) = estimates([(source, out)], OPTIONS)
    assert guess is not None
    for free, enough in ((guess.bytes - there + 1e4, True), (guess.bytes - there - 2 * guess.error - 1e4, False)):
        said = SimpleNamespace(f_blocks=1, f_bavail=int(free), f_frsize=1)
        monkeypatch.setattr(os, "statvfs", lambda _, said=said: said)
        if enough:
            assert estimates([(source, out)], OPTIONS) == [guess]
        else:
            with pytest.raises(SourceError, match="would take about"):
                estimates([(source, out)], OPTIONS)
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_blocks=0, f_bavail=0, f_frsize=4096))
    assert estimates([(source, out)], OPTIONS) == [guess], "some file systems do not tell"


class Slow(Source):
    """Takes 20 ms for an image."""

    classes = ("a",)
    items = tuple(Item(str(i), i, 0) for i in range(40))

    def load(self, reference: int) -> Image.Image:
        time.sleep(0.02)
        return Image.new("RGB", (30, 30))


def test_an_estimate_that_takes_long_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = "encoding 40 of 40 images to estimate the size of the set ...\n"
    for seconds, said in ((0.2, line), (60, "")):
        monkeypatch.setattr(speech, "SILENCE", seconds)
        estimates([(Slow(), tmp_path / "set")], OPTIONS)
        assert capsys.readouterr().err == said


# The bar. ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_the_bar_fits_a_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """ImageNet, of which half is done, and half of that by an earlier start."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with os.fdopen(theirs, "w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        with speech.bar(1281167, "pack train", "img", initial=320_000, lines=True) as shown:
            shown.start_t -= 3200  # this start is as old as that
            shown.last_print_t -= 3200
            shown.update(320_000)
        text = ""
        while select.select([ours], [], [], 0.5)[0]:
            text += os.read(ours, 1 << 16).decode()
    os.close(ours)
    states = [state for state in re.split(r"[\r\n]+", text) if state]
    assert states[0].startswith("pack train |")
    assert "| 320000/1281167, ?img/s, ? left" in states[0]
    assert all(len(state) < columns for state in states)
    assert re.search(r"█.*\| 640000/1281167, (100|99)\.\d\dimg/s, 1:4\d:\d\d left$", states[-1]), states


# The end. -----------------------------------------------------------------------------------------------


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A folder: 30 small images, 20 that have the size already, 50 large ones; 4 of garbage, one that is cut off, a
    file outside the classes, and one of a system."""
    rng, root = np.random.default_rng(0), tmp_path / "mixed"
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
    for i, side in enumerate([30] * 30 + [64] * 20 + [80] * 50):
        photograph(rng, side + 9, side, TINTS[0]).save(root / "ab"[i % 2] / f"{i:03}.jpg", quality=90)
    for i in range(4):
        (root / "a" / f"broken {i}.jpg").write_bytes(bytes(range(200)))
    (root / "b" / "half.jpg").write_bytes((root / "a" / "098.jpg").read_bytes()[:900])
    (root / "b" / ".DS_Store").touch()
    (root / "readme.txt").touch()
    return root


KEPT = "30 small ones enlarged; 20 stored as they were"


@pytest.mark.integration
def test_the_summary(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sets" / "x"
    words = ("pack", "imagefolder", mixed, out, "--shorter-side", 64, "--workers", 2)
    assert call(monkeypatch, *words) == 0
    said = capsys.readouterr()
    left = f"6 rejected, 1 passed over, see {out}/rejected.jsonl"
    assert said.out == f"{out}: 100 images of 2 classes in 1 shards, 0 MB; {left}\n"
    remarks = [line for line in said.err.splitlines() if line.startswith(str(out))]
    assert re.fullmatch(rf"{out}: rejected: cannot identify image file.* \(4\); .* \(1\); .* \(1\)", remarks[0])
    assert re.fullmatch(rf"{out}: {KEPT}; packed in 0:00:\d\d, \d+ images/s", remarks[1])
    assert len(remarks) == 2
    assert call(monkeypatch, *words) == 0
    again = capsys.readouterr()
    assert again.out == said.out.replace("\n", "; already packed\n")
    assert again.err.splitlines() == [remarks[0], f"{out}: {KEPT}"]
    (out / "rejected.jsonl").write_text('{"file": "a"}\n')
    assert call(monkeypatch, *words) == 2
    assert "rejected.jsonl is damaged (a line has no reason): " in capsys.readouterr().err


@pytest.mark.integration
@pytest.mark.slow
def test_what_an_earlier_start_has_done(mixed: Path, tmp_path: Path) -> None:
    """Counts in the summary, and in the bar, but not in its rate."""
    out, options = tmp_path / "x", Options(shorter_side=64, shard_mb=0.05)
    pack_share(ImageFolder(mixed), out, options, (0, 2), split="x", workers=2)
    done = sum(int(re.search(r'"samples": (\d+)', path.read_text())[1]) for path in out.glob(".pack/*.json"))  # type: ignore[index]
    left = sum(path.read_text().count("reason") for path in out.glob(".pack/*.json"))
    words = ["pack", "imagefolder", str(mixed), str(out), "--shorter-side=64", "--shard-mb=0.05"]
    ended = subprocess.run([sys.executable, "-m", "pipelines", *words], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    bar = [line for line in ended.stderr.splitlines() if line.startswith("pack x: ")]
    assert bar[0] == f"pack x: {done + left} of 105, ?img/s, ? left"
    assert re.fullmatch(r"pack x: 105 of 105, [\d.]+img/s, 00:00 left", bar[-1].replace("  ", " "))
    now = 105 - done - left
    assert re.search(rf"{out}: {KEPT}; {now} of them packed now, in 0:00:\d\d, \d+ images/s\n", ended.stderr)
    assert Manifest.read(out).stored["enlarged"] == 30
    assert Manifest.read(out).stored["unchanged"] == 20


def test_the_record_is_that_of_a_tar() -> None:
    """The end of each tar is filled up to it."""
    import tarfile

    assert room.RECORD == tarfile.RECORDSIZE
