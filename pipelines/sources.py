"""Sources of images: folders and torchvision data sets, as (name, reference, label) and a way to load each."""

from __future__ import annotations

import gzip
import inspect
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field, fields
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image, ImageOps

from pipelines.errors import UserError, first_line

Image.MAX_IMAGE_PIXELS = 1 << 28  # Pillow refuses twice this; ImageNet's largest has 4 % of it
ORIENTATION = 0x0112  # the EXIF tag; 1: upright
JPEG_LONGEST = 65500  # pixels per side that libjpeg writes


class SourceError(UserError):
    """A source that cannot be packed; the message names it and the remedy."""


class Item(NamedTuple):
    """One image of a source: a readable name, what `load` needs, and its class number."""

    name: str
    reference: Any
    label: int


class Source(Protocol):
    """A source of `pack`. Sources are pickled to worker processes, so they hold little."""

    @property
    def classes(self) -> list[str]: ...
    @property
    def items(self) -> list[Item]: ...
    @property
    def rejected(self) -> list[dict[str, str]]: ...
    def load(self, reference: Any) -> bytes | Image.Image: ...


class _Light:
    """Pickles as its fields alone: what was read from the disk is read again when it is needed."""

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]


@dataclass
class ImageFolder(_Light):
    """`root/<class>/**/<image>`: classes are the sub-folders, sorted."""

    root: Path

    def __post_init__(self) -> None:
        if not self.root.is_dir():
            raise SourceError(f"{self.root} is not a folder: give the one whose sub-folders are the classes")

    @cached_property
    def classes(self) -> list[str]:
        return sorted(entry.name for entry in os.scandir(self.root) if entry.is_dir() and entry.name[0] != ".")

    @cached_property
    def items(self) -> list[Item]:
        items = []
        for label, name in enumerate(self.classes):
            for folder, folders, files in os.walk(self.root / name):
                folders.sort()
                paths = (os.path.relpath(os.path.join(folder, file), self.root) for file in sorted(files))
                items += [Item(path, path, label) for path in paths]
        return items

    @property
    def rejected(self) -> list[dict[str, str]]:
        loose = sorted(entry.name for entry in os.scandir(self.root) if not entry.is_dir())
        return [{"file": name, "reason": "no label: it lies outside the class folders"} for name in loose]

    def load(self, reference: str) -> bytes:
        return (self.root / reference).read_bytes()


@dataclass
class Torchvision(_Light):
    """A labelled image data set of `torchvision.datasets`, by class name: `FashionMNIST`, `STL10`, `CIFAR10`, ...

    Args:
        name: the class in `torchvision.datasets`, spelled in any case, with or without dashes.
        train: the training split, otherwise the test split.
        root: where torchvision keeps (and downloads) its files.
    """

    name: str
    train: bool
    root: Path
    rejected: list[dict[str, str]] = field(default_factory=list)

    @cached_property
    def data(self) -> Any:
        from torchvision import datasets

        known = {name.lower(): name for name in datasets.__all__}
        plain = re.sub(r"[^a-z0-9]", "", self.name.lower())
        if plain not in known:
            raise SourceError(f"torchvision has no data set {self.name!r}; it has {', '.join(sorted(known.values()))}")
        factory = getattr(datasets, known[plain])
        options = inspect.signature(factory).parameters
        if "train" in options:
            split: dict[str, Any] = {"train": self.train}
        elif "split" in options:
            split = {"split": "train" if self.train else "test"}
        else:
            raise SourceError(f"{known[plain]} has no train and test split: save it as folders and pack those")
        if known[plain] == "FashionMNIST":
            _fashion_mnist_from_debian(self.root)
        download: dict[str, Any] = {"download": True} if "download" in options else {}
        try:
            return factory(str(self.root), **split, **download)
        except (RuntimeError, OSError, ValueError, ImportError) as error:
            remedy = f"fetch it where there is a network and put it under {self.root}"
            if known[plain] == "FashionMNIST":
                remedy += ", or install Debian's package dataset-fashion-mnist"
            raise SourceError(f"{known[plain]} cannot be had ({first_line(error)}): {remedy}") from error

    @cached_property
    def labels(self) -> list[int]:
        known = [getattr(self.data, name) for name in ("targets", "labels", "_labels") if hasattr(self.data, name)]
        return [int(k) for k in (known[0] if known else (label for _, label in self.data))]

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


def upright_rgb(image: Image.Image) -> Image.Image:
    """Any image as 8-bit RGB with the EXIF rotation applied; 16-bit levels are scaled, alpha is dropped."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8))
    return image.convert("RGB")


def to_jpeg(data: bytes | Image.Image, shorter_side: int, quality: int, keep_small: bool = False) -> bytes:
    """The bytes to store: an upright RGB JPEG whose shorter side is `shorter_side` (0: as it is).

    An upright RGB JPEG that has this size already keeps its bytes. Raises OSError, ValueError or Pillow's errors if
    `data` is not a whole image, or one that no JPEG can hold.

    Args:
        keep_small: smaller images keep their size.
    """

    def wanted(size: tuple[int, int]) -> tuple[int, int]:
        least = min(size)
        if not shorter_side or (keep_small and least < shorter_side):
            return size
        return shorter_side * size[0] // least, shorter_side * size[1] // least

    if isinstance(data, Image.Image):
        image = data
    else:
        image = Image.open(BytesIO(data))
        image.load()
        fits = wanted(image.size) == image.size
        if image.format == "JPEG" and image.mode == "RGB" and image.getexif().get(ORIENTATION, 1) == 1 and fits:
            return data
    image = upright_rgb(image)
    if (size := wanted(image.size)) != image.size:
        if max(size) > JPEG_LONGEST:  # before memory is taken for it
            raise ValueError(
                f"would have {size[0]}x{size[1]} pixels, and a JPEG has at most {JPEG_LONGEST} a side: leave it out or "
                f"pack with --keep-small"
            )
        image = image.resize(size, Image.Resampling.BILINEAR)
    out = BytesIO()
    image.save(out, "JPEG", quality=quality)
    return out.getvalue()


def _fashion_mnist_from_debian(root: Path) -> None:
    """Put the files of Debian's dataset-fashion-mnist where torchvision looks.

    They are taken from the installed package, or fetched with apt into a folder of our own, which needs no root. Does
    nothing if neither is possible.
    """
    raw = root / "FashionMNIST" / "raw"
    if raw.exists():
        return
    with tempfile.TemporaryDirectory() as scratch:
        files = Path("usr/share/datasets/fashion-mnist")
        source = Path("/") / files
        if not source.exists() and shutil.which("apt-get") and shutil.which("dpkg-deb"):
            lists = Path(scratch) / "lists"
            lists.mkdir()
            own = ["-o", f"Dir::State::Lists={lists}", "-o", f"Dir::Cache={scratch}"]
            commands = (
                ["apt-get", *own, "update"],
                ["apt-get", *own, "-o", "APT::Sandbox::User=root", "download", "dataset-fashion-mnist"],
                ["sh", "-c", "dpkg-deb -x dataset-fashion-mnist_*.deb ."],
            )
            done = all(subprocess.run(c, cwd=scratch, capture_output=True).returncode == 0 for c in commands)
            source = Path(scratch) / files if done else source
        if not source.exists():
            return
        half = root / ".raw"  # renamed when it is whole: torchvision would not repair half of it
        half.mkdir(parents=True, exist_ok=True)
        for packed in source.glob("*.gz"):
            (half / packed.stem).write_bytes(gzip.decompress(packed.read_bytes()))
        raw.parent.mkdir(exist_ok=True)
        half.rename(raw)
