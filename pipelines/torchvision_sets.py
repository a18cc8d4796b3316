"""The labelled image data sets of torchvision, as sources."""

from __future__ import annotations

import errno
import gzip
import inspect
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from pipelines.errors import SourceError, first_line
from pipelines.files import folder, read_file, write_atomically
from pipelines.pillow import read_image
from pipelines.sources import Item, Source
from pipelines.speech import in_line, say
from pipelines.torchvision_files import complete

DEBIAN = "usr/share/datasets/fashion-mnist"  # where its package dataset-fashion-mnist has the files
INSTALLED = Path("/")
# Sets of image files, whose bytes are packed as those in a folder are; others keep pixels in files of their own.
PHOTOGRAPHS = {"Flowers102", "Food101", "Imagenette"}
# Splits that make the training set, where it is not one. Results on the flowers are of the 6,149 test images after
# training on all 2,040 others (Kornblith et al., arXiv 1805.08974, table 1).
TOGETHER = {"Flowers102": ("train", "val")}
OURS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}  # errors of this machine, not of a server


def data_sets() -> list[str]:
    """Names of torchvision's data sets."""
    from torchvision import datasets

    return sorted(datasets.__all__)


def is_data_set(name: str) -> bool:
    """Whether torchvision has a data set of this name, spelled in any case, with or without dashes."""
    return _plain(name) in map(str.lower, data_sets())


def no_data_set(name: str) -> str:
    """The sentence on a name of none."""
    return f"torchvision has no data set {name!r}; it has {', '.join(data_sets())}"


def has_photographs(name: str) -> bool:
    """Whether the images of this data set are photographs of any size."""
    return _plain(name) in map(str.lower, PHOTOGRAPHS)


def prefetch(name: str, root: str) -> int:
    """Puts the files of a data set where `pack` looks for them, before `make` tries another way. Returns an exit code;
    what failed is said in one line."""
    try:
        _ = Torchvision(name, Path(root), True).pieces
    except SourceError as error:
        say(in_line(str(error).split("): fetch ")[0] + ")"))
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


