"""Folders of parquet files, as Hugging Face publishes sets of images, as a source.

Names are those that its library `datasets` writes: `train-00000-of-00294.parquet`, in earlier versions with a hash of
16 digits before the dot; and those of its converter, `train/0000.parquet`.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property
from glob import glob, has_magic
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from braceexpand import braceexpand
from numpy.typing import NDArray

from pipelines.errors import SourceError
from pipelines.folders import Found
from pipelines.limits import limits
from pipelines.manifest import CLASSES
from pipelines.published.columns import Columns
from pipelines.sources import Files, Item, Source
from pipelines.speech import in_line, telling

TRAIN, VAL, TEST = ("train",), ("validation", "valid", "val", "dev"), ("test",)  # the test set if there is no other
NUMBERED = re.compile(r"([a-z]+)(?:-(\d{5,9})-of-(\d{5,9})(?:-[0-9a-f]{16})?)?\.parquet")
NO_LABEL = "has no label (it is null, or below 0), as in a test set whose labels are hidden"
NO_BYTES = "holds no image, at most the path of one: fetch the data set with its images"
USAGE = "parquet takes FOLDER DST, or 'TRAIN_PATTERN' 'VAL_PATTERN' DST, with the patterns in quotes"


class _Place(NamedTuple):
    """Where a reader is: number of the row group, its next row there, and the images from that on."""

    group: int
    row: int
    images: Iterator[Any]


class Parquet(Source):
    """The training or the validation set in a folder of parquet files, or in those that two patterns name.

    A row group is read from its beginning, one image at a time: a worker holds a page of the file, and an image.

    Attributes:
        image, label: columns; empty: the one of this name, or else the only one with images, or with classes.
    """

    image = ""
    label = ""

    def __init__(self, root: Path, *more: Path, train: bool) -> None:
        if len(more) > 1:
            raise SourceError(f"{len(more) + 1} paths are given before DST, beginning with {root}: {USAGE}")
        both = [_matching(path) for path in (root, *more)] if more else [_of(root, TRAIN), _of(root, VAL, TEST)]
        self.paths, self.others = both if train else both[::-1]
        with telling(f"reading the footers of {len(self.paths)} parquet files"):
            opened = [self._columns(path) for path in (*self.paths, self.others[0])]
        self.names = opened[0].names
        if differs := [one.path for one in opened if one.names != self.names]:
            raise SourceError(
                f"{differs[0]} has other classes than {self.paths[0]}: labels would not mean the same, so give the "
                f"files of one data set"
            )
        groups = [(k, number, rows) for k, one in enumerate(opened[:-1]) for number, rows in enumerate(one.groups)]
        self._groups = [(file, number) for file, number, _ in groups]
        self._firsts = [0, *accumulate(rows for *_, rows in groups)]

    def _columns(self, path: Path) -> Columns:
        return Columns(path, self.image, self.label)

    @cached_property
    def _labels(self) -> list[NDArray[np.int64]]:
        """The labels of each file."""
        with telling(f"reading the labels in {len(self.paths)} parquet files"):
            return [self._columns(path).labels() for path in self.paths]

    @cached_property
    def classes(self) -> list[str]:
        if self.names is not None:
            return self.names
        labels = [*self._labels, *(self._columns(path).labels() for path in self.others)]
        top = max((int(some.max()) for some in labels if len(some)), default=-1)
        if top >= CLASSES:
            raise SourceError(f"a file beside {self.paths[0]} has the label {top}: labels must be below {CLASSES}")
        return [str(k) for k in range(top + 1)]

    @cached_property
    def files(self) -> Files:
        found = [(path.name, path.stat()) for path in self.paths]
        return Files(
            [Found(name, status.st_size, status.st_mtime_ns) for name, status in found],
            lambda: (self.classes, self.items),
        )

    @cached_property
    def _listed(self) -> tuple[list[Item], list[dict[str, str]]]:
        """The items, and the rows that did not become one."""
        items, rejected, first = list[Item](), list[dict[str, str]](), 0
        for path, labels in zip(self.paths, self._labels, strict=True):
            if len(labels) and (top := int(labels.max())) >= len(self.classes):
                raise SourceError(f"{path} has the label {top}, and names only {len(self.classes)} classes, from 0 on")
            for row, label in enumerate(labels.tolist()):
                name = f"{path.name}:{row}"
                if label < 0:
                    rejected.append({"file": name, "reason": NO_LABEL})
                else:
                    items.append(Item(name, first + row, label))
            first += len(labels)
        if rejected and not items:
            raise SourceError(f"each image of {self.paths[0].parent} {NO_LABEL}: give a split with labels")
        return items, rejected

    @property
    def items(self) -> list[Item]:
        return self._listed[0]

    @property
    def rejected(self) -> list[dict[str, str]]:
        return self._listed[1]

    @cached_property
    def groups(self) -> list[int]:
        rows = [item.reference for item in self.items]
        numbers: list[int] = (np.searchsorted(self._firsts, rows, "right") - 1).tolist()
        return numbers

    @cached_property
    def _place(self) -> _Place:
        return _Place(-1, 0, iter(()))

    def load(self, reference: int) -> bytes:
        """The bytes of the image in this row of the set. Raises ValueError if there are none."""
        k = bisect_right(self._firsts, reference) - 1
        row, (file, number) = reference - self._firsts[k], self._groups[k]
        if self._place.group != k or self._place.row > row:
            self._place = _Place(k, 0, self._columns(self.paths[file]).images(number))
        _, at, images = self._place
        for _ in range(row - at):
            next(images, None)
        image = next(images, None)
        self._place = _Place(k, row + 1, images)
        if image is None:
            raise ValueError(NO_BYTES)
        limits().check_bytes(len(image.as_buffer()))
        data: bytes = image.as_py()
        return data


def _split(path: Path) -> tuple[str, str, str]:
    """Split of a file, its number and the count of all, as far as its name, or its folder's, says them."""
    match = NUMBERED.fullmatch(path.name)
    if match and match[1] in (*TRAIN, *VAL, *TEST):
        return match[1], match[2] or "", match[3] or ""
    return path.parent.name, "", ""


