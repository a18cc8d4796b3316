"""Sets made of another tool's tars that stay where they are: by pattern, of links, with labels in `cls` or `json`.

The tars are laid out as timm's on Hugging Face; what they hold is compared with what webdataset's reader finds.
"""

from __future__ import annotations

import gc
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
import tracemalloc
import warnings
from collections.abc import Callable, Sequence
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from pipelines import indexing
from pipelines.__main__ import main as pipelines
from pipelines.manifest import ShardError
from pipelines.patterns import refuse_splits
from pipelines.shards import ShardSet
from tests.conftest import TINTS, photograph

pytestmark = pytest.mark.integration

TRAIN, VALIDATION = "imagenet1k-train-{0000..0002}.tar", "imagenet1k-validation-{00..01}.tar"
CLASSES = 4


def jpeg(rng: np.random.Generator) -> bytes:
    out = io.BytesIO()
    photograph(rng, 64, 48, TINTS[rng.integers(3)]).save(out, "JPEG")
    return out.getvalue()


def write(path: Path, seed: int, count: int = 6, kind: str = "both", extension: str = "jpg") -> None:
    """A tar of another tool. `kind`: where the labels are, in `cls`, `json` or both."""
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path)) as tar:
        for i in range(count):
            key, label = f"n{seed:08d}_{i}", int(rng.integers(CLASSES))
            sample: dict[str, Any] = {"__key__": key, extension: jpeg(rng)}
            if kind != "json":
                sample["cls"] = label
            if kind != "cls":
                sample["json"] = {"label": label, "filename": f"{key}.JPEG", "width": 64, "height": 48}
            tar.write(sample)


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """Both splits in one folder, as timm/imagenet-1k-wds has them."""
    for seed in range(3):
        write(tmp_path / "hf" / f"imagenet1k-train-{seed:04d}.tar", seed)
    for seed in range(2):
        write(tmp_path / "hf" / f"imagenet1k-validation-{seed:02d}.tar", 10 + seed)
    return tmp_path / "hf"


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Types `python -m pipelines ...`; what it prints. One that fails ends with one sentence, exit code 2."""

    def typed(*words: object, code: int = 0) -> str:
        workers = ["--workers", "1"] if words[0] in ("index", "verify") else []
        monkeypatch.setattr("sys.argv", ["pipelines", *map(str, words), *workers])
        assert pipelines() == code
        told = capsys.readouterr()
        return told.out if code == 0 else told.err.splitlines()[-1].removeprefix("error: ")

    return typed


def seen(folder: Path) -> dict[str, tuple[object, ...]]:
    """Everything of a folder that a program could change, the folder itself included."""
    paths = [folder, *sorted(folder.rglob("*"))]
    stats = [path.lstat() for path in paths]
    return {
        str(path): (s.st_ino, s.st_mode, s.st_size, s.st_mtime_ns, s.st_ctime_ns)
        for path, s in zip(paths, stats, strict=True)
    }


def read(tars: Sequence[Path]) -> list[dict[str, Any]]:
    """The samples of tars, as webdataset's reader finds them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves its files to the garbage collector
        found = list(webdataset.WebDataset([str(tar) for tar in tars], shardshuffle=False))
        gc.collect()
    return [{key: value for key, value in sample.items() if key[0] != "_"} for sample in found]


def labels(shards: ShardSet) -> list[int]:
    return [int(label) for label in shards.index["label"]]


def files(directory: Path) -> dict[str, bytes]:
    """The bytes of what is written into a set, and where its links lead."""
    paths = sorted(directory.iterdir())
    return {path.name: os.readlink(path).encode() if path.is_symlink() else path.read_bytes() for path in paths}


@pytest.mark.parametrize(("kind", "extension"), [("both", "jpg"), ("json", "jpeg"), ("cls", "JPEG"), ("json", "JPEG")])
def test_labels_are_those_of_another_reader(
    tmp_path: Path, call: Callable[..., str], kind: str, extension: str
) -> None:
    for seed in range(2):
        write(tmp_path / "theirs" / f"{seed}.tar", seed, kind=kind, extension=extension)
    told = call("index", tmp_path / "theirs" / "{0..1}.tar", "--to", tmp_path / "set")
    assert told.startswith(f"{tmp_path}/set: 12 images of 4 classes in 2 shards")
    shards, theirs = ShardSet(tmp_path / "set"), read(sorted((tmp_path / "theirs").iterdir()))
    assert [shards.read(i).tobytes() for i in range(len(shards))] == [one[extension.lower()] for one in theirs]
    expected = [int(one["cls"]) if "cls" in one else json.loads(one["json"])["label"] for one in theirs]
    assert labels(shards) == expected
    assert len(set(expected)) == CLASSES
    assert call("verify", tmp_path / "set").endswith("all hashes and labels are right\n")