@dataclass
class Torchvision(Source):
    """A labelled image data set of `torchvision.datasets`, by class name: `FashionMNIST`, `STL10`, `CIFAR10`, ...

    Whoever asks the training split for its items learns whether the other one is there, too, with the same classes.

    Args:
        name: the class in `torchvision.datasets`, spelled in any case, with or without dashes.
        root: folder to which the files are downloaded.
        train: the training split, otherwise the one for validation.
        paired: the other split has been looked at.
    """

    name: str
    root: Path
    train: bool
    paired: bool = field(default=False, init=False, repr=False)

    @cached_property
    def _factory(self) -> Any:
        from torchvision import datasets

        known = {name.lower(): name for name in data_sets()}
        plain = _plain(self.name)
        if plain not in known:
            raise SourceError(no_data_set(self.name))
        factory = getattr(datasets, known[plain])
        if factory is datasets.STL10:  # which would compare the sum of 2.8 GB of unlabelled images each time
            return type("STL10", (factory,), {"train_list": factory.train_list[:2], "__module__": factory.__module__})
        return factory

    @cached_property
    def pieces(self) -> list[Any]:
        """torchvision's data sets of which this split is made, one after the other. Raises SourceError, or OSError of
        this machine."""
        factory = self._factory
        name, options = factory.__name__, inspect.signature(factory).parameters
        if "split" not in options and "train" not in options:
            raise SourceError(f"{name} has no train and test split: save it as folders and pack those")
        remedy = ""
        if name == "FashionMNIST":
            remedy = "; or install Debian's package dataset-fashion-mnist"
            _fashion_mnist_from_debian(self.root)
        split = [{"train": self.train}] if "train" in options else [{"split": one} for one in self._splits[self.train]]
        try:
            return [complete(name, self._maker(**one), factory.__module__, remedy) for one in split]
        except SourceError:
            raise
        except (RuntimeError, OSError, ValueError, ImportError) as error:
            if isinstance(error, OSError) and error.errno in OURS:
                raise
            raise SourceError(
                f"{name} is unavailable ({first_line(error)}): fetch it where there is a network and put it under "
                f"{self.root}{remedy}"
            ) from error

    def _maker(self, **options: Any) -> Callable[[bool], Any]:
        can_download = "download" in inspect.signature(self._factory).parameters

        def make(download: bool) -> Any:
            more = {"download": download} if can_download else {}
            return self._factory(str(self.root), **options, **more)

        return make

    @cached_property
    def _offered(self) -> list[str]:
        """The splits that torchvision has of it, by its own names."""
        try:
            self._maker(split="")(False)
        except ValueError as error:  # of its verify_str_arg
            return re.findall("'([^']+)'", first_line(error).partition("Valid values are")[2])
        return []

    @cached_property
    def _splits(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names of those for validation and of those for training. Raises SourceError, naming its own, if it lacks
        one."""
        name, offered, found = self._factory.__name__, self._offered, []
        for names in (("test", "val"), ("train", "trainval")):
            if not (ours := [one for one in names if one in offered]):
                own = ", ".join(map(repr, offered))
                raise SourceError(
                    f"{name} has the splits {own} and neither {' nor '.join(names)}: save it as folders and pack those"
                )
            found.append((ours[0],))
        return found[0], TOGETHER.get(name, found[1])

    def _look_at_the_other(self) -> None:
        """Raises SourceError unless the split for validation is there, with the classes of this one."""
        name, other = self._factory.__name__, Torchvision(self.name, self.root, train=False)
        unequal = ((a, b) for a, b in zip(other.classes, self.classes, strict=False) if a != b)  # one may lack the last
        for there, here in unequal:
            raise SourceError(
                f"{name} under {self.root} has other classes for validation ({in_line(there)}) than for training "
                f"({in_line(here)}): its files are damaged or mixed; remove them, and start again"
            )
        if "train" not in inspect.signature(self._factory).parameters and len(self._offered) > 2:
            val, train = (" and ".join(names) for names in self._splits)
            say(
                f"{name} has the splits {', '.join(self._offered)}: {train} ({len(self.labels):,} images) for "
                f"training, {val} ({len(other.labels):,}) for validation"
            )
        self.paired = True

    @cached_property
    def labels(self) -> list[int]:
        return [label for piece in self.pieces for label in self._labels_of(piece)]

    def _labels_of(self, piece: Any) -> list[int]:
        known = [getattr(piece, name) for name in ("targets", "labels", "_labels") if hasattr(piece, name)]
        try:
            return [int(k) for k in (known[0] if known else (pair[1] for pair in getattr(piece, "_samples", piece)))]
        except (TypeError, ValueError) as error:
            raise SourceError(
                f"{self.name} has no class number for each image: save it as folders and pack those"
            ) from error

    @cached_property
    def classes(self) -> list[str]:
        numbers = range(max(self.labels, default=-1) + 1)  # SVHN has no names
        names = getattr(self.pieces[0], "classes", numbers)
        return [str(name[0] if isinstance(name, tuple) else name) for name in names]  # Imagenette's have synonyms

    @cached_property
    def items(self) -> list[Item]:
        if self.train and not self.paired:
            self._look_at_the_other()
        names = [os.path.relpath(path, self.root) for path in self._paths] or [self.classes[k] for k in self.labels]
        return [Item(names[i], i, k) for i, k in enumerate(self.labels)]

    @cached_property
    def _paths(self) -> list[str]:
        """The image files, of a data set that consists of such."""
        if self._factory.__name__ not in PHOTOGRAPHS:
            return []
        return [str(path) for piece in self.pieces for path in _files_of(piece)]

    def load(self, reference: int) -> bytes | Image.Image:
        if self._paths:
            return read_image(os.fsencode(self._paths[reference]))
        image: Image.Image = self.pieces[0][reference][0]
        return image


def _files_of(piece: Any) -> list[Any]:
    return piece._image_files if hasattr(piece, "_image_files") else [path for path, _ in piece._samples]


def _fashion_mnist_from_debian(root: Path) -> None:
    """Puts the files of Debian's dataset-fashion-mnist where torchvision looks, if the package is installed or
    unpacked under `root` (`dpkg-deb -x`, as the Makefile does)."""
    raw = root / "FashionMNIST" / "raw"
    for source in (INSTALLED / DEBIAN, root / DEBIAN):
        for packed in source.glob("*.gz"):
            if not (raw / packed.stem).exists():
                folder(raw)
                write_atomically(raw / packed.stem, gzip.decompress(read_file(packed)), durable=False)
