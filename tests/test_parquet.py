"""Parquet files in Hugging Face's layout: each image with its label, by row groups, whoever wrote them."""

from __future__ import annotations

import io
import itertools
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet as pq

from dist_train.cli import parse
from dist_train.data import pack_source
from pipelines.errors import SourceError
from pipelines.limits import Limits, limited
from pipelines.manifest import ShardError
from pipelines.order import Order
from pipelines.pack import Options, pack
from pipelines.published import columns
from pipelines.published.parquet import Parquet
from pipelines.room import packing_order
from pipelines.shards import ShardSet
from pipelines.sources import Item, Source
from tests.conftest import TINTS, photograph
from tests.helpers.peak import peak
from tests.test_pack import files, rejections, samples, session, until
from tests.test_sources import Own, Tell, own
from tests.test_sources import pack as command

pytestmark = pytest.mark.integration

assert own
assert command
NAMES = ["tench, Tinca tinca", "goldfish, Carassius auratus", "great white shark"]  # as ImageNet's, with commas
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
ROOT = Path(__file__).parent.parent


def schema(image: Any = IMAGE, **features: Any) -> Any:
    """As `datasets` writes it: `ArrowWriter._build_metadata` puts the features of the columns into the metadata."""
    features = features or {"label": {"names": NAMES, "_type": "ClassLabel"}}
    described = {"info": {"features": {"image": {"_type": "Image"}, **features}}}
    kinds = [("image", image), *((name, pa.int64()) for name in features)]
    return pa.schema(kinds, metadata={"huggingface": json.dumps(described)})


def jpeg(rng: np.random.Generator, label: int, side: int = 40) -> bytes:
    out = io.BytesIO()
    photograph(rng, side + 8, side, TINTS[label % 3]).save(out, "JPEG", quality=90)
    return out.getvalue()


def rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count).tolist()
    return [{"image": {"bytes": jpeg(rng, k), "path": f"n{k}_{i}.JPEG"}, "label": k} for i, k in enumerate(labels)]


