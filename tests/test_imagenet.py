"""ImageNet as people have it: whatever the layout, the colour of each image is that of the class of its label."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import pickle
import re
import signal
import struct
import sys
import tarfile
import time
import tracemalloc
import zlib
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import scipy.io
from PIL import Image

from dist_train.cli import parse
from dist_train.data import pack_source
from pipelines.__main__ import main
from pipelines.errors import UserError
from pipelines.kinds import kind
from pipelines.png import fit
from pipelines.published.imagenet import imagenet
from pipelines.published.mat import structures
from pipelines.sent import received, sent
from pipelines.sources import SOURCES
from slurm.packing import kind_first
from tests.helpers import imagenet as made
from tests.helpers.imagenet import BROKEN, DIRTY, KINDS, NAMES, layouts, train_pictures, val_pictures
from tests.helpers.launch import alive, finish, spawn

LAYOUTS = "official|folder of the official|kaggle|kaggle, ILSVRC|kaggle, CLS-LOC|unpacked|unpacked, csv|sorted"
COLOURS = np.array([one.colour for one in KINDS])


@pytest.fixture(scope="session")
def clean(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """All layouts of the same small images."""
    return layouts(tmp_path_factory.mktemp("imagenet"), train_pictures(3, dirt=False), val_pictures(2))


@pytest.fixture(scope="session")
def dirty(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """All layouts of the same images, with the dirt of the real ones."""
    return layouts(tmp_path_factory.mktemp("imagenet"), train_pictures(), val_pictures())


def colour_of(data: bytes) -> int:
    """The class whose colour an image has."""
    mean = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), np.float64).mean((0, 1))
    distances = abs(COLOURS - mean).max(1)
    assert distances.min() < 25, f"no class has the colour {mean}"
    return int(distances.argmin())


def packed(directory: Path) -> list[tuple[str, int, int]]:
    """(key, label, class of the colour) per sample of a set, by tarfile."""
    found = []
    for path in sorted(directory.glob("*.tar")):
        with tarfile.open(path) as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        keys = sorted({name.partition(".")[0] for name in files})
        found += [(key, int(files[f"{key}.cls"]), colour_of(files[f"{key}.jpg"])) for key in keys]
    return found


def shards(directory: Path) -> dict[str, str]:
    return {tar.name: hashlib.sha256(tar.read_bytes()).hexdigest() for tar in sorted(directory.glob("*/*.tar"))}


def rejected(directory: Path) -> dict[str, str]:
    lines = map(json.loads, (directory / "rejected.jsonl").read_text().splitlines())
    return {line["file"]: line["reason"] for line in lines}


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "pipelines", "pack", "imagenet", *map(str, words)]


def run(*words: object) -> str:
    """What `pack imagenet` prints."""
    result = finish(spawn(command(*words, "--shorter-side", 32, "--workers", 2)), 120)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def refused(*paths: Path, train: bool = True) -> str:
    """The sentence on files that cannot be packed."""
    with pytest.raises(UserError) as caught:
        _ = imagenet(*paths, train=train).items
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("layout", LAYOUTS.split("|"))
def test_each_label_is_that_of_the_colour(clean: dict[str, list[Path]], layout: str) -> None:
    names = []
    for train, count in ((True, 18), (False, 12)):
        source = imagenet(*clean[layout], train=train)
        assert source.classes == NAMES, "sorted by WordNet id, with the words of Kaggle's LOC_synset_mapping.txt"
        assert [colour_of(source.load(item.reference)) for item in source.items] == [i.label for i in source.items]
        assert len(source.items) == count
        assert list(source.rejected) == []
        names.append([item.name for item in source.items])
    reference = [[i.name for i in imagenet(*clean["official"], train=train).items] for train in (True, False)]
    assert names == reference, "the same images in the same order give the same shards"


def test_csv_alone_gives_no_words_but_the_same_labels(clean: dict[str, list[Path]], tmp_path: Path) -> None:
    table = tmp_path / "labels"
    table.write_text((clean["kaggle"][0] / "LOC_val_solution.csv").read_text())
    source = imagenet(*clean["unpacked"][:2], table, train=False)
    assert source.classes == [one.wnid for one in KINDS]
    assert [colour_of(source.load(item.reference)) for item in source.items] == [i.label for i in source.items]


def test_files_in_any_order(clean: dict[str, list[Path]]) -> None:
    train, val, kit = clean["official"]
    for paths in ((val, train, kit), (kit, val, train)):
        assert imagenet(*paths, train=True).parts == imagenet(train, val, kit, train=True).parts
    sets = clean["sorted"]
    assert imagenet(sets[1], sets[0], sets[2], train=True).parts.train == sets[0], "told by the names of its images"


@pytest.mark.integration
@pytest.mark.slow
def test_packed_from_three_layouts(dirty: dict[str, list[Path]], tmp_path: Path) -> None:
    """Pixels against labels, in the shards themselves, with all the dirt; the same bytes from each."""
    cut_off = f"{KINDS[BROKEN].wnid}/{KINDS[BROKEN].wnid}_{10 * DIRTY + 7}.JPEG"
    for layout in ("official", "kaggle", "unpacked"):
        words = dirty[layout] if layout != "unpacked" else [*dirty[layout][:2], "--devkit", dirty[layout][2]]
        said = run(*words, tmp_path / layout)
        assert "n01440764 tench, Tinca tinca" in said
        assert "Warning" not in said, "of the damaged EXIF block"
        for split, count, bad in (("train", 12 * len(KINDS) - 1, [cut_off]), ("val", 5 * len(KINDS), [])):
            directory = tmp_path / layout / split
            assert json.loads((directory / "manifest.json").read_text())["classes"] == NAMES
            found = packed(directory)
            assert len(found) == count
            assert all(label == colour for _, label, colour in found)
            assert [*rejected(directory)] == bad
        assert shards(tmp_path / layout) == shards(tmp_path / "official")
        assert run(*words, tmp_path / layout).count("already packed") == 2


@pytest.mark.integration
@pytest.mark.slow
def test_killed_and_repeated_with_other_workers(dirty: dict[str, list[Path]], tmp_path: Path) -> None:
    small = ("--shorter-side", 32, "--shard-mb", 0.03)
    whole = finish(spawn(command(*dirty["official"], tmp_path / "whole", *small, "--workers", 1)), 120)
    assert whole.returncode == 0, whole.stderr
    assert len(shards(tmp_path / "whole")) > 5
    for moment in ("train/.pack/*.json", "val/.pack/*.json"):
        begun = spawn(command(*dirty["official"], tmp_path / "killed", *small, "--workers", 2))
        end = time.monotonic() + 60
        while not [*(tmp_path / "killed").glob(moment)] and alive(begun.pid):
            assert time.monotonic() < end
            time.sleep(0.002)
        os.kill(begun.pid, signal.SIGKILL)
        begun.process.wait()
        time.sleep(1)  # its workers leave
    last = finish(spawn(command(*dirty["official"], tmp_path / "killed", *small, "--workers", 2)), 120)
    assert last.returncode == 0, last.stderr
    assert shards(tmp_path / "killed") == shards(tmp_path / "whole")
    for name in ("train/index.npy", "train/manifest.json", "train/rejected.jsonl", "val/manifest.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_worker_gets_little_and_lists_nothing(clean: dict[str, list[Path]]) -> None:
    source = imagenet(*clean["official"], train=True)
    items = source.items
    first, others = sent(source)
    assert max(len(first.pickled), len(others.pickled), len(pickle.dumps(items[0]))) < 2000
    with patch("pipelines.published.held.tar_members", side_effect=AssertionError("a tar is read again")):
        arrived = received(first)
        assert [arrived.load(item.reference) for item in items] == [source.load(item.reference) for item in items]


@pytest.mark.parametrize("layout", ["official", "kaggle", "unpacked", "sorted"])
def test_a_subset_of_the_classes(tmp_path: Path, layout: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Both sets count the classes that are trained, and the other images are named, not labelled."""
    kept = [KINDS[1], KINDS[3], KINDS[5]]
    train = [one for one in train_pictures(2, dirt=False) if one.kind in kept]
    paths = layouts(tmp_path, train, val_pictures(2))[layout]
    for split in (True, False):
        source = imagenet(*paths, train=split)
        assert source.classes == [NAMES[1], NAMES[3], NAMES[5]]
        assert len(source.items) == 6
        for item in source.items:
            assert KINDS[colour_of(source.load(item.reference))] == kept[item.label]
    left = {one.name for one in val_pictures(2) if one.kind not in kept}
    assert {line["file"] for line in source.rejected if line["reason"].startswith("left out: no training")} == left
    first, second = capsys.readouterr().err.splitlines()[-2:]
    assert "6 images of 3 classes" in first
    assert "not the 3 other classes of" in first
    assert "6 more, of classes that are not trained, are left out" in second


