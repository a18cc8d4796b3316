"""`python -m pipelines` as a user sees it: output, exit codes, no tracebacks."""

from __future__ import annotations

import gzip
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from matplotlib.figure import Figure
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

from pipelines import origin, preview, torchvision_sets
from pipelines.__main__ import main
from pipelines.cli import Verb, run_verb
from pipelines.manifest import Manifest
from pipelines.pack import Options, pack
from pipelines.shards import ShardSet
from pipelines.sources import ImageFolder

ROOT = Path(__file__).parent.parent
FASHION = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]


def python_m_pipelines(*args: object, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs the command in a process of its own."""
    command = [sys.executable, "-m", "pipelines", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **env})


def call(monkeypatch: pytest.MonkeyPatch, *args: object) -> int:
    """Runs the command in this process, which saves the imports."""
    monkeypatch.setattr("sys.argv", ["pipelines", *map(str, args)])
    try:
        return main()
    except SystemExit as leaving:  # argparse
        return int(leaving.code or 0)


@pytest.mark.integration
def test_pack_imagefolder(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "src" / "blue").mkdir(parents=True)
    (tmp_path / "src" / "amber").symlink_to(image_folder / "val" / "amber")
    (tmp_path / "src" / "blue" / "no-image.jpg").write_text("garbage")
    (tmp_path / "src" / "été").mkdir()
    shutil.copy(image_folder / "val" / "blue" / "000.jpg", tmp_path / "src" / "été" / "ü.jpg")
    out = tmp_path / "sets" / "évaluer"
    args = ("pack", "imagefolder", tmp_path / "src", out, "--shorter-side", 64, "--workers", 1)
    ascii_locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = python_m_pipelines(*args, **ascii_locale)
    assert done.returncode == 0, done.stderr
    line = rf"{out}: 22 images of 3 classes in 1 shards, \d+ MB; 1 rejected, see {out}/rejected.jsonl\n"
    assert re.fullmatch(line, done.stdout)
    assert ShardSet(out).classes == ["amber", "blue", "été"]
    assert ShardSet(out).manifest.split == "évaluer"
    assert ShardSet(out).sides == (64, 64)
    assert call(monkeypatch, *args) == 0
    assert capsys.readouterr().out == done.stdout.replace("\n", "; already packed\n")
    assert call(monkeypatch, *args, "--seed", 1) == 2
    message = f"error: {out} already holds 22 images in 1 shards, packed with --seed 0 and not 1: "
    message += f"pack into another directory, or remove {out} with all of these first\n"
    assert capsys.readouterr() == ("", message)


def test_pack_keep_small(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ("pack", "imagefolder", image_folder / "val", tmp_path / "set", "--shorter-side", 90, "--workers", 1)
    assert call(monkeypatch, *args, "--keep-small") == 0
    assert ShardSet(tmp_path / "set").sides == (72, 90)
    before = (tmp_path / "set" / "manifest.json").read_bytes()
    capsys.readouterr()
    assert call(monkeypatch, *args, "--keep-small") == 0
    assert capsys.readouterr().out.endswith("; already packed\n")
    assert call(monkeypatch, *args) == 0  # as the command was before there was this option
    told = "; already packed, small images as they were: to have it otherwise, pack into another directory\n"
    assert capsys.readouterr().out.endswith(told)
    assert (tmp_path / "set" / "manifest.json").read_bytes() == before
    assert call(monkeypatch, "pack", "imagefolder", image_folder / "val", tmp_path / "new", "--shorter-side", 90) == 0
    assert ShardSet(tmp_path / "new").sides == (90, 90)


def test_already_packed_is_said_without_opening_the_set(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also for an older set whose index is gone. The plan, which lists all files, is made once."""
    out, planned = tmp_path / "set", []
    args = ("pack", "imagefolder", image_folder / "val", out, "--shorter-side", 64, "--workers", 1)
    assert call(monkeypatch, *args) == 0
    replace(Manifest.read(out), sides=[]).write(out)
    (out / "index.npy").unlink()
    plan = origin.fingerprints
    monkeypatch.setattr(origin, "fingerprints", lambda *args: (planned.append(args), plan(*args))[1])
    capsys.readouterr()
    assert call(monkeypatch, *args) == 0
    assert capsys.readouterr().out.endswith("; already packed\n")
    assert len(planned) == 1


@pytest.mark.integration
def test_pack_fashion_mnist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From Debian's package, unpacked without root, so no network is used; random pixels in place of clothes."""
    unpacked = tmp_path / "raw" / torchvision_sets.DEBIAN
    unpacked.mkdir(parents=True)
    monkeypatch.setattr(torchvision_sets, "INSTALLED", tmp_path / "nowhere")
    rng = np.random.default_rng(3)
    pixels, labels = {}, {}
    for split, prefix, n in (("train", "train", 40), ("val", "t10k", 12)):
        smooth = [Image.fromarray(rng.integers(0, 256, (5, 5), np.uint8)).resize((28, 28)) for _ in range(n)]
        pixels[split], labels[split] = np.stack([np.asarray(image) for image in smooth]), rng.integers(0, 10, n)
        head = np.array([0x803, n, 28, 28], ">i4").tobytes()
        file = unpacked / f"{prefix}-images-idx3-ubyte.gz"
        file.write_bytes(gzip.compress(head + pixels[split].tobytes()))
        head = np.array([0x801, n], ">i4").tobytes()
        file = unpacked / f"{prefix}-labels-idx1-ubyte.gz"
        file.write_bytes(gzip.compress(head + labels[split].astype(np.uint8).tobytes()))
    assert call(monkeypatch, "pack", "fashion-mnist", tmp_path, "--workers", 1) == 0
    printed = capsys.readouterr().out
    for split, n in (("train", 40), ("val", 12)):
        assert f"{tmp_path / split}: {n} images of 10 classes" in printed
        shards = ShardSet(tmp_path / split)
        assert shards.classes == FASHION
        assert shards.manifest.split == split
        assert shards.sides == (28, 28)  # stored as it is
        for i in range(n):
            number = int(shards.name(i).split("/")[1].split("-")[0])
            image = np.asarray(Image.open(io.BytesIO(shards.read(i).tobytes())), np.int64)
            assert abs(image - pixels[split][number][..., None]).mean() < 3
            assert shards.index["label"][i] == labels[split][number]


def test_index(
    shard_sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for packed in (shard_sets / "val").glob("*.tar"):
        shutil.copy(packed, tmp_path)
    (tmp_path / "names.txt").write_text("one\ntwo\nthree\n")
    assert call(monkeypatch, "index", tmp_path, "--classes", tmp_path / "names.txt", "--workers", 2) == 0
    assert f"{tmp_path}: 63 images of 3 classes" in capsys.readouterr().out
    assert ShardSet(tmp_path).classes == ["one", "two", "three"]

    # An editor's byte order mark and blank last lines are no names; a blank line between names would shift them.
    (tmp_path / "names.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\nthree\r\n\r\n\n")
    assert call(monkeypatch, "index", tmp_path, "--classes", tmp_path / "names.txt", "--workers", 2) == 0
    assert ShardSet(tmp_path).classes == ["one", "two", "three"]
    (tmp_path / "names.txt").write_text("one\n\nthree\nfour\n")
    assert call(monkeypatch, "index", tmp_path, "--classes", tmp_path / "names.txt") == 2
    assert f"line 2 of {tmp_path}/names.txt is blank: it takes one class name per line" in capsys.readouterr().err

    tar = tmp_path / "shard-000001.tar"
    os.truncate(tar, 20_000)
    assert call(monkeypatch, "index", tmp_path) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(rf"error: {tar} is not a whole, uncompressed tar \(.*\): copy or make it anew", last)


def test_index_tells_what_it_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "PNG")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in (
            ("._0.png", b"?"),
            ("0.png", image.getvalue()),
            ("._0.cls", b"?"),
            ("0.cls", b"0"),
            ("x", b""),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    (tmp_path / "._a.tar").write_bytes(b"of a Mac")
    for other in ("b.tar.gz", "c.tgz", "d.tar.zst", "train/e.tar"):
        (tmp_path / other).parent.mkdir(exist_ok=True)
        (tmp_path / other).touch()
    assert call(monkeypatch, "index", tmp_path, "--workers", 1) == 0
    told = capsys.readouterr()
    assert told.err.startswith(
        f"{tmp_path}: only uncompressed *.tar files directly in it are indexed, not b.tar.gz, c.tgz, "
        f"d.tar.zst and 1 more\n"
    )
    assert told.out == (
        f"{tmp_path}: 1 images of 1 classes in 1 shards, 0 MB\n"
        f"{tmp_path}: statistics of all 1 images: mean (0.000, 0.000, 0.000), "
        f"standard deviation (0.000, 0.000, 0.000)\n"
        f"{tmp_path}: 3 members or samples were left out, see {tmp_path}/rejected.jsonl: "
        f"AppleDouble companion of a file (._name), which a Mac writes (2); has no extension (1)\n"
    )


def test_index_of_shards_that_are_sorted_by_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "PNG")
    for label in range(64):
        with webdataset.TarWriter(str(tmp_path / f"{label:02d}.tar")) as tar:
            for i in range(4):
                tar.write({"__key__": f"{i}", "png": image.getvalue(), "cls": label})
    assert call(monkeypatch, "index", tmp_path, "--workers", 2) == 0
    line = rf"{tmp_path} is sorted by class: a batch of 128 would show \d\d classes, against (59|6\d) in a full shuffle"
    assert re.search(line + r": train with --data.shuffle_shards \d+\n", capsys.readouterr().out)
    assert call(monkeypatch, "index", tmp_path, "--workers", 2) == 0


@pytest.mark.integration
def test_preview(shard_sets: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder" / "grid.png"
    done = python_m_pipelines("preview", shard_sets / "val", out, "--resize", 72, "--crop", 67, "--rows", 3)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{out}\n"
    with Image.open(out) as image:
        assert image.format == "PNG"
        assert min(image.size) > 400


def test_preview_shows_originals_beside_their_versions(
    shard_sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = []

    class Kept(Figure):
        def savefig(self, *args: Any, **kwargs: Any) -> None:
            figures.append(self)

    monkeypatch.setattr(preview, "Figure", Kept)
    preview.draw(shard_sets / "train", tmp_path / "x.png", resize=72, crop=70, rows=3, seed=0)
    cells = np.array(figures[0].axes).reshape(3, 6)
    drawn: dict[int, list[list[float]]] = {1: [], 10: []}
    titles = ["original", "epoch 1\nno lighting", "epoch 1", "epoch 1\nlighting x 10", "epoch 2", "epoch 3"]
    assert [cell.get_title() for cell in cells[0]] == titles
    assert {row[0].get_ylabel().split("\n")[0] for row in cells} == {"amber", "blue", "green"}
    for row in cells:
        original, *versions = (np.asarray(cell.get_images()[0].get_array(), np.int64) for cell in row)
        assert row[0].get_ylabel().endswith(f"\n{original.shape[1]}x{original.shape[0]}")
        views = sliding_window_view(np.stack([original, original[:, ::-1]]), (70, 70, 3), axis=(1, 2, 3))
        for version in versions:  # a crop of the original or its reflection, with a shift of each channel
            shift = version - views
            inside = (version > 0) & (version < 255)  # not cut to the range of a screen
            spread = [np.ptp(shift[..., k][..., inside[..., k]], axis=-1) for k in range(3)]
            assert np.max(spread, axis=0).min() <= 1
        assert len({version.tobytes() for version in versions}) == 5
        plain, lit, strong = versions[:3]  # of one crop, which lighting shifts by what stands below
        assert [cell.get_xlabel() for cell in row[[0, 1, 4, 5]]] == [""] * 4
        for version, cell, times in ((lit, row[2], 1), (strong, row[3], 10)):
            inside = (plain > 0) & (plain < 255) & (version > 0) & (version < 255)
            shift = [(version - plain)[..., k][inside[..., k]].mean() for k in range(3)]
            told = [float(level) for level in cell.get_xlabel().split()]
            np.testing.assert_allclose(told, shift, atol=0.6)
            drawn[times].append(told)
    np.testing.assert_allclose(drawn[10], 10 * np.array(drawn[1]), atol=0.6)
    assert np.abs(drawn[10]).min(1).max() > 10, "it can be seen"


def test_preview_looks_at_a_part_of_a_large_set(
    shard_sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_at: list[int] = []
    rows = ShardSet.rows
    monkeypatch.setattr(
        ShardSet, "rows", lambda shards, samples: (looked_at.append(len(samples)), rows(shards, samples))[1]
    )
    monkeypatch.setattr(preview, "LOOKED_AT", 50)
    preview.draw(shard_sets / "train", tmp_path / "x.png", resize=72, crop=70, rows=3, seed=0)
    assert max(looked_at) == 50


@pytest.mark.integration
@pytest.mark.parametrize(
    ("resize", "path"),
    [
        (72, "no image had to be resized to shorter side 72"),
        (80, "176 of the 176 measured images were resized to shorter side 80"),
    ],
)
def test_bench(shard_sets: Path, resize: int, path: str) -> None:
    options = ("--resize", resize, "--crop", 67, "--batch", 8, "--read-ms", 5)
    done = python_m_pipelines("bench", shard_sets / "train", *options)
    assert done.returncode == 0, done.stderr
    speed, told, mixed = done.stdout.splitlines()
    assert re.fullmatch(r"\d+ images/s, \d+ CPU us/image, 5 ms added to each read", speed)
    assert int(speed.split()[0]) > 1000 / 5  # what one reader after another would reach
    assert told == path
    assert re.fullmatch(r"\d\.\d classes in a batch of 8; \d\.\d after a full shuffle", mixed)
    assert not done.stderr  # DALI warns of what is fed in vain


def test_bench_of_a_small_set_has_a_batch_of_its_own(
    shard_sets: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of 63 images it makes 16 batches and more."""
    assert call(monkeypatch, "bench", shard_sets / "val", "--resize", 72, "--crop", 67) == 0
    assert " classes in a batch of 3; " in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.integration
def test_bench_tells_how_many_images_are_resized(image_folder: Path, tmp_path: Path) -> None:
    """A part of the set, by an independent count."""
    sizes = []
    for path in (image_folder / "train").rglob("*.jpg"):
        with Image.open(path) as image:
            sizes.append(min(image.size))
    pack(ImageFolder(image_folder / "train"), tmp_path / "set", Options(shorter_side=0), split="train", workers=1)
    done = python_m_pipelines("bench", tmp_path / "set", "--resize", 80, "--crop", 67, "--batch", 8)
    assert done.returncode == 0, done.stderr
    scaled, _, _, measured = done.stdout.splitlines()[1].split()[:4]
    share = np.mean([side != 80 for side in sizes])
    assert share == 0.75
    assert abs(int(scaled) / int(measured) - share) < 0.15  # it measures 176 of the 240


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["pack", "imagefolder", "DIR/nowhere", "DIR/out"], "DIR/nowhere is not a folder: give the one whose"),
        (["pack", "imagefolder", "DIR"], "pack imagefolder takes SRC and DST"),
        (["pack", "fashion-mnist", "DIR", "DIR/out"], "pack fashion-mnist takes DST alone"),
        (["pack", "imagefolder", "DIR", "DIR/out"], "DIR/out lies in DIR, whose folders are the classes: pack into"),
        (["pack", "imagefolder", "DIR", "DIR/out", "--quality", "0"], "--quality is 0: it must lie between 1 and 95"),
        (["pack", "no-such-set", "DIR/out"], "torchvision has no data set 'no-such-set'; it has"),
        (["pack", "imagefolder", "DIR", "DIR/out", "--workers", "0"], "argument --workers: 0 is below 1"),
        (["index", "DIR"], "no shards in DIR: expected uncompressed *.tar files of WebDataset samples"),
        (["index", "SET", "--classes", "DIR/nowhere.txt"], "No such file or directory: 'DIR/nowhere.txt'"),
        (["preview", "DIR", "DIR/x.png"], "no shards in DIR: make them with `python -m pipelines pack"),
        (["preview", "SET", "SET", "--resize", "72", "--crop", "67", "--rows", "1"], "Is a directory: 'SET'"),
        (["preview", "SET", "DIR/x.png", "--resize", "60", "--crop", "67"], "--crop 67 is larger than --resize 60"),
        (["preview", "SET", "DIR/x.png", "--rows", "0"], "argument --rows: 0 is below 1"),
        (["bench", "SET", "--crop", "many"], "argument --crop: 'many' is not a whole number"),
        (["bench", "SET", "--batch", "1000"], "SET has 63 samples, not 16 batches of 1000: give a smaller --batch"),
        (["bench", "DIR/nowhere"], "no shards in DIR/nowhere: make them with"),
        (["preview", "SET", "DIR/x.png", "--row", "3"], "unknown option --row: did you mean --rows?"),
        (["preview", "SET", "DIR/x.png", "--seed", "-1"], "argument --seed: -1 is below 0"),
        (["pack", "imagefolder", "DIR", "DIR/out", "--seed", "-1"], "argument --seed: -1 is below 0"),
        (["preview", "SET", "DIR/x.png", "--seed", str(1 << 64)], f"{1 << 64} is above {(1 << 64) - 1}"),
        (["index", "SET", "--classes", "SET/index.npy"], "SET/index.npy is not a text file in UTF-8"),
        (["verify", "SET", "DIR"], "DIR is one argument too many: see python -m pipelines verify --help"),
        (["verify", "SET", "--work", "1"], "unknown option --work: did you mean --workers?"),
        (["make"], "unknown verb make: type `python -m pipelines pack imagefolder SRC DST`"),
        ([], "python -m pipelines needs a verb: one of pack, index, verify, preview, bench"),
    ],
)
def test_errors_are_one_sentence_and_exit_code_2(
    shard_sets: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    args: list[str],
    message: str,
) -> None:
    places = {"DIR": str(tmp_path), "SET": str(shard_sets / "val")}

    def fill(text: str) -> str:
        return re.sub("DIR|SET", lambda match: places[match[0]], text)

    assert call(monkeypatch, *map(fill, args)) == 2
    out, err = capsys.readouterr()
    assert fill(message) in err
    assert out == ""


def test_nothing_is_packed_where_one_of_two_sets_has_no_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The path lies in the home of the user: a shell leaves the `~` of `--classes=~/x` as it is, a script every one."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "sets" / "val").mkdir(parents=True)
    (tmp_path / "sets" / "val" / "notes.txt").touch()
    assert call(monkeypatch, "pack", "fashion-mnist", "~/sets") == 2
    assert f"error: {tmp_path}/sets/val holds notes.txt, which `pack` did not make: " in capsys.readouterr().err
    assert os.listdir(tmp_path / "sets") == ["val"]
    (tmp_path / "sets" / "val" / "a.tar").touch()
    assert call(monkeypatch, "index", tmp_path / "sets" / "val", "--classes=~/names.txt") == 2
    assert f"No such file or directory: '{tmp_path}/names.txt'" in capsys.readouterr().err


def test_what_follows_two_dashes_is_no_option(
    shard_sets: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "verify", "--workers=1", "--", shard_sets / "val") == 0
    assert call(monkeypatch, "verify", "--", "--no-such-folder") == 2
    assert "--no-such-folder" in capsys.readouterr().err


def test_a_process_that_fails_has_no_traceback(tmp_path: Path) -> None:
    failed = python_m_pipelines("preview", tmp_path, tmp_path / "x.png", "--resize", 60, "--crop", 67)
    assert failed.returncode == 2
    assert failed.stdout == ""
    assert failed.stderr.endswith("error: --crop 67 is larger than --resize 60: it is cut from that\n")
    assert "Traceback" not in failed.stderr


def test_ctrl_c_ends_any_verb(capsys: pytest.CaptureFixture[str]) -> None:
    def start(args: Namespace) -> int:
        raise KeyboardInterrupt

    verbs = {"wait": Verb("wait for ever", lambda parser: None, start)}
    assert run_verb("program", verbs, ["wait"]) == 130
    assert capsys.readouterr() == ("", "interrupted\n")
    assert run_verb("program", verbs, ["wait"], speaks=False) == 130
    assert capsys.readouterr() == ("", "")
