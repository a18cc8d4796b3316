"""Sources of images, each as (name, reference, label) that can be loaded; image folders; the JPEG stored per image."""

from __future__ import annotations

import errno
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image

from pipelines.errors import SourceError, UserError
from pipelines.folders import NO_FILE, Content, Found, content, contents, is_utf8, top, unreadable
from pipelines.limits import limits
from pipelines.pillow import ORIENTATION, guarded, opened, read_image, upright_rgb
from pipelines.resolve import failed

SOURCES = {  # besides those of torchvision, by their own names
    "imagefolder": "pipelines.sources:ImageFolder",
    "imagenet": "pipelines.published.imagenet:imagenet",
    "parquet": "pipelines.published.parquet:Parquet",
}
JPEG_LONGEST = 65500  # most pixels per side that libjpeg writes
DRAFT = 50_000_000  # pixels above which a JPEG is reduced while it is decoded
SPLITS = {"train", "training", "val", "valid", "validate", "validation", "dev", "test", "testing", "trainval"}


class Item(NamedTuple):
    """One image of a source: readable name, argument of `load`, class number."""

    name: str
    reference: Any
    label: int


class Files(NamedTuple):
    """Files of a source, which a user may change.

    Attributes:
        found: the files that hold the items.
        before: returns classes and items as earlier versions of this program listed them.
    """

    found: list[Found]
    before: Callable[[], tuple[list[str], list[Item]]]


class Source:
    """Base class of sources: a subclass has `classes`, `items` and `load`. `make(*paths)` makes a source for one set;
    a `make` with the parameter `train` makes one of two splits.

    It is pickled to worker processes, without the values of cached properties, which are computed there if needed.

    Attributes:
        classes: names; their positions are the labels.
        items: the images, the same in any process and in the same order.
        files: the user's files, if they may change.
        rejected: what became no item, each as {"file": name, "reason": why}.
        groups: per item the number of the group in which it is stored, if no item can be read without those before it
            in its group. Groups are then shuffled, and their items packed in the order of `items`.
        stands: a reference means the same image in any process, so workers need not list the items to compare them.
        image_folders: folders that it reads, in which no set is made.
    """

    stands = False

    if TYPE_CHECKING:  # in a subclass these may be properties, too

        @property
        def classes(self) -> Sequence[str]: ...
        @property
        def items(self) -> Sequence[Item]: ...
        @property
        def files(self) -> Files | None: ...
        @property
        def rejected(self) -> Sequence[dict[str, str]]: ...
        @property
        def groups(self) -> Sequence[int] | None: ...
        @property
        def image_folders(self) -> Sequence[ImageFolder]: ...
    else:
        files, rejected, groups, image_folders = None, (), None, ()

    def load(self, reference: Any) -> bytes | Image.Image:
        """Bytes of the image file, or the image. Whatever it raises is the reason for which the image is rejected, but
        a failing file system, or SourceError, ends the pack."""
        raise SourceError(f"{called(self)} has no load(reference): define it, to return the bytes of an image file")

    def __getstate__(self) -> dict[str, Any]:
        kind = type(self)
        return {k: v for k, v in vars(self).items() if not isinstance(getattr(kind, k, None), cached_property)}


def called(source: Source) -> str:
    """The class of a source, as `module:name`."""
    return f"{type(source).__module__}:{type(source).__qualname__}"


def inventory(source: Source) -> tuple[list[str], list[Item]]:
    """Classes and items of a source. Raises SourceError or NameProblem if they are not as they should be."""
    name = called(source)
    try:
        classes, items = list[Any](source.classes), list[Any](source.items)
    except (UserError, OSError):
        raise
    except Exception as error:
        raise failed("source", name, error) from error
    if odd := [one for one in classes if not isinstance(one, str)]:
        raise SourceError(f"{name}.classes holds {odd[0]!r:.80}: it takes a name per class, as text")
    if len(set(classes)) < len(classes):
        twice = Counter(classes).most_common(1)[0][0]
        raise SourceError(f"{name}.classes names {twice} more than once: each label has a name of its own")
    for item in items:
        if not isinstance(item, Item) or not isinstance(item.name, str):
            raise SourceError(f"{name}.items holds {item!r:.80}: it takes Item(name as text, reference, label)")
        label: Any = item.label  # possibly numpy's
        if not isinstance(label, Integral) or not 0 <= int(label) < len(classes):
            raise SourceError(
                f"{name} gives {item.name} the label {label!r:.80}: it takes the number of a class, and there are "
                f"{len(classes)}, numbered from 0"
            )
    return classes, items