def test_spelled_in_any_way_it_is_this_one(clean: dict[str, list[Path]]) -> None:
    for name in ("imagenet", "ImageNet", "image-net", "IMAGE_NET"):
        found = kind("pack", name)
        assert (found.name, found.shorter_side, found.has_splits) == ("imagenet", 256, True)
        assert kind_first([Path(name), Path("x.tar"), Path("dst")]) == (name, [Path("x.tar"), Path("dst")])
    assert "imagenet" in SOURCES


@pytest.mark.integration
def test_a_run_packs_it(clean: dict[str, list[Path]], tmp_path: Path) -> None:
    """By data.source and data.raw, a folder of the three files."""
    words = ["--data.source=imagenet", f"--data.raw={clean['official'][0].parent}"]
    config, _ = parse([f"--data.train={tmp_path}/a/train", f"--data.val={tmp_path}/a/val", *words])
    pack_source(config)
    for split, count in (("train", 18), ("val", 12)):
        found = packed(tmp_path / "a" / split)
        assert len(found) == count
        assert all(label == colour for _, label, colour in found)


def test_a_set_is_not_made_among_images(clean: dict[str, list[Path]], tmp_path: Path) -> None:
    train, val, kit = clean["unpacked"]
    kaggle = clean["kaggle"][0] / "ILSVRC" / "Data" / "CLS-LOC"
    for paths, target in (
        ([train, val, kit], train / "set"),
        ([train, val, kit], val),
        (clean["kaggle"], kaggle / "train" / "sets"),
    ):
        assert " lies in " in said_by_main("imagenet", *paths, target)
        assert not (target / "train" / ".pack").exists()