def _of(folder: Path, *splits: Sequence[str]) -> list[Path]:
    """The files of the first split that there is below a folder. Raises SourceError if it is not whole, or not one."""
    if not folder.is_dir():
        raise SourceError(f"{folder} is not a folder: {USAGE}")
    there = [path for path in sorted(folder.rglob("*.parquet")) if not _is_hidden(path.relative_to(folder))]
    known = {path: _split(path) for path in there}
    for names in splits:
        if found := [path for path in there if known[path][0] in names]:
            break
    else:
        shown = f"it has {in_line(there[0].name)}, ..." if there else "it has no *.parquet"
        raise SourceError(
            f"there is no {splits[0][0]}-00000-of-...parquet in {folder} ({shown}): {USAGE}, or patterns, for "
            f"files of other names"
        )
    if len(folders := sorted({path.parent for path in found})) > 1:
        raise SourceError(
            f"{folder} has {known[found[0]][0]} files in {folders[0]} and in {folders[1]}: give one of these folders"
        )
    _refuse_incomplete(found, [known[path] for path in found])
    return found


def _refuse_incomplete(found: list[Path], known: list[tuple[str, str, str]]) -> None:
    """Raises SourceError if the files of a split, by their numbers, are not all of one set."""
    counts = {count for *_, count in known}
    if counts == {""}:
        return
    numbers = {number for _, number, _ in known}
    if len(counts) > 1 or len(numbers) < len(found):
        raise SourceError(
            f"{found[0].parent} holds files of more than one version of a set, such as {found[0].name} and "
            f"{found[-1].name}: keep those of one"
        )
    (count,) = counts
    if missing := [k for k in range(min(int(count), len(found) + 1)) if f"{k:0{len(count)}}" not in numbers]:
        raise SourceError(
            f"{found[0].parent} has {len(found)} of {int(count)} files: fetch the others too, such as "
            f"{known[0][0]}-{missing[0]:0{len(count)}}-of-{count}"
        )


def _is_hidden(path: Path) -> bool:
    return any(name.startswith(".") for name in path.parts)


def _matching(pattern: Path) -> list[Path]:
    """The files of a pattern with *, ? and {a,b} or {000..293}. Raises SourceError if one is missing."""
    try:
        names = list(braceexpand(str(pattern)))
    except ValueError as error:
        raise SourceError(f"{pattern} is not a pattern ({error}): {USAGE}") from error
    found = []
    for name in names:
        found += sorted(glob(name)) if has_magic(name) else [name] if Path(name).is_file() else []
        if not found or (not has_magic(name) and found[-1] != name):
            raise SourceError(f"there is no file {name}: {USAGE}")
    return [Path(name) for name in dict.fromkeys(found)]
