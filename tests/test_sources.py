"""Sources of somebody's own: by `module:name` from outside the package and by an entry of the table; what one may do
wrong is one sentence."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest

import slurm.__main__
from dist_train.cli import parse
from dist_train.data import pack_source
from pipelines.__main__ import main
from pipelines.errors import UserError
from pipelines.shards import ShardSet
from pipelines.torchvision_sets import data_sets
from slurm import packing
from slurm.job import Pack
from tests.conftest import CLASSES
from tests.helpers import adding, docs
from tests.helpers.compare import records
from tests.helpers.launch import launch

ROOT = Path(__file__).parent.parent
NUMBERS = count()
Own = Callable[[str], str]
Tell = Callable[..., str]

MADE = """
import os
from threading import Lock

from pipelines.sources import Item, Source
from PIL import Image

class Own(Source):
    classes = ["dark", "light"]

    def __init__(self, root=None):
        self.items = [Item(f"image {i}", i, i % 2) for i in range(200)]

    def load(self, reference):
        return Image.new("RGB", (40, 30), (reference, 100 * (reference % 2), 0))
"""


def documented() -> str:
    """The module of docs/data.md, which a command there writes."""
    page = docs.read((ROOT / "docs" / "data.md").read_text(encoding="utf-8"))
    (found,) = (match for block in page.bash if (match := re.search(r"<<'END'\n(.*?)\nEND", block.text, re.DOTALL)))
    return found[1]


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Own:
    """Writes a module into the current directory, which is no part of this program, and returns its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(text: str) -> str:
        name = f"own_{os.getpid()}_{next(NUMBERS)}"  # a new one, which is not imported yet
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(text), encoding="utf-8")
        return name

    return write