def write(path: Path, lines: list[dict[str, Any]], like: Any = None, per_group: int = 10) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(lines, like or schema()), path, row_group_size=per_group)
    return path


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 and 40 images, in 3 files and 2, ten to a row group."""
    root = tmp_path_factory.mktemp("hf")
    for split, count, each in (("train", 3, 40), ("validation", 2, 20)):
        for i in range(count):
            write(root / "data" / f"{split}-{i:05}-of-{count:05}.parquet", rows(each, 10 * count + i))
    (root / "README.md").write_text("---\n")
    return root


def source(root: Path, *, train: bool = True) -> Parquet:
    return Parquet(root, train=train)


@pytest.mark.integration
def test_each_image_keeps_its_bytes_and_its_label(published: Path, command: Tell, tmp_path: Path) -> None:
    """pyarrow reads the same files whole."""
    said = command("parquet", published, tmp_path / "sets", "--shorter-side", 0, "--workers", 2, "--shard-mb", 0.05)
    for split, name, count in (("train", "train", 120), ("val", "validation", 40)):
        read = samples(tmp_path / "sets" / split)
        files = sorted(published.glob(f"data/{name}-*"))
        expected = [row for file in files for row in pq.read_table(file).to_pylist()]
        assert sorted((s["jpg"], int(s["cls"])) for s in read) == sorted(
            (row["image"]["bytes"], row["label"]) for row in expected
        )
        for sample in read:
            number, file, row = re.fullmatch(r"(\d{9})-\w+-(\d{5})-of-\d{5}-parquet-(\d+)", sample["__key__"]).groups()  # type: ignore[union-attr]
            theirs = pq.read_table(files[int(file)])["image"][int(row)].as_py()
            assert sample["jpg"] == theirs["bytes"] == expected[int(number)]["image"]["bytes"]
        assert len(read) == count
        assert ShardSet(tmp_path / "sets" / split).classes == NAMES
        assert f"sets/{split}: {count} images of 3 classes in " in said
    again = command("parquet", published, tmp_path / "sets", "--shorter-side", 0, "--shard-mb", 0.05)
    assert again.count("already packed") == 2


@pytest.mark.integration
def test_a_run_packs_its_folder(published: Path, tmp_path: Path) -> None:
    words = [f"--data.train={tmp_path}/x/a", f"--data.val={tmp_path}/x/b", "--data.source=parquet"]
    pack_source(parse([*words, f"--data.raw={published}"])[0])
    sets = [ShardSet(tmp_path / "x" / name) for name in "ab"]
    assert [(len(one), one.sides) for one in sets] == [(120, (256, 256)), (40, (256, 256))]


# Columns. ----------------------------------------------------------------------------------------------


def pair(root: Path, lines: list[dict[str, Any]], like: Any = None) -> Path:
    """A training and a validation file of the same rows."""
    for split in ("train", "validation"):
        write(root / f"{split}-00000-of-00001.parquet", lines, like)
    return root


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.dictionary(pa.int32(), pa.binary()), "struct"])
def test_an_image_is_bytes_in_any_of_these_ways(kind: Any, tmp_path: Path) -> None:
    plain = [{"image": row["image"]["bytes"], "label": row["label"]} for row in rows(12)]
    lines = [{**row, "image": {"bytes": row["image"]}} for row in plain] if kind == "struct" else plain
    image = pa.struct([("bytes", pa.large_binary())]) if kind == "struct" else kind
    made = source(pair(tmp_path, lines, schema(image)))
    assert [made.load(item.reference) for item in made.items] == [row["image"] for row in plain]
    assert [item.label for item in made.items] == [row["label"] for row in plain]


def renamed(lines: list[dict[str, Any]], **names: str) -> list[dict[str, Any]]:
    return [{names.get(key, key): value for key, value in row.items()} for row in lines]


def test_columns_of_other_names(tmp_path: Path, own: Own) -> None:
    """As those of cifar10 (img), beans (labels) and cifar100 (img, fine_label, coarse_label)."""
    feature = {"names": NAMES, "_type": "ClassLabel"}
    beans = pair(tmp_path / "beans", renamed(rows(9), label="labels"), schema(labels=feature))
    assert [item.label for item in source(beans).items] == [row["label"] for row in rows(9)]

    kinds = pa.schema([("img", IMAGE), ("fine_label", pa.int64()), ("coarse_label", pa.int64())])
    features = {"img": {"_type": "Image"}, "fine_label": feature, "coarse_label": {**feature, "names": ["fish"]}}
    kinds = kinds.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    lines = [{**row, "coarse_label": 0} for row in renamed(rows(9), image="img", label="fine_label")]
    cifar = pair(tmp_path / "cifar100", lines, kinds)
    with pytest.raises(SourceError, match=r"has no column label, but fine_label, coarse_label: name one by a class of"):
        source(cifar)
    module = own("from pipelines.published.parquet import Parquet\nclass Fine(Parquet):\n    label = 'fine_label'\n")
    fine = __import__(module).Fine(cifar, train=True)
    assert fine.classes == NAMES
    assert [(fine.load(item.reference), item.label) for item in fine.items] == [
        (row["image"]["bytes"], row["label"]) for row in rows(9)
    ]


def test_classes_without_names_are_numbers(tmp_path: Path) -> None:
    """The same in both sets, though one lacks the last class."""
    plain = pa.schema([("image", IMAGE), ("label", pa.int32())])
    write(tmp_path / "train-00000-of-00001.parquet", [{**row, "label": i % 5} for i, row in enumerate(rows(10))], plain)
    write(tmp_path / "test-00000-of-00001.parquet", [{**row, "label": i % 4} for i, row in enumerate(rows(8))], plain)
    assert [source(tmp_path, train=train).classes for train in (True, False)] == [["0", "1", "2", "3", "4"]] * 2


@pytest.mark.integration
def test_what_has_no_label_or_no_bytes_is_named(tmp_path: Path, command: Tell) -> None:
    lines = rows(25)
    lines[3]["label"], lines[4]["label"] = -1, None
    lines[12]["image"], lines[13]["image"]["bytes"] = None, None
    lines[20]["image"]["bytes"] = b"garbage"
    said = command("parquet", pair(tmp_path / "hf", lines), tmp_path / "sets", "--shorter-side", 0)
    name = "validation-00000-of-00001.parquet"
    reasons = rejections(tmp_path / "sets" / "val")
    assert set(reasons) == {f"{name}:{i}" for i in (3, 4, 12, 13, 20)}
    assert "has no label" in reasons[f"{name}:3"] == reasons[f"{name}:4"]
    assert "holds no image, at most the path of one" in reasons[f"{name}:12"]
    assert reasons[f"{name}:12"] == reasons[f"{name}:13"]
    good = [(row["image"]["bytes"], row["label"]) for i, row in enumerate(lines) if i not in (3, 4, 12, 13, 20)]
    assert sorted((s["jpg"], int(s["cls"])) for s in samples(tmp_path / "sets" / "val")) == sorted(good)
    assert f"val: 20 images of 3 classes in 1 shards, 0 MB; 5 rejected, see {tmp_path}/sets/val/rejected.jsonl" in said


# Which files. -------------------------------------------------------------------------------------------


def named(root: Path, *names: str) -> Path:
    for i, name in enumerate(names):
        write(root / name, rows(4, i))
    return root


ONE = ("train-00000-of-00001.parquet", "validation-00000-of-00001.parquet")


@pytest.mark.parametrize(
    ("names", "train", "val"),
    [
        (ONE, 1, 1),
        ((*ONE, "test-00000-of-00001.parquet"), 1, 1),
        (("a/train-00000-of-00001.parquet", "a/test-00000-of-00001.parquet"), 1, 1),
        (("data/train-00000-of-00002-0a1b2c3d4e5f6071.parquet", "data/train-00001-of-00002-1a1b2c3d4e5f6071.parquet",
          "data/validation-00000-of-00001-2a1b2c3d4e5f6071.parquet"), 2, 1),
        (("default/train/0000.parquet", "default/train/0001.parquet", "default/validation/0000.parquet"), 2, 1),
        ((*ONE, ".cache/train-00000-of-00001.parquet"), 1, 1),
    ],
)  # fmt: skip
def test_the_files_of_a_folder(names: tuple[str, ...], train: int, val: int, tmp_path: Path) -> None:
    root = named(tmp_path, *names)
    assert len(source(root).items) == 4 * train
    assert len(source(root, train=False).items) == 4 * val
    assert not {str(path) for path in source(root).paths} & {str(path) for path in source(root, train=False).paths}


def test_links_as_the_hub_caches_files(tmp_path: Path) -> None:
    real = named(tmp_path / "real", *ONE)
    (tmp_path / "hub" / "snapshots").mkdir(parents=True)
    for name in ONE:
        (tmp_path / "hub" / "snapshots" / name).symlink_to(real / name)
    assert len(source(tmp_path / "hub").items) == 4


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ((), r"there is no train-00000-of-\.\.\.parquet in \S+ \(it has no \*\.parquet\): parquet takes FOL"),
        (("train-00000-of-00001.parquet",), r"there is no validation-00000-of-\.\.\.parquet in .* \(it has train-0"),
        ((*ONE, "b/train-00000-of-00001.parquet"), "has train files in .* and in .*: give one of these folders"),
        (("train-00000-of-00003.parquet", "train-00002-of-00003.parquet", ONE[1]),
         "has 2 of 3 files: fetch the others too, such as train-00001-of-00003"),
        (("train-00000-of-00001.parquet", "train-00000-of-00002.parquet", "train-00001-of-00002.parquet", ONE[1]),
         "holds files of more than one version of a set, such as train-00000-of-00001.parquet and"),
        (("train-00000-of-00001-0a1b2c3d4e5f6071.parquet", *ONE), "holds files of more than one version of a set"),
    ],
)  # fmt: skip
def test_a_folder_that_is_not_whole(names: tuple[str, ...], said: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=said):
        source(named(tmp_path, *names))


def test_patterns(published: Path, command: Tell, tmp_path: Path) -> None:
    train = Path(f"{published}/data/train-{{00000..00001}}-of-00003.parquet")
    val = published / "data" / "val*"
    assert len(Parquet(train, val, train=True).items) == 80
    assert len(Parquet(train, val, train=False).items) == 40
    for first, second, told in (
        (f"{published}/data/train-{{00000..00003}}-of-00003.parquet", val, "there is no file .*train-00003-of-00003"),
        (f"{published}/data/train-{{00000.parquet", val, "is not a pattern"),
        (train, published / "nothing*", "there is no file .*nothing"),
    ):
        assert re.search(told, command("parquet", first, second, tmp_path / "set", code=2))
    each = sorted((published / "data").glob("train-*"))  # as a shell passes a pattern without quotes
    assert "with the patterns in quotes" in command("parquet", *each, tmp_path / "set", code=2)
    assert "is not a folder: parquet takes FOLDER DST" in command("parquet", each[0], tmp_path / "set", code=2)
    assert not (tmp_path / "set").exists()


def test_classes_of_two_data_sets(tmp_path: Path) -> None:
    other = schema(label={"names": NAMES[::-1], "_type": "ClassLabel"})
    write(tmp_path / ONE[0], rows(4))
    write(tmp_path / ONE[1], rows(4), other)
    for train in (True, False):
        with pytest.raises(SourceError, match=f"has other classes than .*{ONE[1 - train]}: labels would not mean"):
            source(tmp_path, train=train)
    write(tmp_path / ONE[1], [{**row, "label": 3} for row in rows(4)])
    with pytest.raises(SourceError, match="has the label 3, and names only 3 classes, from 0 on"):
        _ = source(tmp_path, train=False).items


def test_a_split_whose_labels_are_hidden(tmp_path: Path) -> None:
    write(tmp_path / ONE[0], rows(4))
    write(tmp_path / "test-00000-of-00001.parquet", [{**row, "label": -1} for row in rows(4)])
    with pytest.raises(SourceError, match=r"each image of .* has no label .*: give a split with labels"):
        _ = source(tmp_path, train=False).items


def test_without_pyarrow(published: Path, command: Tell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert command("parquet", published, tmp_path / "set", code=2).endswith(": pip install pyarrow")


@pytest.mark.integration
def test_a_file_that_has_changed(tmp_path: Path, command: Tell) -> None:
    root, words = pair(tmp_path / "hf", rows(20)), (tmp_path / "sets", "--shorter-side", 0)
    command("parquet", root, *words)
    os.utime(root / ONE[0], ns=(2**62, 2**62))
    assert "already packed, 1 files of the source have a later date" in command("parquet", root, *words)
    write(root / ONE[0], rows(20, 1))
    assert f"1 of another size: {ONE[0]}" in command("parquet", root, *words, code=2)


# Strangers. ---------------------------------------------------------------------------------------------


def footer_of(path: Path, size: int) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-8] + size.to_bytes(4, "little") + b"PAR1")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-20]), "cannot be read as parquet"),
        (lambda path: path.write_bytes(b"PAR1"), "cannot be read as parquet"),
        (lambda path: path.write_bytes(b"garbage" * 100), "cannot be read as parquet"),
        (lambda path: footer_of(path, 10**9), "its footer has 1000000000 bytes, and 67108864 are allowed"),
        (lambda path: (path.unlink(), os.mkfifo(path)), "is no file but a pipe"),
        (lambda path: write(path, rows(2), schema(label={"names": 7, "_type": "ClassLabel"})), "is not a list of name"),
        (lambda path: write(path, rows(2), schema(label={"names": [[]], "_type": "ClassLabel"})), "is not a list of"),
        (lambda path: write(path, rows(2), schema().with_metadata({"huggingface": "{" * 10**5})), "cannot be read as"),
        (lambda path: pq.write_table(pa.table({"image": ["a"], "label": [1]}), path), "has string in its column image"),
        (lambda path: pq.write_table(pa.table({"image": [b"a"], "label": ["a"]}), path), "labels are numbers: m"),
        (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "git lfs pull"),
        (lambda path: pq.write_table(pa.table({"x": [1], "y\x1b[2J": [1]}), path), r"has no column image, but x, y"),
    ],
)  # fmt: skip
def test_damage_is_one_sentence_with_the_file(damage: Any, said: str, tmp_path: Path) -> None:
    root = pair(tmp_path, rows(20))
    damage(root / ONE[0])
    damage(root / ONE[1])
    with pytest.raises(SourceError, match=said) as caught:
        _ = source(root).items
    assert ONE[0] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_page_that_is_damaged_ends_the_pack(tmp_path: Path, command: Tell) -> None:
    """Nobody would miss the rest of the row group."""
    path = pair(tmp_path / "hf", rows(20)) / ONE[0]
    data = bytearray(path.read_bytes())
    data[4:40] = b"\xff" * 36
    path.write_bytes(data)
    said = command("parquet", tmp_path / "hf", tmp_path / "set", code=2)
    assert re.search(rf"{ONE[0]} cannot be read as parquet \(.*\): fetch it anew$", said)


class Evil(pa.ExtensionType):  # type: ignore[misc]
    """A kind of column whose description is a pickle, as pyarrow 13 and earlier loaded it (CVE-2023-47248)."""

    def __init__(self, payload: bytes) -> None:
        self.payload = payload
        super().__init__(pa.binary(), "arrow.py_extension_type")

    def __arrow_ext_serialize__(self) -> bytes:
        return self.payload


class Runs:
    def __reduce__(self) -> Any:
        return os.mkdir, ("executed",)


def test_no_code_of_a_file_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    images = pa.ExtensionArray.from_storage(Evil(pickle.dumps(Runs())), pa.array([jpeg(np.random.default_rng(0), 0)]))
    for name in ONE:
        pq.write_table(pa.table({"image": images, "label": [0]}), tmp_path / name)
    made = source(tmp_path)
    assert [made.load(item.reference) for item in made.items] == images.storage.to_pylist()
    assert not (tmp_path / "executed").exists()


def test_rows_and_bytes_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many = pa.table({"image": pa.nulls(10**6, pa.binary()), "label": pa.nulls(10**6, pa.int64())})
    for name in ONE:
        pq.write_table(many, tmp_path / name)
    with pytest.raises(SourceError, match=r"it claims 1000000 rows in \d+ bytes"):
        source(tmp_path)
    zeros = pa.Table.from_pylist([{"image": {"bytes": bytes(10**6), "path": ""}, "label": 0}] * 4, schema())
    pq.write_table(zeros, tmp_path / ONE[0], compression="zstd", use_dictionary=False)
    write(tmp_path / ONE[1], rows(2))
    with limited(Limits(bytes=10**6)), pytest.raises(SourceError, match=r"row group 0 claims \d+ bytes of images in"):
        source(tmp_path).load(0)
    kept = [{"image": {"bytes": np.random.default_rng(i).bytes(10**6)}, "label": 0} for i in range(4)]
    made = source(pair(tmp_path, kept))
    with limited(Limits(bytes=10**6 - 1)), pytest.raises(ValueError, match="has 1000000 bytes, and 999999 are allowed"):
        made.load(0)
    with limited(Limits(bytes=10**6)):
        assert made.load(0) == kept[0]["image"]["bytes"]


READS = """
import sys
from pathlib import Path
from pipelines.published.parquet import Parquet
made = Parquet(Path(sys.argv[1]), train=True)
print(sum(len(made.load(item.reference)) for item in made.items[:int(sys.argv[2])]))
"""


@pytest.mark.integration
@pytest.mark.slow
def test_memory_is_that_of_a_page_and_an_image(tmp_path: Path) -> None:
    """With a large row group, and with one image of 10 MB that stands once in the file, but for 300 rows."""
    rng = np.random.default_rng(0)
    lines = [{"image": {"bytes": rng.bytes(30_000)}, "label": 0} for _ in range(10_000)]
    root = tmp_path / "large"
    write(root / ONE[0], lines, per_group=10_000)
    write(root / ONE[1], lines[:10])
    nothing = peak(sys.executable, "-c", READS, str(root), "0")
    large = peak(sys.executable, "-c", READS, str(root), "10000")
    assert "\n300000000\n" in f"\n{large.text}"
    assert large.mb - nothing.mb < 160, "a page is closed after 1024 values, so it has 30 MB"
    image = pa.DictionaryArray.from_arrays(pa.array([0] * 300, pa.int32()), pa.array([rng.bytes(10**7)]))
    for name in ONE:
        pq.write_table(pa.table({"image": image, "label": [0] * 300}), tmp_path / name, dictionary_pagesize_limit=10**8)
    shutil.rmtree(root)
    bomb = peak(sys.executable, "-c", READS, str(tmp_path), "300")
    assert "\n3000000000\n" in f"\n{bomb.text}"
    assert bomb.mb - nothing.mb < 150


# Groups. -----------------------------------------------------------------------------------------------


class Grouped(Source):
    classes = ("a",)

    def __init__(self, groups: Any) -> None:
        self.groups = groups
        self.items = [Item(str(i), i, 0) for i in range(12)]


def test_groups_stay_whole_and_are_shuffled() -> None:
    groups = [7, 7, 7, 0, 0, 3, 3, 3, 3, 9, 7, 2]
    orders = {tuple(packing_order(made := Grouped(groups), made.items, seed).tolist()) for seed in range(20)}
    assert len(orders) > 15
    for order in orders:
        assert sorted(order) == list(range(12))
        runs = [order[i] for i in range(12) if i == 0 or groups[order[i]] != groups[order[i - 1]]]
        assert len(runs) == 5, "each group stands in one place"
        assert all(a < b for a, b in itertools.pairwise(order) if groups[a] == groups[b])
    for wrong in ([0] * 11, [0.5] * 12, ["a"] * 12):
        with pytest.raises(SourceError, match="groups should hold a number for each of the 12 items"):
            packing_order(made := Grouped(wrong), made.items, 0)


def test_a_row_group_is_read_once_or_twice(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """12 row groups of ten in five shards: a shard begins in the middle of one at most."""
    reads = list[tuple[str, int]]()
    images = columns.Columns.images
    monkeypatch.setattr(
        columns.Columns, "images", lambda self, group: reads.append((self.path.name, group)) or images(self, group)
    )
    made = source(published)
    order = packing_order(made, made.items, 0)
    for shard in np.array_split(order, 5):
        worker = pickle.loads(pickle.dumps(made))
        for k in shard:
            worker.load(made.items[k].reference)
    assert len(set(reads)) == 12
    assert len(reads) <= 12 + 4
    assert max(map(reads.count, reads)) <= 2


def test_a_set_whose_files_are_sorted_by_class(tmp_path: Path, command: Tell) -> None:
    """Large row groups of a class each: what `index` would say of such shards is said."""
    kinds = {"names": [str(k) for k in range(40)], "_type": "ClassLabel"}
    image = jpeg(np.random.default_rng(0), 0, 16)
    lines = [{"image": {"bytes": image}, "label": i // 50} for i in range(2000)]
    write(tmp_path / "hf" / ONE[0], lines, schema(label=kinds), per_group=50)
    write(tmp_path / "hf" / ONE[1], lines[:100], schema(label=kinds), per_group=50)
    said = command("parquet", tmp_path / "hf", tmp_path / "sets", "--shorter-side", 0, "--shard-mb", 0.05)
    assert re.search(
        r"sets/train is sorted by class: a batch of 128 would show \d+ classes, against \d+ in a full", said
    )
    shards = ShardSet(tmp_path / "sets" / "train")
    batch = Order(shards.shard_samples, 0, 16).samples(0, 0, 128)
    assert len(np.unique(shards.labels(batch))) < 30


@pytest.mark.integration
@pytest.mark.slow
def test_a_killed_pack_continues_with_the_same_bytes(published: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "pipelines", "pack", "--shard-mb=0.05", "--workers=2", "parquet", str(published)]
    process = subprocess.Popen(
        [*words, str(tmp_path / "killed")], cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True
    )
    until(lambda: list(tmp_path.glob("killed/train/.pack/*.json")))
    process.send_signal(signal.SIGKILL)
    process.wait()
    until(lambda: not session(process.pid))
    assert not (tmp_path / "killed" / "train" / "manifest.json").exists()
    for name in ("killed", "whole"):
        subprocess.run([*words, str(tmp_path / name)], cwd=ROOT, capture_output=True, timeout=120, check=True)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    pack(source(published), tmp_path / "one" / "train", Options(shard_mb=0.05), split="train", workers=1)
    assert files(tmp_path / "one" / "train") == files(tmp_path / "whole" / "train")
    with pytest.raises(ShardError, match="packed with --seed 0 and not 1"):
        pack(source(published), tmp_path / "one" / "train", Options(shard_mb=0.05, seed=1), split="train", workers=1)