def test_cls_wins_over_json(tmp_path: Path, call: Callable[..., str]) -> None:
    """Also where it is refused: a class name is none, whatever the json says."""
    rng = np.random.default_rng(0)
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as tar:
        tar.write({"__key__": "a", "jpg": jpeg(rng), "cls": 2, "json": {"label": 1}})
        tar.write({"__key__": "b", "jpg": jpeg(rng), "cls": b"cat", "json": {"label": 1}})
        tar.write({"__key__": "c", "jpg": jpeg(rng), "cls": b"", "json": {"label": 1}})
    call("index", tmp_path)
    assert labels(ShardSet(tmp_path)) == [2]
    told = (tmp_path / "rejected.jsonl").read_text()
    assert "label cat is not a class number" in told
    assert "label (empty) is not a class number" in told


STRANGE = {
    b'{"caption": "a cat", "url": "x"}': "label is missing); its keys are caption, url",
    b"{}": "label is missing); it has no keys",
    b'{"label": "7"}': "label should be a valid integer, and is '7'); its keys are label",
    b'{"label": 7.0}': "label should be a valid integer, and is 7.0)",
    b'{"label": true}': "label should be a valid integer, and is True)",
    b'{"label": [7]}': "label should be a valid integer)",
    b'{"label": -1}': "label should be greater than or equal to 0, and is -1)",
    b'{"label": 2147483648}': "label should be less than 2147483648",
    b'{"label": %s}' % (b"9" * 5000): "it is no JSON: number out of range",
    b"[7]": "it should be an object)",
    b"7": "it should be an object, and is 7)",
    b"label: 7": "it is no JSON",
    b"\xff\xfe{": "it is no JSON",
    b"": "it is no JSON",
    b"[" * 100_000: "it is no JSON: recursion limit exceeded",
    b'{"label": 1, "x": "%s"}' % (b"x" * (1 << 20)): "bytes, and at most 262144 are read",
    json.dumps(
        {f"k{i}\x1b": 0 for i in range(50)}
    ).encode(): r"its keys are k0\x1b, k1\x1b, k2\x1b, k3\x1b, k4\x1b, k5",
}


def test_a_json_without_a_label_is_a_reason(tmp_path: Path, call: Callable[..., str]) -> None:
    rng = np.random.default_rng(0)
    with webdataset.TarWriter(str(tmp_path / "a.tar"), encoder=False) as tar:
        tar.write({"__key__": "good", "jpg": jpeg(rng), "json": b'{"label": 1, "label": 3, "x": NaN}'})
        for i, text in enumerate(STRANGE):
            tar.write({"__key__": f"{i}", "jpg": jpeg(rng), "json": text})
    call("index", tmp_path)
    assert labels(ShardSet(tmp_path)) == [3], "the last counts, as in json.loads"
    found = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert [line["file"] for line in found] == [f"a.tar/{i}" for i in range(len(STRANGE))]
    assert [reason for line, reason in zip(found, STRANGE.values(), strict=True) if reason not in line["reason"]] == []
    assert max(len(line["reason"]) for line in found) < 250