@pytest.fixture
def pack(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Tell:
    """Runs `python -m pipelines pack` and returns what it says, without the progress."""

    def run(*words: object, code: int = 0) -> str:
        monkeypatch.setattr("sys.argv", ["pipelines", "pack", *map(str, words)])
        assert main() == code, capsys.readouterr().err
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return said.out if not code else next(line for line in said.err.splitlines() if line.startswith("error: "))

    return run


def typed(folder: Path, env: dict[str, str], *words: object) -> subprocess.CompletedProcess[str]:
    """`python -m ...` in a folder."""
    command = [sys.executable, "-m", *map(str, words)]
    return subprocess.run(command, cwd=folder, env={**os.environ, **env}, capture_output=True, text=True, check=False)


def contents(directory: Path) -> list[tuple[str, int]]:
    """Key and label of each sample, sorted."""
    shards = ShardSet(directory)
    return sorted((shards.name(i).split("-", 2)[2], int(shards.index["label"][i])) for i in range(len(shards)))


def test_one_from_outside_the_package_with_two_splits(image_folder: Path, own: Own, pack: Tell, tmp_path: Path) -> None:
    name = f"{own(documented())}:EveryFifth"
    said = pack(name, image_folder / "val", "sets", "--workers=3", "--shard-mb=0.05")
    assert [line.split(" in ")[0] for line in said.splitlines()] == [
        "sets/train: 50 images of 3 classes",
        "sets/val: 13 images of 3 classes",
    ]
    found = {split: contents(Path("sets") / split) for split in ("train", "val")}
    assert len({key for split in found.values() for key, _ in split}) == 63, "each image is in one of them"
    for key, label in (*found["train"], *found["val"]):
        assert CLASSES[label] in key
    assert ShardSet("sets/val").sides == (256, 256), "as in the paper"
    assert "already packed" in pack(name, image_folder / "val", "sets", "--workers=1", "--shard-mb=0.05")


def test_one_that_takes_no_path_and_one_that_takes_several(own: Own, pack: Tell) -> None:
    name = f"{own(MADE)}:Own"
    pack(name, "set", "--shorter-side=0")
    assert len(ShardSet("set")) == 200
    assert ShardSet("set").classes == ["dark", "light"]
    other = own(MADE.replace("root=None", "first, second, *, train").replace("range(200)", "range(20 + 20 * train)"))
    pack(f"{other}:Own", "a.tar", "b.tar", "sets", "--shorter-side=0")
    assert [len(ShardSet(f"sets/{split}")) for split in ("train", "val")] == [40, 20]
    third = own(MADE.replace("root=None", "root, train"))
    pack(f"{third}:Own", "own", "--shorter-side=0")  # is given own/raw
    text = MADE.replace("root=None", "root=None, train=True").replace("range(200)", "range(int(root.name))")
    fourth = f"{own(text)}:Own"
    pack_source(parse(["--data.train=x/a", "--data.val=x/b", "--data.raw=30", f"--data.source={fourth}"])[0])
    assert len(ShardSet("x/a")) == 30


def test_an_image_that_cannot_be_loaded_is_named(own: Own, pack: Tell) -> None:
    text = MADE.replace("        return", "        if reference == 7: raise KeyError('no such record')\n        return")
    assert "1 rejected" in pack(f"{own(text)}:Own", "set", "--shorter-side=0")
    (line,) = map(json.loads, Path("set/rejected.jsonl").read_text(encoding="utf-8").splitlines())
    assert line == {"file": "image 7", "reason": "'no such record'"}


@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        ("(Source)", "", "pack NAME returned an object of type Own, which is no Source: a source is made of its"),
        ("root=None", "root, other", r"pack NAME takes \(root, other\), and is called with \(\.\.\.\), missing a"),
        ("self.items =", "self.items = 1 / 0 and", r"pack NAME failed: ZeroDivisionError: .* \(MODULE.py, line 12\)"),
        ("self.items =", "x =", "source NAME failed: AttributeError: 'Own' object has no attribute 'items'"),
        ("range(200)", "()", "no images to pack into set: expected items of NAME"),
        ("i % 2)", "i % 3)", "NAME gives image 2 the label 2: it takes the number of a class, and there are 2"),
        ("i % 2)", "'dark')", "NAME gives image 0 the label 'dark': it takes the number of a class"),
        ("Item(f", "(f", r"NAME.items holds \('image 0', 0, 0\): it takes Item\(name as text, reference, label\)"),
        ('"light"]', '"dark"]', "NAME.classes names dark more than once: each label has a name of its own"),
        ('"light"]', "7]", "NAME.classes holds 7: it takes a name per class, as text"),
        ("i, i % 2)", "{(1, 2): i}, i % 2)", "the references of a source cannot be compared"),
        ("def load", "def read", r"NAME has no load\(reference\): define it, to return the bytes"),
        ("return Image", "return [7] or Image", "NAME.load returned an object of type list for image"),
        (
            "return Image",
            "missing.x; return Image",
            "none of the 67 images that were tried can be read, such as image 2 \\(name 'missing' is not",
        ),
        ("self.items =", "self.lock = Lock(); self.items =", "NAME cannot be sent to worker processes"),
        (
            "def __init__(self, root=None):\n        self.items = ",
            "def __init__(self, root): 0\n    items = property(lambda self: [Item(str(os.getpid()), 0, 0)])\n    x = ",
            "NAME lists other classes or items in another process: they must be the same each time, in the same order",
        ),
    ],
)
def test_what_one_does_wrong_is_one_sentence(own: Own, pack: Tell, before: str, after: str, sentence: str) -> None:
    module = own(MADE.replace(before, after))
    said = pack(f"{module}:Own", "raw", "set", "--workers=1", code=2)
    sentence = sentence.replace("NAME", f"{module}:Own").replace("MODULE", module)
    assert re.match(f"error: {sentence}", said), said
    assert not Path("set/manifest.json").exists()


def test_a_name_that_is_none(own: Own, pack: Tell) -> None:
    assert pack("imagefoldr", "a", "b", code=2).endswith("pack imagefoldr is unknown: did you mean imagefolder?")
    assert pack("fashon-mnist", "a", code=2).endswith("did you mean FashionMNIST?")
    assert "no module nowhere in" in pack("nowhere:Own", "a", "b", code=2)
    assert "has no Other" in pack(f"{own(MADE)}:Other", "a", "b", code=2)
    config, _ = parse(["--data.source=imagefoldr", "--data.train=a/train", "--data.val=a/val"])
    with pytest.raises(UserError, match=r"data.source imagefoldr is unknown: did you mean imagefolder\?"):
        pack_source(config)
    assert "FashionMNIST" in data_sets()


def test_a_folder_of_two_splits_is_packed_for_a_run(image_folder: Path, tmp_path: Path) -> None:
    sets = [f"--data.train={tmp_path}/sets/train", f"--data.val={tmp_path}/sets/val", "--data.source=imagefolder"]
    config, _ = parse(sets)
    with pytest.raises(UserError, match=f"no folder {tmp_path}/sets/raw: imagefolder reads the folders train and val"):
        pack_source(config)
    config, _ = parse([*sets, f"--data.raw={image_folder}"])
    pack_source(config)
    assert [len(ShardSet(tmp_path / "sets" / split)) for split in ("train", "val")] == [240, 63]
    assert ShardSet(tmp_path / "sets" / "val").sides == (256, 256), "as `pack imagefolder` does"


