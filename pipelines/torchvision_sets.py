"""The labelled image data sets of torchvision, as sources."""

from __future__ import annotations

import gzip
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from pipelines.errors import SourceError, first_line
from pipelines.files import folder, read_file, write_atomically
from pipelines.sources import Item, Source

DEBIAN = "usr/share/datasets/fashion-mnist"  # where its package dataset-fashion-mnist has the files
INSTALLED = Path("/")


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


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


@dataclass
class Torchvision(Source):
    """A labelled image data set of `torchvision.datasets`, by class name: `FashionMNIST`, `STL10`, `CIFAR10`, ...

    Args:
        name: the class in `torchvision.datasets`, spelled in any case, with or without dashes.
        root: folder to which torchvision downloads its files.
        train: the training split, otherwise the test split.
    """

    name: str
    root: Path
    train: bool

    @cached_property
    def data(self) -> Any:
        from torchvision import datasets

        known = {name.lower(): name for name in data_sets()}
        plain = _plain(self.name)
        if plain not in known:
            raise SourceError(no_data_set(self.name))
        name = known[plain]
        factory = getattr(datasets, name)
        options = inspect.signature(factory).parameters
        if "split" not in options and "train" not in options:
            raise SourceError(f"{name} has no train and test split: save it as folders and pack those")
        if name == "FashionMNIST":
            _fashion_mnist_from_debian(self.root)
        download: dict[str, Any] = {"download": True} if "download" in options else {}
        try:
            if "train" in options:
                return factory(str(self.root), train=self.train, **download)
            return self._split(lambda split: factory(str(self.root), split=split, **download))
        except SourceError as error:
            raise SourceError(f"{name} {error}: save it as folders and pack those") from error
        except (RuntimeError, OSError, ValueError, ImportError) as error:
            remedy = f"fetch it where there is a network and put it under {self.root}"
            if name == "FashionMNIST":
                remedy += ", or install Debian's package dataset-fashion-mnist"
            raise SourceError(f"{name} is unavailable ({first_line(error)}): {remedy}") from error

    def _split(self, make: Callable[[str], Any]) -> Any:
        """The data set of the first split that it has of ours. Raises SourceError, naming its own, if it has none."""
        *others, last = ("train", "trainval") if self.train else ("test", "val")
        for split in (*others, last):
            try:
                return make(split)
            except ValueError as error:
                own = re.search(r"Valid values are \{?(.*?)\}?\.?$", first_line(error))  # torchvision's verify_str_arg
                if not (own and f"'{split}'" not in own[1]):
                    raise
                refused = own[1]
        raise SourceError(f"has the splits {refused} and neither {others[0]} nor {last}")

    @cached_property
    def labels(self) -> list[int]:
        known = [getattr(self.data, name) for name in ("targets", "labels", "_labels") if hasattr(self.data, name)]
        try:
            return [int(k) for k in (known[0] if known else (label for _, label in self.data))]
        except (TypeError, ValueError) as error:
            raise SourceError(
                f"{self.name} has no class number for each image: save it as folders and pack those"
            ) from error

    @cached_property
    def classes(self) -> list[str]:
        numbers = range(max(self.labels) + 1)  # SVHN has no names
        return [str(name) for name in getattr(self.data, "classes", numbers)]

    @cached_property
    def items(self) -> list[Item]:
        return [Item(self.classes[k], i, k) for i, k in enumerate(self.labels)]

    def load(self, reference: int) -> Image.Image:
        image: Image.Image = self.data[reference][0]
        return image


def _fashion_mnist_from_debian(root: Path) -> None:
    """Puts the files of Debian's dataset-fashion-mnist where torchvision looks, if the package is installed or
    unpacked under `root` (`dpkg-deb -x`, as the Makefile does)."""
    raw = root / "FashionMNIST" / "raw"
    source = next((path for path in (INSTALLED / DEBIAN, root / DEBIAN) if path.exists()), None)
    if raw.exists() or source is None:
        return
    half = root / ".raw"  # renamed when complete: torchvision would not repair a half
    folder(half)
    for packed in source.glob("*.gz"):
        write_atomically(half / packed.stem, gzip.decompress(read_file(packed)), durable=False)
    folder(raw.parent)
    half.rename(raw)