@pytest.mark.parametrize(
    "patterns",
    [
        [TRAIN],
        ["imagenet1k-train-*.tar"],
        ["imagenet1k-train-000[0-2].tar"],
        ["imagenet1k-{train,train}-{0000..0002}.tar"],
        [f"imagenet1k-train-{i:04d}.tar" for i in (2, 0, 1)],
        ["imagenet1k-train-0000.tar", "*train*[12].tar"],
        ["../linked"],
    ],
)
def test_ways_to_name_the_same_tars(
    published: Path, tmp_path: Path, call: Callable[..., str], patterns: list[str]
) -> None:
    linked = tmp_path / "linked"  # as Hugging Face's cache has them
    linked.mkdir()
    for tar in published.glob("*train*"):
        (linked / tar.name).symlink_to(f"../hf/{tar.name}")
    call("index", published / TRAIN, "--to", tmp_path / "a" / "train")
    call("index", *(published / one for one in patterns), "--to", tmp_path / "b" / "train")
    a, b = files(tmp_path / "a" / "train"), files(tmp_path / "b" / "train")
    for name in ("manifest.json", "index.npy", "rejected.jsonl"):
        assert a[name] == b[name], name
    assert manifest_of(tmp_path / "a" / "train")["split"] == "train"
    assert set(a) == set(b) == {"manifest.json", "index.npy", "rejected.jsonl", *(tar.name for tar in linked.iterdir())}
    where = linked if patterns == ["../linked"] else published
    for name in os.listdir(linked):
        at = os.readlink(tmp_path / "b" / "train" / name)
        assert os.path.isabs(at)
        assert os.path.normpath(at) == f"{where}/{name}", "as it was typed, and not resolved"


def manifest_of(directory: Path) -> dict[str, Any]:
    body: dict[str, Any] = json.loads((directory / "manifest.json").read_text())
    return body


def test_a_relative_pattern(published: Path, call: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(published.parent)
    call("index", f"hf/{TRAIN}", "--to", "sets/train")
    monkeypatch.chdir("/")
    assert len(ShardSet(published.parent / "sets" / "train").read(17)) > 0


def test_class_names_and_both_splits(published: Path, tmp_path: Path, call: Callable[..., str]) -> None:
    """One file names the classes of both, so that one run takes them; a repeated `index DIR` keeps the names."""
    words = [f"n{i:08d} word {i}, other word" for i in range(5)]
    (tmp_path / "LOC_synset_mapping.txt").write_text("".join(f"{line}\n" for line in words))
    for name, pattern in (("train", TRAIN), ("val", VALIDATION)):
        to = tmp_path / "sets" / name
        told = call("index", published / pattern, "--to", to, "--classes", tmp_path / "LOC_synset_mapping.txt")
        assert "there is no image of 1 of the classes: n00000004 word 4" in told
        assert ShardSet(to).classes == words
        before = files(to)
        call("index", to)
        assert files(to) == before


def test_a_folder_of_both_splits_is_refused_with_what_to_type(
    published: Path, tmp_path: Path, call: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = seen(published)
    monkeypatch.chdir(tmp_path)
    ways: list[tuple[object, ...]] = [
        (published,),
        (published, "--to", "sets/imagenet"),
        (published, "--to", "x/train"),
    ]
    for words, base in zip(ways, ("sets", "sets/imagenet", "x"), strict=True):
        told = call("index", *words, code=2)
        assert told.startswith(f"{published} holds tars of train and validation, and a set is one split: index each, ")
        commands = re.findall("`python -m pipelines ([^`]+)`", told)
        assert [shlex.split(command)[-1] for command in commands] == [f"{base}/train", f"{base}/validation"]
        assert not (tmp_path / base / "train").exists()
        for command in commands:
            call(*shlex.split(command))
        assert [shard["name"] for shard in manifest_of(tmp_path / base / "validation")["shards"]] == [
            f"imagenet1k-validation-{i:02d}.tar" for i in range(2)
        ]
        assert len(ShardSet(tmp_path / base / "train").names) == 3
    for mixed in (
        [published / "*.tar"],
        [published / "imagenet1k-{train-0000,validation-00}.tar"],
        published.iterdir(),
    ):
        assert "a set is one split" in call("index", *mixed, "--to", "sets/y", code=2)
    assert seen(published) == before
    call("index", published / TRAIN, published / "*validation*.tar", "--to", "sets/all")
    assert len(ShardSet("sets/all").names) == 5, "two patterns, typed so, are somebody's decision"
    call("index", "sets/all")


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["train-0", "train-1"], 0),
        (["00000", "00001"], 0),
        (["shard-0", "train-0"], 0),
        (["test-tube-0", "cat-0"], 0),
        (["my-test-train-0", "my-test-train-1"], 0),
        (["imagenet12k-training-0", "imagenet12k-train-1"], 0),
        (["val-0", "validation-1", "dev-2"], 0),
        (["validate1", "trainers-1"], 0),
        (["my-test-train-0", "my-test-val-0"], 2),
        (["a_train_00-of-02", "a_train_01-of-02", "a_val_00-of-01", "a_test_00-of-01"], 3),
        (["Train0", "Val0"], 2),
        (["0-train", "1-train", "0-trainval"], 2),
        (["0-train-a", "1-a-train", "val[1]", "a-val"], 2),
    ],
)
def test_splits_in_the_names_of_tars(tmp_path: Path, names: list[str], splits: int) -> None:
    """The patterns of the message, as Python's glob and braceexpand read them, divide the tars."""
    tars = [tmp_path / f"{name}.tar" for name in names]
    for tar in tars:
        tar.touch()
    if not splits:
        refuse_splits(tars)
        return
    with pytest.raises(ShardError, match="a set is one split") as error:
        refuse_splits(tars)
    commands = [shlex.split(line) for line in re.findall("`([^`]+)`", str(error.value))]
    assert len({line[-1] for line in commands}) == splits
    found = [sorted(webdataset.shardlists.expand_urls(line[4])) for line in commands]
    matched = [[tar for one in each for tar in ([one] if one in map(str, tars) else glob(one))] for each in found]
    assert sorted(tar for each in matched for tar in each) == sorted(map(str, tars))