@dataclass
class ImageFolder(Source):
    """`root/<class>/**/<image>`: classes are the sorted sub-folders; one without an image is a class too."""

    root: Path
    stands = True  # names, whose order does not matter; and to list a folder may take minutes

    def __post_init__(self) -> None:
        if not self.root.is_dir():
            raise SourceError(f"{self.root} is not a folder: give the one whose sub-folders are the classes")

    @property
    def image_folders(self) -> Sequence[ImageFolder]:
        return (self,)

    @cached_property
    def top(self) -> Content:
        """What lies in the root itself."""
        return content(top(self.root))

    @cached_property
    def _below(self) -> list[list[Content]]:
        """Contents of all folders of each class."""
        return [list(contents(folder)) for _, folder in zip(self.classes, self.top.folders, strict=True)]

    @cached_property
    def classes(self) -> list[str]:
        names = [folder.name for folder in self.top.folders]
        for raw in (name.encode(errors="surrogateescape") for name in names):
            if not is_utf8(raw):
                raise SourceError(f"the class folder {raw!r} in {self.root} has a name that is not UTF-8: rename it")
        return names

    def refuse_splits(self) -> None:
        """Raises SourceError if the classes are named like splits: then the root is one level too high."""
        names = self.classes
        if names and all(looks_like_split(name) for name in names):
            each = " and ".join(str(self.root / name) for name in names[:2])
            raise SourceError(
                f"the folders of {self.root}, {', '.join(names)}, look like splits and not like classes: pack {each} "
                f"each by itself, or rename them if they are classes"
            )

    @property
    def keys(self) -> set[tuple[int, int]]:
        """Device and inode of every folder below the root, links followed."""
        folders = [*self.top.folders, *(folder for below in self._below for one in below for folder in one.folders)]
        return {folder.key for folder in folders}

    @cached_property
    def items(self) -> list[Item]:
        items = []
        for label, below in enumerate(self._below):
            items += [Item(file.name, file.name, label) for inside in below for file in inside.files]
        return items

    @cached_property
    def files(self) -> Files:
        found = [file for below in self._below for inside in below for file in inside.files]
        return Files(found, self._before)

    @cached_property
    def rejected(self) -> list[dict[str, str]]:
        reason = "no label: it lies outside the class folders"
        loose = [{"file": file.name, "reason": reason} for file in self.top.files]
        return (
            self.top.rejected + loose + [line for below in self._below for inside in below for line in inside.rejected]
        )

    def _before(self) -> tuple[list[str], list[Item]]:
        """Classes and items as earlier versions listed them: no links followed, nothing skipped."""
        classes = sorted(entry.name for entry in os.scandir(self.root) if entry.is_dir() and entry.name[0] != ".")
        items = []
        for label, name in enumerate(classes):
            for folder, folders, files in os.walk(self.root / name):
                folders.sort()
                paths = (os.path.relpath(os.path.join(folder, file), self.root) for file in sorted(files))
                items += [Item(path, path, label) for path in paths]
        return classes, items

    def load(self, reference: str) -> bytes:
        return read_image(os.path.join(os.fsencode(self.root), reference.encode(errors="surrogateescape")))


def looks_like_split(name: str) -> bool:
    """True for names of splits: `train`, and also `train2017`, `seg_test`, `training_set`."""
    return any(word in SPLITS for word in re.findall("[a-z]+", name.lower()))


class Stored(NamedTuple):
    """An image as it is stored: a JPEG; whether it was smaller before; whether these are its file's bytes."""

    jpeg: bytes
    enlarged: bool
    unchanged: bool


@guarded()
def to_jpeg(data: bytes | Image.Image, shorter_side: int, quality: int, keep_small: bool = False) -> Stored:
    """What to store: an upright RGB JPEG with shorter side `shorter_side` (0: unchanged).

    An upright RGB JPEG that already has this size keeps its bytes. One of more than `DRAFT` pixels that is to become
    smaller is first reduced by libjpeg, up to 8 times, which takes less memory. Raises OSError, ValueError or Pillow's
    errors if `data` is not a whole image, or one that no JPEG can hold or that exceeds the limits.

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
        image = opened(data)
        fits = wanted(image.size) == image.size
        if image.width * image.height > DRAFT and not fits:
            image.draft(None, wanted(image.size))
        image.load()
        if image.format == "JPEG" and image.mode == "RGB" and image.getexif().get(ORIENTATION, 1) == 1 and fits:
            return Stored(data, enlarged=False, unchanged=True)
    image = upright_rgb(image)
    size = wanted(image.size)
    if max(size) > JPEG_LONGEST:  # before its memory is allocated
        kept = min(image.size) < shorter_side and max(image.size) <= JPEG_LONGEST
        remedy = "leave it out or pack with --keep-small" if kept else "leave it out or cut it"
        raise ValueError(
            f"would have {size[0]}x{size[1]} pixels, and a JPEG has at most {JPEG_LONGEST} a side: {remedy}"
        )
    limits().check_pixels(size[0] * size[1])
    enlarged = min(size) > min(image.size)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BILINEAR)
    out = BytesIO()
    image.save(out, "JPEG", quality=quality)
    return Stored(out.getvalue(), enlarged, unchanged=False)


@guarded()
def jpeg_of(source: Source, item: Item, shorter_side: int, quality: int, keep_small: bool) -> Stored:
    """What `to_jpeg` makes of an item. Raises SourceError if a file exists but cannot be read: that may be temporary
    and says nothing about the image. Raises anything that decoders raise on garbage."""
    try:
        data = source.load(item.reference)
    except OSError as error:
        if error.errno and (error.errno == errno.ENOENT or error.errno not in NO_FILE):  # it was there when listed
            raise unreadable(os.fsencode(error.filename or item.name), "file", error) from error
        raise
    if not isinstance(data, bytes | Image.Image):
        raise SourceError(
            f"{called(source)}.load returned an object of type {type(data).__qualname__} for {item.name}: it returns "
            f"the bytes of an image file, or a PIL image"
        )
    return to_jpeg(data, shorter_side, quality, keep_small)
