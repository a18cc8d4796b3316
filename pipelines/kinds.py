"""Kinds of sources by name: an entry of SOURCES, a data set of torchvision, or `module:name` of somebody's own."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from pipelines import resolve
from pipelines.errors import SourceError
from pipelines.sources import SOURCES, Source
from pipelines.torchvision_sets import Torchvision, data_sets, has_photographs, is_data_set, no_data_set
from pipelines.unpacked import pack_command
from pipelines.words import nearest

IMAGEFOLDER, IMAGENET, RAW, TRAIN = "imagefolder", "imagenet", "raw", "train"
DEVKIT_HELP = "for imagenet: ILSVRC2012_devkit_t12.tar.gz or a csv of labels; the same as naming it before DST"
SIDE = 256  # shorter side of images in a set, as in the paper; those of torchvision that are no photographs keep theirs
SIDE_HELP = f"scale images to it; 0: keep them (default: {SIDE}, or 0 for small ones of torchvision)"
REMEDY = (
    "a source is made of its folders, and of train=True or False if it has two splits, and its class is one of "
    "pipelines.sources.Source (docs/data.md)"
)


class SetPlan(NamedTuple):
    """A set to be packed.

    Attributes:
        paths: what its source is made of.
        train: the split of a source that has two; None for one that has not.
        directory: the set.
    """

    paths: Sequence[Path]
    train: bool | None
    directory: Path


class Kind(NamedTuple):
    """A kind of source.

    Attributes:
        key: the command or setting that names it, for messages.
        make: as for `Source`.
        shorter_side: of its images in a set, in pixels; 0: as they are.
    """

    key: str
    name: str
    make: Callable[..., Source]
    shorter_side: int

    @property
    def has_splits(self) -> bool:
        """Whether one source makes the training and the validation set."""
        return TRAIN in resolve.argument_names(self.make)

    def source(self, planned: SetPlan) -> Source:
        """The source of a set. Raises SourceError, NameProblem, or OSError."""
        split = {} if planned.train is None else {TRAIN: planned.train}
        return resolve.make(self.key, self.name, self.make, planned.paths, split, kind=Source, remedy=REMEDY)

    def refuse_paths(self, paths: Sequence[Path]) -> None:
        """Raises SourceError for words after the kind, of which the last is the set to make, that cannot be right."""
        if self.name == IMAGEFOLDER and len(paths) != 2:
            example = f", `{pack_command(paths[0])}`" if len(paths) == 1 else ""
            raise SourceError(
                f"{self.key} {self.name} takes SRC and DST: name the folder of the classes, and the set to "
                f"make{example}"
            )
        if self.name == IMAGENET and (len(paths) < 2 or paths[-1].is_file()):
            last = f", and not {paths[-1]}, which is a file" if paths and paths[-1].is_file() else ""
            raise SourceError(
                f"{self.key} {self.name} takes TRAIN.tar VAL.tar DEVKIT.tar.gz, or folders in place of the tars, or "
                f"one folder that holds these or Kaggle's ILSVRC, and then DST: name the set to make last{last}"
            )
        if of_torchvision(self.name) and len(paths) != 1:
            meant = f": did you mean `{pack_command(*paths)}`?" if len(paths) == 2 else ""
            raise SourceError(f"{self.key} {self.name} takes DST alone, it fetches the images itself{meant}")
        if not paths:
            raise SourceError(f"{self.key} {self.name} takes DST at least: name the set to make")

    def planned(self, paths: Sequence[Path], directory: Path) -> list[SetPlan]:
        """The sets to be packed into a directory, from these paths; without any, from `raw` beside the sets if the
        source takes one."""
        if not self.has_splits:
            return [SetPlan(paths, None, directory)]
        return _splits(paths or [directory / RAW] * self._takes_path(), directory / TRAIN, directory / "val")

    def of_raw(self, raw: Path | None, train: Path, val: Path) -> list[SetPlan]:
        """The training and the validation set from a folder, by default `raw` beside them. Raises SourceError."""
        folder = raw or train.parent / RAW
        if self.has_splits:
            return _splits([folder] if raw or self._takes_path() else [], train, val)
        if not folder.is_dir():
            raise SourceError(
                f"there is no folder {folder}: {self.name} reads the folders train and val in it, name another by "
                f"data.raw"
            )
        return [SetPlan([folder / TRAIN], None, train), SetPlan([folder / "val"], None, val)]

    def _takes_path(self) -> bool:
        """Whether it cannot be made without a path."""
        known = inspect.signature(self.make).parameters.values()
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        return any(one.kind in positional and one.default is one.empty and one.name != TRAIN for one in known)


def own(name: str) -> str:
    """The entry of SOURCES that a name means, in any spelling, as for data sets of torchvision; "" if there is none."""
    plain = re.sub("[-_]", "", name).lower()
    return plain if plain in SOURCES else ""


def of_torchvision(name: str) -> bool:
    """Whether a name, if it is any kind's, is that of a data set of torchvision."""
    return not own(name) and not resolve.is_code(name)


def with_devkit(name: str, paths: Sequence[Path], devkit: Path | None) -> list[Path]:
    """The words after a kind, with that of --devkit in its place before DST. Raises SourceError."""
    if devkit is None:
        return [*paths]
    if own(name) != IMAGENET:
        raise SourceError(f"--devkit is for {IMAGENET}, and {name} has none: leave it out")
    return [*paths[:-1], devkit, *paths[-1:]]


def meant(name: str) -> str:
    """The name of SOURCES or of torchvision's data sets that is meant by a misspelt one; empty if there is none."""
    return name if is_data_set(name) else nearest(name, [*SOURCES, *data_sets()])


def kind(key: str, name: str) -> Kind:
    """The kind of this name. Raises NameProblem or SourceError.

    Args:
        key: the command or setting that names it, for messages.
    """
    name = own(name) or name
    if not of_torchvision(name):
        return Kind(key, name, resolve.resolve(key, name, SOURCES), SIDE)
    if not is_data_set(name):
        if like := meant(name):
            raise SourceError(f"{key} {name} is unknown: did you mean {like}?")
        raise SourceError(f"{no_data_set(name)}; others are {', '.join(SOURCES)}, and module:name of your own")
    return Kind(key, name, partial(Torchvision, name), SIDE if has_photographs(name) else 0)


def _splits(paths: Sequence[Path], train: Path, val: Path) -> list[SetPlan]:
    return [SetPlan(paths, True, train), SetPlan(paths, False, val)]