BOMBS = [
    "{0..999999999}",
    "{0..9}{0..99999}",
    "{a..z}" * 5,
    "{0..%s}" % ("9" * 5000),
    "{{0..999}{0..999},x}",
    "{a,b}" * 40,
]


@pytest.mark.parametrize("bomb", BOMBS, ids=range(len(BOMBS)))
def test_a_pattern_without_end(tmp_path: Path, call: Callable[..., str], bomb: str) -> None:
    tracemalloc.start()
    start = time.monotonic()
    told = call("index", f"{tmp_path}/{bomb}.tar", "--to", tmp_path / "set", code=2)
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()
    assert time.monotonic() - start < 5
    assert "stands for more than 100000 names" in told
    assert not (tmp_path / "set").exists()


def test_patterns_that_are_wrong(published: Path, tmp_path: Path, call: Callable[..., str]) -> None:
    to = ("--to", tmp_path / "set")
    train = f"{published}/imagenet1k-train"
    (published / "notes.txt").touch()
    for words, sentence in {
        (f"{train}-{{0000..0009}}.tar",): f"there is no {train}-0003.tar, {train}-0004.tar, {train}-0005.tar, "
        f"{train}-0006.tar, {train}-0007.tar, ... (missing: 7 of 10): put them there, or name the tars that there are",
        (
            f"{train}-0000.tar",
            f"{train}-7.tar",
            f"{train}-8.tar",
        ): f"there is no {train}-7.tar, {train}-8.tar (missing: 2 of 3)",
        (f"{train}-{{0000..0002.tar",): "has unmatched braces: close each, as in {0000..1023}",
        (f"{train}-0000}}.tar",): f"there is no {train}-0000}}.tar (missing: 1 of 1)",
        (f"{published}/*nope*.tar",): f"{published}/*nope*.tar matches no file: name tars, or the folder that holds",
        (f"{published}/*.txt",): f"{published}/*.txt matches no *.tar file: ",
        (
            f"{published}/notes.txt",
        ): "notes.txt is not an uncompressed *.tar file: name tars, or the folder that holds them",
        (f"{published}/nope",): f"there is no {published}/nope (missing: 1 of 1)",
    }.items():
        assert sentence in call("index", *words, *to, code=2), words
    assert not (tmp_path / "set").exists()


def test_a_name_that_only_looks_like_a_pattern(tmp_path: Path, call: Callable[..., str]) -> None:
    for name in ("a[1]{2}.tar", "b*.tar", "bc.tar"):
        write(tmp_path / "x{y}" / name, 1, 1)
    call("index", tmp_path / "x{y}", "--to", tmp_path / "all")
    assert len(ShardSet(tmp_path / "all")) == 3
    call("index", tmp_path / "x{y}" / "b*.tar", "--to", tmp_path / "b")
    assert ShardSet(tmp_path / "b").names == ["b*.tar"]


def test_without_a_place_for_the_set(published: Path, call: Callable[..., str]) -> None:
    before = seen(published)
    for words in (
        [published / TRAIN],
        [published / "*train*"],
        [published / "imagenet1k-train-0000.tar"],
        [published] * 2,
    ):
        told = call("index", *words, code=2)
        assert told.startswith("index needs --to for tars that are named one by one or by a pattern: ")
        assert told.endswith(f"`python -m pipelines index {shlex.join(map(str, words))} --to DIR`")
    assert seen(published) == before