@pytest.mark.integration
@pytest.mark.slow
def test_a_run_that_packs_one_of_its_own_trains_and_resumes(image_folder: Path, own: Own, tmp_path: Path) -> None:
    """By two commands that name it, the second of which has the sets already; the first one's run directory does not
    bring the code of a stranger with it."""
    name = f"{own(documented())}:EveryFifth"
    words = (f"--data.source={name}", f"--data.raw={image_folder / 'val'}", "--data.shuffle_shards=2")
    path = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    for steps, said in ((2, f"packing {name} into"), (4, "continuing from step-00000002")):
        more = (f"--train.max_steps={steps}", "--checkpoint.steps=2")
        result = launch(tmp_path / "sets", tmp_path / "r", *words, *more, ranks=0, env=path, how="exec")
        assert result.returncode == 0, result.stderr
        assert said in result.stderr
    assert [line["step"] for line in records(tmp_path / "r", "step")] == [1, 2, 3, 4]
    assert [len(ShardSet(tmp_path / "sets" / split)) for split in ("train", "val")] == [50, 13]
    shutil.rmtree(tmp_path / "sets")
    done = typed(tmp_path, path, "dist_train", "--config", tmp_path / "r" / "config.yaml")
    assert done.returncode == 2
    assert "add --trust" in done.stderr


@pytest.mark.integration
@pytest.mark.slow
def test_the_documented_entry_of_the_table(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/architecture.md, in a copy of this tree."""
    monkeypatch.chdir(tmp_path)
    tree, photos = adding.applied("A data source", tmp_path), tmp_path / "photos"
    for split in ("train", "val"):
        shutil.copytree(image_folder / "val", photos / split)
        lines = (f"{file.relative_to(photos / split)},{file.parent.name}" for file in (photos / split).glob("*/*"))
        (photos / split / "labels.csv").write_text("\n".join(sorted(lines)), encoding="utf-8")
    path = {"PYTHONPATH": str(tree)}
    done = typed(tmp_path, path, "pipelines", "pack", "listed", photos / "val", "set", "--workers=2")
    assert done.returncode == 0, done.stderr
    assert sum(CLASSES[label] in key for key, label in contents(tmp_path / "set")) == 63
    words = ("--data.source=listed", f"--data.raw={photos}", "--train.max_steps=1")
    result = launch(tmp_path / "sets", tmp_path / "r", *words, ranks=0, env=path, how="exec")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(("arguments", "splits"), [("root=None", [""]), ("root, train", ["train", "val"])])
def test_one_of_its_own_as_arrays(
    own: Own,
    pack: Tell,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: str,
    splits: list[str],
) -> None:
    """The tasks, pickled as submitit does, run one after another here; the bytes are those of `pack`."""
    tasks = list[Pack]()

    def hand_over(folder: Path, wanted: dict[str, Any], given: list[Pack], *, local: bool) -> list[str]:
        tasks.extend(pickle.loads(pickle.dumps(given)))
        return [f"{len(tasks)}_0"]

    monkeypatch.setattr(packing, "hand_over", hand_over)
    name, options = f"{own(MADE.replace('root=None', arguments))}:Own", ("--shorter-side=0", "--shard-mb=0.02")
    assert slurm.__main__.main(["submit", "pack", name, "raw", "set", "--tasks=2", "--time=5", *options]) == 0
    said = capsys.readouterr()
    assert "raw: 2 classes: dark, light" in said.err
    assert said.out.count("2 tasks pack ") == len(splits)
    for task in tasks:
        task()
    pack(name, "raw", "whole/set", "--workers=2", *options)
    for split in splits:
        whole = Path("whole/set") / split
        names = sorted(path.name for path in whole.iterdir())
        assert len(names) > 6
        for file in names:
            assert (Path("set") / split / file).read_bytes() == (whole / file).read_bytes()


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ("folder set", "imagefolder"),
        ("imagefolder folder set", "imagefolder"),
        ("./nowhere set", "imagefolder"),
        ("nowhere set", "imagefolder"),
        ("stl10 set", "stl10"),
        ("own:Own set", "own:Own"),
        ("own:Own raw set", "own:Own"),
        ("imagefoldr folder set", "imagefoldr"),
    ],
)
def test_what_is_packed_on_a_cluster_may_be_named_first(
    words: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    paths = list(map(Path, words.split()))
    assert packing.kind_first(paths) == (kind, paths[1:] if words.startswith(kind) else paths)