def said_by_main(*words: object) -> str:
    """The sentence with which `pack` refuses."""
    with patch.object(sys, "argv", ["pipelines", "pack", *map(str, words)]), patch("pipelines.cli.speech.say") as say:
        assert main() == 2
    return str(say.call_args[0][0])


@pytest.mark.integration
def test_images_that_changed_since(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, val = train_pictures(2, dirt=False), val_pictures(1)
    for layout in ("official", "unpacked"):
        paths = layouts(tmp_path / "raw" / layout, train, val)[layout]
        with patch.object(sys, "argv", ["pipelines", "pack", "imagenet", *map(str, paths), str(tmp_path / layout)]):
            assert main() == 0
        more = [*train, made.Picture("n01440764_9999.JPEG", KINDS[0], made.picture(KINDS[0].colour, 7, (300, 300)))]
        paths = layouts(tmp_path / "raw" / layout, more, val)[layout]
        told = said_by_main("imagenet", *paths, tmp_path / layout)
        changed = f"of another size: {made.TRAIN_TAR}" if layout == "official" else "new: n01440764/n01440764_9999.JPEG"
        assert f"packed before the source changed (1 {changed})" in told


def truth(*numbers: object) -> bytes:
    return "".join(f"{number}\n" for number in numbers).encode()


GOOD = [(kind.number, kind.wnid, kind.words, 0) for kind in KINDS]
BAD_KITS: list[tuple[str, dict[str, bytes], str]] = [
    ("no meta.mat", {"meta": b""}, r"the devkit .*kit.tar.gz has no data/meta.mat: give ILSVRC2012_devkit_t12.tar.gz"),
    ("no truth", {"truth": b""}, r"has no data/ILSVRC2012_validation_ground_truth.txt: give"),
    (
        "text",
        {"meta": b"words " * 99},
        r"data/meta.mat in the devkit .* cannot be read \(it is not a Matlab file of level 5",
    ),
    ("cut off", {"meta": made.meta_mat()[:-200]}, r"data/meta.mat in the devkit .* cannot be read \("),
    (
        "a large id",
        {"truth": truth(1, 2, 77)},
        r"line 3 of .*ground_truth.txt in .* is '77', which is the ILSVRC2012_ID",
    ),
    ("an inner node", {"truth": truth(7)}, r"line 1 of .* is '7', which is the ILSVRC2012_ID of no class"),
    ("a word", {"truth": truth(1, "\x1b[2J")}, r"line 2 of .* is '\\x1b\[2J', which"),
    (
        "few lines",
        {"truth": truth(1, 2)},
        r"has labels of 2 images, but not of ILSVRC2012_val_00000003.JPEG and 9 others",
    ),
    ("one id twice", {"meta": made.meta_mat([*GOOD, (1, "n09999999", "x", 0)])}, r"\(two classes are ILSVRC2012_ID 1"),
    ("one class twice", {"meta": made.meta_mat([*GOOD, (9, "n01440764", "x", 0)])}, r"two classes are WNID n01440764"),
    ("odd id", {"meta": made.meta_mat([*GOOD, (9, "tench", "x", 0)])}, r"\(WNID is 'tench', which is not of the form"),
    (
        "control",
        {"meta": made.meta_mat([(9, "n00000001", "a\nb", 0)])},
        r"words should be a line of text, and is 'a\\nb'",
    ),
]


@pytest.mark.parametrize(("contents", "sentence"), [case[1:] for case in BAD_KITS], ids=[case[0] for case in BAD_KITS])
def test_a_devkit_that_is_none(
    clean: dict[str, list[Path]], tmp_path: Path, contents: dict[str, bytes], sentence: str
) -> None:
    kit = made.devkit(tmp_path / "kit.tar.gz", **contents)
    assert re.search(sentence, refused(*clean["official"][:2], kit, train=False))


def test_a_matlab_file_however_it_is_stored() -> None:
    """As scipy reads it: compressed or not."""
    expected = [{"ILSVRC2012_ID": float(row[0]), "WNID": row[1], "words": row[2]} for row in sorted(GOOD)]
    data = made.meta_mat()
    plain = io.BytesIO()
    scipy.io.savemat(plain, {"other": [1, 2], "synsets": scipy.io.loadmat(io.BytesIO(data))["synsets"]})
    for stored in (data, plain.getvalue()):
        assert structures(stored, "synsets", expected[0])[: len(GOOD)] == expected


def test_a_damaged_matlab_file() -> None:
    """scipy's reader ends the process on some of these."""
    stored, rng = io.BytesIO(), np.random.default_rng(3)
    scipy.io.savemat(stored, {"synsets": scipy.io.loadmat(io.BytesIO(made.meta_mat()))["synsets"]})
    whole, words = stored.getvalue(), [b"\xff\xff\xff\x7f", b"\xff\xff\xff\xff", bytes(4), b"\x0e\0\0\0"]
    ends = Counter[str]()
    for _ in range(1000):
        data = bytearray(whole)
        for at in rng.integers(32, len(data) // 4, rng.integers(1, 4)).tolist():
            data[4 * at : 4 * at + 4] = words[rng.integers(4)]
        try:
            ends[type(structures(bytes(data), "synsets", ["WNID", "num_children"])).__name__] += 1
        except ValueError:
            ends["sentence"] += 1
    assert ends["list"] > 50
    assert ends["sentence"] > 50


def bombs() -> list[tuple[str, bytes]]:
    """Matlab files of a stranger that claim, or hold, gigabytes."""
    head = made.meta_mat()[:128]
    claim = struct.pack("<IIIIiiII8s", 14, 40, 5, 8, 1 << 30, 1 << 30, 1, 7, b"synsets\0")
    many = zlib.compress(bytes(100 << 20), 9)
    return [
        ("it is not an array of structures", head + struct.pack("<IIIIII", 14, 56, 6, 8, 2, 0) + claim[8:] + bytes(8)),
        ("it breaks off", head + claim),
        ("more than 16777216 bytes", head + struct.pack("<II", 15, len(many)) + many),
    ]


@pytest.mark.parametrize(("said", "meta"), bombs(), ids=["claims", "ends", "holds"])
def test_a_bomb_for_a_devkit(clean: dict[str, list[Path]], tmp_path: Path, said: str, meta: bytes) -> None:
    kit = made.devkit(tmp_path / "kit.tar.gz", meta)
    tracemalloc.start()
    assert said in refused(*clean["official"][:2], kit)
    assert tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()


def test_a_devkit_that_unpacks_to_gigabytes(clean: dict[str, list[Path]], tmp_path: Path) -> None:
    (tmp_path / "kit.tar.gz").write_bytes(gzip.compress(bytes(80 << 20), 1))
    assert "unpacked, it has more than 67108864 bytes" in refused(*clean["official"][:2], tmp_path / "kit.tar.gz")


ROWS = [
    (
        "ILSVRC2012_val_00000001,tench",
        r"line 2 of .* is 'ILSVRC2012_val_00000001,tench': it should be an image and the Word",
    ),
    ("ILSVRC2012_val_00000001", "it should be an image and the WordNet id"),
    (
        "a,n01440764\na,n01443537",
        "line 3 of .* gives a the class n01443537, an earlier one n01440764: an image has",
    ),
    ("", "names no image: give LOC_val_solution.csv"),
    (
        "ILSVRC2012_val_00000001,n01440764 1 2 3 4",
        "has labels of 1 images, but not of ILSVRC2012_val_00000002.JPEG and",
    ),
]


@pytest.mark.parametrize(("rows", "sentence"), ROWS)
def test_a_table_with_strange_rows(clean: dict[str, list[Path]], tmp_path: Path, rows: str, sentence: str) -> None:
    (tmp_path / "labels.csv").write_text(f"ImageId,PredictionString\n{rows}\n")
    assert re.search(sentence, refused(*clean["unpacked"][:2], tmp_path / "labels.csv", train=False))


def test_files_that_are_not_those(clean: dict[str, list[Path]], tmp_path: Path) -> None:
    train, val, kit = clean["official"]
    short = tmp_path / "short.tar"
    short.write_bytes(train.read_bytes()[:-20_000])
    assert re.search(
        r"short.tar is not a whole, uncompressed tar \(.*\): fetch short.tar anew", refused(short, val, kit)
    )
    inner = bytearray(train.read_bytes())
    second = inner.index(b"n01440764_", inner.index(b"n01440764_") + 1)  # the name in a header
    inner[second + 148 : second + 156] = b"checksum"
    (tmp_path / "damaged.tar").write_bytes(inner)
    assert "n01440764.tar in " in refused(tmp_path / "damaged.tar", val, kit)
    assert f"{val} and {val} both hold validation images: pack imagenet takes" in refused(val, val, kit)
    assert "there are no training images in" in refused(val, kit)
    assert "there are no validation images in" in refused(train, kit)
    assert f"{val} has no labels: add --devkit" in refused(train, val)
    assert f"{tmp_path / 'none.tar'} does not exist" in refused(tmp_path / "none.tar", val, kit)
    test = made.tar_of(tmp_path / "test.tar", [("test/ILSVRC2012_test_00000001.JPEG", b"x")])
    assert "holds the test images, which have no labels" in refused(train, test, kit)
    packed_by_tar = made.tar_of(tmp_path / "train.tar", [("train/n01440764/n01440764_7.JPEG", b"x")])
    assert "holds training images, such as n01440764_7.JPEG, and no tar for each" in refused(packed_by_tar, val, kit)
    (tmp_path / "val.tar.gz").write_bytes(gzip.compress(val.read_bytes()))
    os.truncate(tmp_path / "val.tar.gz", 65 << 20)
    assert "is compressed, and too large for a devkit" in refused(train, tmp_path / "val.tar.gz", kit)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "meta.mat").write_bytes(b"x")
    assert "data holds neither folders named by WordNet ids" in refused(train, val, tmp_path / "data")
    (tmp_path / "kaggle.zip").write_bytes(b"PK\3\4" + bytes(600))
    assert "is a zip: unpack it" in refused(tmp_path / "kaggle.zip")
    (tmp_path / "empty").mkdir()
    assert "holds neither folders named by WordNet ids" in refused(tmp_path / "empty", val, kit)
    (tmp_path / "cut.tar.gz").write_bytes(kit.read_bytes()[:-99])
    assert "cut.tar.gz is not a whole devkit" in refused(train, val, tmp_path / "cut.tar.gz")
    (tmp_path / "noise").write_bytes(bytes(1000))
    assert "noise" in refused(train, tmp_path / "noise", kit)


def test_a_validation_folder_sorted_wrongly(tmp_path: Path) -> None:
    paths = layouts(tmp_path, train_pictures(1, dirt=False), val_pictures(1))["sorted"]
    image = next((paths[1] / KINDS[2].wnid).iterdir())
    image.rename(paths[1] / KINDS[4].wnid / image.name)
    assert re.search(
        f"{image.name} in the folder n03063599, but its label in .* is n02012849", refused(*paths, train=False)
    )
    assert imagenet(*paths[:2], train=False).classes == [one.wnid for one in KINDS], (
        "without words there is none to ask"
    )


def test_words_that_are_not_there(clean: dict[str, list[Path]], tmp_path: Path) -> None:
    kit = made.devkit(
        tmp_path / "kit.tar.gz", made.meta_mat([row for row in GOOD if row[0] != 4]), truth(1, 2, 3, 5, 6)
    )
    source = imagenet(*clean["official"][:2], kit, train=True)
    assert source.classes == ["n01440764", *NAMES[1:]]


def test_what_is_no_image_in_a_tar_is_named(clean: dict[str, list[Path]], tmp_path: Path) -> None:
    image = train_pictures(1, dirt=False)[0]
    inner = made.tar_bytes([("._a.JPEG", b"x"), (image.name, image.data), ("Thumbs.db", b"x")])
    train = made.tar_of(tmp_path / "train.tar", [("n01440764.tar", inner), ("dogs.tar", inner), ("readme.txt", b"x")])
    source = imagenet(train, *clean["official"][1:], train=True)
    assert [item.name for item in source.items] == [f"n01440764/{image.name}"]
    named = {line["file"] for line in source.rejected}
    assert named == {"n01440764.tar/._a.JPEG", "n01440764.tar/Thumbs.db", "dogs.tar", "readme.txt"}


def test_an_inner_tar_ends_where_the_outer_one_says(clean: dict[str, list[Path]], tmp_path: Path) -> None:
    """One without its final zeros, whose next bytes are a header again: the outer tar's."""
    image = train_pictures(1, dirt=False)[0]
    whole = made.tar_bytes([(image.name, image.data)])
    bare = whole[: 512 + (len(image.data) + 511) // 512 * 512]
    train = made.tar_of(tmp_path / "train.tar", [("n01440764.tar", bare), ("n01443537.tar", whole)])
    assert "n01440764.tar in " in refused(train, *clean["official"][1:])


@pytest.mark.parametrize("part", range(2))
@pytest.mark.parametrize("lacking", ["some", "the rest"])
def test_a_download_whose_pieces_come_in_any_order(
    clean: dict[str, list[Path]], tmp_path: Path, part: int, lacking: str
) -> None:
    """Its size is the whole one, with zeros for what is not there yet: no smaller set is made of the others."""
    paths = list(clean["official"])
    data = bytearray(paths[part].read_bytes())
    with tarfile.open(paths[part]) as tar:
        first, second, third = (member.offset for member in tar.getmembers()[:3])
    if part == 0:  # in a tar in it
        with tarfile.open(fileobj=io.BytesIO(data[first + 512 : second])) as tar:
            second, third = (first + 512 + member.offset for member in tar.getmembers()[1:3])
    end = third if lacking == "some" else len(data)
    data[second:end] = bytes(end - second)
    paths[part] = tmp_path / "half.tar"
    paths[part].write_bytes(data)
    os.truncate(paths[part], len(data) + (2 << 20) * (lacking == "the rest"))  # the real ones have gigabytes
    assert re.search(
        r"half.tar is not a whole, .* \(zeros at byte \d+, with \d+ bytes behind\): fetch half.tar anew",
        refused(*paths, train=not part),
    )


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("imagenet", "x"), "pack imagenet takes TRAIN.tar VAL.tar DEVKIT.tar.gz, or folders"),
        (("ImageNet",), "pack imagenet takes TRAIN.tar VAL.tar"),
        (("imagenet", "TRAIN", "VAL", "KIT"), "name the set to make last, and not KIT, which is a file"),
        (("imagefolder", "x", "y", "--devkit", "KIT"), "--devkit is for imagenet, and imagefolder has none: leave it"),
    ],
)
def test_words_that_are_wrong(clean: dict[str, list[Path]], words: tuple[str, ...], sentence: str) -> None:
    places = dict(zip(("TRAIN", "VAL", "KIT"), map(str, clean["official"]), strict=True))
    assert sentence.replace("not KIT", f"not {places['KIT']}") in said_by_main(
        *(places.get(word, word) for word in words)
    )


def test_validation_images_that_are_missing_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = layouts(tmp_path, train_pictures(1, dirt=False), val_pictures(2))["unpacked"]
    (paths[1] / "ILSVRC2012_val_00000003.JPEG").unlink()
    assert len(imagenet(*paths, train=False).items) == 11
    assert "11 images, labels by ILSVRC2012_devkit_t12.tar.gz, which has 12" in capsys.readouterr().err


def test_pictures_show_the_words_alone() -> None:
    assert fit("n01440764 tench, Tinca tinca", 1000, 10) == "tench, Tinca tinca"
    assert fit("n01440764", 1000, 10) == "n01440764"