def test_two_tars_of_one_name(tmp_path: Path, call: Callable[..., str]) -> None:
    for folder in "ab":
        write(tmp_path / folder / "0.tar", 1)
    told = call("index", tmp_path / "a", tmp_path / "b", "--to", tmp_path / "set", code=2)
    assert told.startswith(f"{tmp_path}/a/0.tar and {tmp_path}/b/0.tar have the same name, and a set is one folder")
    assert not (tmp_path / "set").exists()


def test_a_place_that_holds_something_else(
    published: Path, shard_sets: Path, tmp_path: Path, call: Callable[..., str]
) -> None:
    """Nothing of it is changed, and nothing of the tars."""
    places = {name: tmp_path / name for name in ("notes", "packed", "more", "other link", "file there", "unfinished")}
    for name in ("notes", "file there", "other link", "unfinished"):
        places[name].mkdir()
    (places["notes"] / "notes.txt").touch()
    shutil.copytree(shard_sets / "val", places["packed"])
    call("index", published / TRAIN, "--to", places["more"])
    (places["file there"] / "imagenet1k-train-0000.tar").write_bytes(b"mine")
    (places["other link"] / "imagenet1k-train-0001.tar").symlink_to(published / "imagenet1k-train-0000.tar")
    (places["unfinished"] / ".pack").mkdir()
    (places["unfinished"] / ".pack" / "plan").write_text("pack 0")
    (tmp_path / "no folder").touch()
    sentences = {
        "notes": "holds notes.txt, which is none of the set: name an empty or a new directory for --to",
        "packed": "holds shard-000000.tar, shard-000001.tar",
        "more": "holds imagenet1k-train-0001.tar, imagenet1k-train-0002.tar, which is none of the set",
        "other link": f"0001.tar is a link to {published}/imagenet1k-train-0000.tar, and not to {published}/imagenet",
        "file there": f"0000.tar is there already, and no link to {published}/imagenet1k-train-0000.tar: remove it",
        "unfinished": "holds an unfinished pack",
    }
    for name, sentence in sentences.items():
        pattern = published / ("imagenet1k-train-0000.tar" if name == "more" else TRAIN)
        before, source = files(places[name]) if name != "unfinished" else {}, seen(published)
        assert sentence in call("index", pattern, "--to", places[name], code=2)
        after = files(places[name]) if name in ("notes", "packed", "more") else {}
        assert not (places[name] / ".pack" / "linking").exists(), "no link was begun"
        assert after == (before if after else {})
        assert seen(published) == source
    assert (places["file there"] / "imagenet1k-train-0000.tar").read_bytes() == b"mine"
    assert "is a file: name a directory for the set" in call(
        "index", published / TRAIN, "--to", tmp_path / "no folder", code=2
    )


def test_a_set_that_grows_and_one_among_its_tars(published: Path, tmp_path: Path, call: Callable[..., str]) -> None:
    call("index", published / "imagenet1k-train-000[01].tar", "--to", tmp_path / "set")
    call("index", published / TRAIN, "--to", tmp_path / "set")
    assert len(ShardSet(tmp_path / "set")) == 18
    alone = tmp_path / "alone"
    shutil.copytree(published, alone, ignore=shutil.ignore_patterns("*validation*"))
    call("index", alone / "*.tar", "--to", alone)
    assert not any(path.is_symlink() for path in alone.iterdir())
    assert (alone / "index.npy").read_bytes() == (tmp_path / "set" / "index.npy").read_bytes()


class Killed(BaseException):
    """In the place of a kill: nothing of ours catches it."""


