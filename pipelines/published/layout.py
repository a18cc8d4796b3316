"""Which of the paths given holds which part of ImageNet: told by their content, so that the order does not matter."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from pipelines.errors import SourceError, first_line, of_the_system
from pipelines.files import regular
from pipelines.published.devkit import GZIP, LARGEST, META, WNID
from pipelines.published.held import INNER, first_file
from pipelines.published.kaggle import MAPPING, SOLUTION
from pipelines.rows import HEADER
from pipelines.speech import in_line

TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12"
IMAGES = (".jpeg", ".jpg")
VALIDATION, TEST = "ILSVRC2012_val_", "ILSVRC2012_test_"  # begin the names of images
DATA = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "CLS-LOC", ".")  # where train and val may lie in a folder
ABOVE = 3  # levels from CLS-LOC to Kaggle's tables
TRAIN, VAL, LABELS, WORDS = "training images", "validation images", "labels", "words"
TAKES = (
    "pack imagenet takes TRAIN.tar VAL.tar DEVKIT.tar.gz, folders in place of the tars, or one folder that holds "
    "these or Kaggle's ILSVRC, and DST"
)


class Parts(NamedTuple):
    """Where ImageNet's parts are.

    Attributes:
        train, val: tars or folders of images.
        labels: a devkit, or a table; None if the validation images lie in class folders, without words.
        words: Kaggle's mapping.
    """

    train: Path
    val: Path
    labels: Path | None
    words: Path | None


def parts_of(paths: Sequence[Path]) -> Parts:
    """What these paths hold. Raises SourceError if a part is missing."""
    named, found = dict[str, Path](), dict[str, Path]()
    for path in paths:
        if path.is_dir() and (inside := _inside(path)):
            found = inside | found
            continue
        what = _what(path)
        if what == TRAIN and TRAIN in named and path.is_dir():  # a second folder of class folders
            what = VAL
        if what in named:
            raise SourceError(f"{named[what]} and {path} both hold {what}: {TAKES}")
        named[what] = path
    if LABELS in named:  # Kaggle's words stay with its own labels
        found.pop(WORDS, None)
    found |= named
    for what, example in ((TRAIN, TRAIN_TAR), (VAL, VAL_TAR)):
        if what not in found:
            where = ", ".join(map(str, paths))
            raise SourceError(f"there are no {what} in {where}, such as {example}: {TAKES}")
    labels, words = found.get(LABELS), found.get(WORDS)
    if labels is None and not (found[VAL].is_dir() and _class_folder(found[VAL])):
        raise SourceError(
            f"{found[VAL]} has no labels: add --devkit {DEVKIT}.tar.gz, or Kaggle's {SOLUTION}, or any csv of images "
            f"and WordNet ids"
        )
    if words is None and labels is not None and (labels.parent / MAPPING).is_file():
        words = labels.parent / MAPPING
    return Parts(found[TRAIN], found[VAL], labels, words)


def _inside(folder: Path) -> dict[str, Path]:
    """What lies in a folder that holds several parts; nothing if it does not."""
    data = next((folder / name for name in DATA if (folder / name / "train").is_dir()), folder)
    choices = {
        TRAIN: [folder / TRAIN_TAR, data / "train"],
        VAL: [folder / VAL_TAR, data / "val"],
        LABELS: [folder / f"{DEVKIT}{ending}" for ending in (".tar.gz", ".tar", "")],
    }
    # Names of Kaggle's own, so that nothing else can be meant, wherever they lie.
    above = [folder, *folder.absolute().parents[:ABOVE]]
    choices[LABELS] += [place / SOLUTION for place in above]
    choices[WORDS] = [place / MAPPING for place in above]
    found = {what: next((path for path in paths if path.exists()), None) for what, paths in choices.items()}
    if not (found[TRAIN] and found[VAL]) and not (folder / TRAIN_TAR).exists() and not (folder / VAL_TAR).exists():
        return {}
    return {what: path for what, path in found.items() if path}


def _what(path: Path) -> str:
    """What a path holds. Raises SourceError if `pack` cannot use it."""
    if path.is_dir():
        what = _of_folder(path)
    elif not path.exists():
        where = "" if path.is_absolute() else f" in {Path.cwd()}"
        raise SourceError(f"{path} does not exist{where}: {TAKES}")
    else:
        what = _of_file(path)
    if what == TEST:
        raise SourceError(f"{path} holds the test images, which have no labels: give {VAL_TAR}")
    return what


def _of_folder(path: Path) -> str:
    if (path / META).exists():
        return LABELS
    group = _class_folder(path)
    name = next((name for name in _files(path / group) if group or name.lower().endswith(IMAGES)), "")
    if not name and not group:
        raise SourceError(
            f"{path} holds neither folders named by WordNet ids, such as n01440764, nor images: {TAKES}; folders of "
            f"other classes are packed by `pack imagefolder`"
        )
    return _of_image(name) if not group or name.startswith(VALIDATION) else TRAIN


def _of_file(path: Path) -> str:
    head = _head(path)
    if head.startswith(b"PK\3\4"):
        raise SourceError(f"{path} is a zip: unpack it, and name the folder that has ILSVRC in it")
    if head.startswith(GZIP):
        if path.stat().st_size > LARGEST:
            raise SourceError(f"{path} is compressed, and too large for a devkit: unpack it by gunzip")
        return LABELS
    if is_table(path):
        return WORDS if path.name == MAPPING else LABELS
    try:
        name = first_file(path)
    except Exception as error:  # tarfile raises anything on garbage
        if of_the_system(error):
            raise
        raise SourceError(f"{path} is neither a tar nor a table ({first_line(error)}): {TAKES}") from error
    if name.endswith(INNER):
        return TRAIN
    if WNID.match(name):
        raise SourceError(
            f"{path} holds training images, such as {in_line(name)}, and no tar for each class: unpack it, and name "
            f"the folder of its class folders"
        )
    return _of_image(name) if name.lower().endswith(IMAGES) else LABELS


def is_table(path: Path) -> bool:
    """Whether it is a file of text, and so no devkit: a tar has zeros behind each name."""
    return path.is_file() and not (head := _head(path)).startswith(GZIP) and b"\0" not in head


def _head(path: Path) -> bytes:
    with open(path, "rb", opener=regular) as file:
        return file.read(HEADER)


def _of_image(name: str) -> str:
    return TEST if name.startswith(TEST) else VAL


def _class_folder(path: Path) -> str:
    """The name of a class folder in it, whichever comes first; "" if there is none."""
    with os.scandir(path) as entries:
        return next((entry.name for entry in entries if WNID.fullmatch(entry.name) and entry.is_dir()), "")


def _files(path: Path) -> Iterator[str]:
    with os.scandir(path) as entries:
        yield from (entry.name for entry in entries if not entry.name.startswith(".") and entry.is_file())


def shown(parts: Parts) -> str:
    """Where the labels come from, for a line."""
    return in_line(f"labels by {parts.labels.name}" if parts.labels else "labels by their folders")