@pytest.mark.parametrize("after", ["a link", "the links", "a scan", "the scans"])
def test_a_kill_in_between(
    published: Path, tmp_path: Path, call: Callable[..., str], monkeypatch: pytest.MonkeyPatch, after: str
) -> None:
    """The same command makes the same bytes; `index DIR` makes no set of only some of the tars."""
    words = ("index", published / TRAIN, "--to", tmp_path / "b" / "train")
    call(*words[:3], tmp_path / "a" / "train")
    real = {name: getattr(indexing, name) for name in ("link", "parallel", "finish")}

    def kill(*args: Any, **kwargs: Any) -> Any:
        if after == "a link" and len(list((tmp_path / "b" / "train").glob("*.tar"))) < 2:
            return real["link"](*args)
        if after == "a scan":
            real["parallel"](args[0], args[1][:1], **kwargs)
        raise Killed

    name = {"a link": "link", "the links": "parallel", "a scan": "parallel", "the scans": "finish"}[after]
    monkeypatch.setattr(indexing, name, kill)
    with pytest.raises(Killed):
        call(*words)
    monkeypatch.setattr(indexing, name, real[name])
    assert "has shards but no manifest.json" in call("verify", tmp_path / "b" / "train", code=2)
    if after == "a link":
        told = call("index", tmp_path / "b" / "train", code=2)
        assert "does not have the links to all of its tars yet: repeat the command" in told
    call(*words)
    assert files(tmp_path / "b" / "train") == files(tmp_path / "a" / "train")
    call(*words)
    assert files(tmp_path / "b" / "train") == files(tmp_path / "a" / "train")


def test_a_tar_that_was_changed(published: Path, tmp_path: Path, call: Callable[..., str]) -> None:
    """It is noticed when it is opened, and `index DIR`, as the message says, makes the set anew, among its links."""
    directory = tmp_path / "set"
    call("index", published / TRAIN, "--to", directory)
    write(published / "imagenet1k-train-0001.tar", 77, 8)
    with pytest.raises(ShardError, match=r"0001.tar is not the tar that was indexed: .* or run `(.*)`$") as error:
        ShardSet(directory).read(7)
    before = seen(published)
    command = re.findall("`([^`]*)`", str(error.value))[0]
    call(*shlex.split(command)[3:])
    assert seen(published) == before
    expected = read(sorted(published.glob("*train*")))
    shards = ShardSet(directory)
    assert [shards.read(i).tobytes() for i in range(len(shards))] == [one["jpg"] for one in expected]
    assert labels(shards) == [int(one["cls"]) for one in expected]


def test_tars_that_are_gone(published: Path, tmp_path: Path, call: Callable[..., str]) -> None:
    """As those of a file system that is not mounted: each command names the link and where it led."""
    directory = tmp_path / "set"
    call("index", published / TRAIN, "--to", directory)
    opened, before = ShardSet(directory, patience=0.2), files(directory)
    assert len(opened.read(0)) > 0
    shutil.move(published, tmp_path / "away")
    first = "imagenet1k-train-0000.tar"
    sentence = (
        f"{directory}/{first} is a link to {published}/{first}, where nothing is: mount its file system, or put it back"
    )
    for words in (
        ("verify", directory),
        ("index", directory),
        ("bench", directory),
        ("preview", directory, tmp_path / "x.png"),
    ):
        assert call(*words, code=2) == sentence, words
    for sizes in (True, False):
        with pytest.raises(ShardError, match=re.escape(sentence)):
            ShardSet(directory).check_tars(sizes=sizes)
    with pytest.raises(ShardError, match=re.escape(sentence.replace("0000.tar", "0002.tar"))):
        opened.read(17)
    opened._tars._files.clear()
    with pytest.raises(OSError, match=re.escape(sentence)):
        opened.read(0)
    assert files(directory) == before
    call("index", tmp_path / "away" / TRAIN, "--to", directory)
    moved = files(directory)
    assert moved.pop(first) == bytes(tmp_path / "away" / first)
    assert {name: moved[name] for name in ("index.npy", "manifest.json")} == {
        name: before[name] for name in ("index.npy", "manifest.json")
    }
    assert "are right" in call("verify", directory)


def test_a_url_is_no_file(
    published: Path, tmp_path: Path, call: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    site, bucket = f"https://example.org/{TRAIN}", "s3://bucket/set"
    for place in (site, f"pipe:curl -s {site}", "hf://datasets/timm/imagenet-1k-wds/*.tar"):
        assert call("index", place, "--to", "set", code=2).startswith(f"{place} is no file: fetch the tars first")
    told = call("index", published / TRAIN, "--to", bucket, code=2)
    assert told.startswith(f"{bucket} is no file: name a directory for --to")
    assert not (tmp_path / "s3:").exists()
    shutil.copytree(published, tmp_path / "a:" / "b")
    call("index", f"{tmp_path}/a:/b/{TRAIN}", "--to", "set")


def python_m_pipelines(*words: object) -> subprocess.CompletedProcess[str]:
    """A command of somebody whom permissions hold: of root they are ignored, but for this."""
    bound = ["setpriv", "--inh-caps=-all", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    line = [*bound, sys.executable, "-m", "pipelines", *map(str, words)]
    return subprocess.run(line, capture_output=True, text=True, check=False)


@pytest.mark.integration
@pytest.mark.slow
def test_a_source_that_is_read_only(published: Path, tmp_path: Path) -> None:
    """Nothing changes in it, by any verb; a damaged image is listed in the set, and another is shown in its place."""
    directory = tmp_path / "sets" / "train"
    for tar in published.iterdir():
        tar.chmod(0o444)
    published.chmod(0o555)
    before = seen(published)
    done = python_m_pipelines("index", published / TRAIN, "--to", directory)
    assert done.returncode == 0, done.stderr
    for words in (("verify", directory), ("bench", directory), ("preview", directory, tmp_path / "x.png")):
        done = python_m_pipelines(*words)
        assert done.returncode == 0, done.stderr
    assert seen(published) == before
    row = ShardSet(directory).index[8]
    (published / "imagenet1k-train-0001.tar").chmod(0o644)
    with open(published / "imagenet1k-train-0001.tar", "r+b") as file:
        file.seek(int(row["offset"]))
        file.write(bytes(int(row["size"])))
    before = seen(published)
    found = python_m_pipelines("verify", directory)
    assert found.returncode == 2
    assert "imagenet1k-train-0001.tar/n00000001_2: cannot be read" in found.stdout
    assert "imagenet1k-train-0001.tar: its sha256 differs" in found.stdout
    assert ShardSet(directory).quarantined.tolist() == [8]
    assert (directory / "quarantine.jsonl").exists()
    assert seen(published) == before


@pytest.mark.integration
def test_a_folder_that_cannot_be_written(published: Path, tmp_path: Path) -> None:
    for tar in published.glob("*validation*"):
        tar.unlink()
    published.chmod(0o555)
    before = seen(published)
    refused = python_m_pipelines("index", published)
    assert (refused.returncode, refused.stdout) == (2, "")
    command = f"`python -m pipelines index {published} --to DIR`"
    sentence = "cannot be written (Permission denied): leave the tars there and make the set elsewhere"
    assert refused.stderr == f"error: {published} {sentence}, {command}\n"
    refused = python_m_pipelines("index", published, "--to", published / "set")
    assert refused.stderr.endswith("cannot be written (Permission denied): name another directory for --to\n")
    assert seen(published) == before


def test_a_download_whose_pieces_come_in_any_order(published: Path, tmp_path: Path, call: Callable[..., str]) -> None:
    """A tar of the right size with zeros for what is not there yet: no smaller set is made of the rest."""
    tar = published / "imagenet1k-train-0001.tar"
    data = bytearray(tar.read_bytes())
    with tarfile.open(tar) as whole:
        third, fourth = (member.offset for member in whole.getmembers()[3:5])
    data[third:fourth] = bytes(fourth - third)
    tar.write_bytes(data)
    told = call("index", f"{published}/imagenet1k-train-*.tar", "--to", tmp_path / "train", code=2)
    assert "imagenet1k-train-0001.tar is not a whole, uncompressed tar (zeros at byte" in told


@pytest.mark.integration
@pytest.mark.slow
def test_kills(tmp_path: Path, call: Callable[..., str]) -> None:
    """SIGKILL after the first scan, and again; then the same command makes what one without a kill makes."""
    for seed in range(4):
        write(tmp_path / "hf" / f"{seed}.tar", seed, 40)
    call("index", tmp_path / "hf" / "*.tar", "--to", tmp_path / "a" / "train")
    directory = tmp_path / "b" / "train"
    line = [sys.executable, "-m", "pipelines", "index", tmp_path / "hf" / "*.tar", "--to", directory, "--workers", "1"]
    for scans in (1, 2):
        with subprocess.Popen(line, stderr=subprocess.DEVNULL) as process:
            deadline = time.monotonic() + 60
            while len(list(directory.glob(".pack/*.json"))) < scans:
                assert process.poll() is None
                assert time.monotonic() < deadline
            process.kill()
        assert not (directory / "manifest.json").exists()
    call("index", tmp_path / "hf" / "*.tar", "--to", directory)
    assert files(directory) == files(tmp_path / "a" / "train")
