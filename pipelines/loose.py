"""Images in files of their own: what `pack` would store of each is held in memory, and shown as a set's images are."""

from __future__ import annotations

import glob
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache, partial
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.errors import SourceError, first_line, of_the_system
from pipelines.folders import PASSED_OVER, content, is_litter, top
from pipelines.headers import headed
from pipelines.limits import apply, limits
from pipelines.manifest import Manifest, ShardError
from pipelines.order import Ints
from pipelines.pillow import allowed, guarded, opened, read_image
from pipelines.rows import SAMPLE
from pipelines.shards import ShardSet
from pipelines.sources import to_jpeg

BYTES = 512 << 20  # of images held at a time, about
LARGEST = 65535  # shorter side, in pixels
UNREAD = (".heic", ".heif", ".jxl")  # of images that Pillow cannot read by itself
QUALITY = 90  # of what is encoded anew, if the set does not say


class LooseFile(NamedTuple):
    """A file that may be an image.

    Attributes:
        listed: it was found in a folder, where others than images may lie; otherwise its name was given.
        why: the reason why it cannot be read, if that is known already.
    """

    path: str
    listed: bool = False
    why: str = ""


class HeldImage(NamedTuple):
    """What `pack` would store of a file; or nothing.

    Attributes:
        jpeg: empty if there is no image.
        size: width and height.
        why: the reason why there is none.
        meant: whether the file is to be an image. One that was only found in a folder, and has neither the content nor
            the name of one, is not.
    """

    file: LooseFile
    jpeg: bytes = b""
    size: tuple[int, int] = (0, 0)
    why: str = ""
    meant: bool = True


def loose_files(typed: str) -> Iterator[LooseFile]:
    """The files that an argument means: one file; all below a folder, in the order of their names; or what matches a
    pattern, folders among that too. Links are followed. Nothing is read but folders."""
    path = os.path.expanduser(typed)
    if os.path.isdir(path):
        yield from _below(path)
    elif os.path.lexists(path):
        yield LooseFile(path)
    elif glob.has_magic(path):
        found, told, real = sorted(_matches(path)), set[tuple[str, str]](), lru_cache(os.path.realpath)
        for match in found:
            for file in _below(match) if os.path.isdir(match) else [LooseFile(match)]:
                folder, name = os.path.split(file.path)
                where = real(folder), name  # a folder may match, and a file in it, too
                if where not in told:
                    told.add(where)
                    yield file
        if not found:
            yield LooseFile(path, why="no file matches it")
    else:
        yield LooseFile(path, why="there is no such file")


def _matches(pattern: str) -> Iterator[str]:
    """What matches a pattern. `**` means folders at any depth, without links, which may lead in circles, and without
    hidden ones."""
    parts = Path(pattern).parts
    if "**" not in parts:
        yield from glob.iglob(pattern)
        return
    first = parts.index("**")
    root, rest = os.path.join("", *parts[:first]), os.path.join(*parts[first:])
    for folder in glob.iglob(root) if root else [""]:
        for match in Path(folder).glob(rest):
            if not any(map(is_litter, match.relative_to(folder).parts)):
                yield str(match)


def _below(root: str) -> Iterator[LooseFile]:
    waiting = [top(Path(root))]
    while waiting:
        folder = waiting.pop()
        try:
            here = content(folder)
        except SourceError as error:
            yield LooseFile(os.fsdecode(folder.path), why=_reason(error.__cause__ or error))
            continue
        named = [(file.name, "") for file in here.files]
        named += [(line["file"], line["reason"]) for line in here.rejected]
        for name, why in named:
            inside = name.encode(errors="surrogateescape")
            yield LooseFile(os.fsdecode(os.path.join(os.fsencode(root), inside)), listed=True, why=why)
        waiting += reversed(here.folders)


def packed_as(manifest: Manifest, place: str) -> tuple[int, int, bool]:
    """What `to_jpeg` was given for the images of a set: shorter side, quality, and whether small ones keep their size.
    Images of a set of other tools are as they came. Raises ShardError."""
    side, quality, keep = (
        manifest.stored.get(name, usual)
        for name, usual in (("shorter_side", 0), ("quality", QUALITY), ("keep_small", True))
    )
    if not (type(side) is int and 0 <= side <= LARGEST and type(quality) is int and 1 <= quality <= 95):
        raise ShardError(f"{place} says that its images were stored in a way that there is none of: pack it anew")
    return side, quality, bool(keep)


def held_images(files: Iterable[LooseFile], how: tuple[int, int, bool], threads: int) -> Iterator[HeldImage]:
    """Reads these files ahead, with several threads, and makes of each what `pack` stores; in order. `how`: as for
    `to_jpeg`."""
    begun = deque[Future[HeldImage]]()
    # The threads share what `guarded` sets, and so must begin and end inside of it.
    with guarded(), ThreadPoolExecutor(threads, "pack", apply, (limits(),)) as pool:
        try:
            for file in files:
                begun.append(pool.submit(_held, file, how))
                if len(begun) > 2 * threads:
                    yield begun.popleft().result()
            while begun:
                yield begun.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _held(file: LooseFile, how: tuple[int, int, bool]) -> HeldImage:
    meant = not file.listed or (_named_as_image(file.path) and not file.why.startswith(PASSED_OVER))
    if file.why:
        return HeldImage(file, why=file.why, meant=meant)
    try:
        data = read_image(file.path)
        with guarded():
            opened(data)
    except Exception as error:  # Pillow raises anything on garbage
        return HeldImage(file, why=_reason(error), meant=meant)
    try:
        jpeg = to_jpeg(data, *how).jpeg
        with guarded():
            return HeldImage(file, jpeg, headed(jpeg).size)
    except Exception as error:
        return HeldImage(file, why=_reason(error))


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and of_the_system(error):
        return str(error.strerror)
    return first_line(error)


def _named_as_image(path: str) -> bool:
    ending = os.path.splitext(path)[1].lower()
    return ending in UNREAD or Image.registered_extensions().get(ending, "") in allowed()


def in_pieces(images: Iterable[HeldImage], most: int) -> Iterator[list[HeldImage]]:
    """The images, so many at a time that they fit into memory, and `most` at most."""
    piece, size = list[HeldImage](), 0
    for image in images:
        piece.append(image)
        size += len(image.jpeg)
        if len(piece) == most or size > BYTES:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece


class HeldSet(ShardSet):
    """Images in memory in place of a set on a disk, without labels.

    Behind them stands one more, which decoders can take: it is shown in place of one that they cannot.

    Args:
        manifest: names the classes.
    """

    def __init__(self, manifest: Manifest, images: Sequence[HeldImage] = ()) -> None:
        self.manifest, self.place = manifest, "these images"
        self._names = [image.file.path for image in images]
        self._jpegs = [np.frombuffer(image.jpeg, np.uint8) for image in images]
        sizes = [image.size for image in images]
        sizes += sizes[:1] or [(1, 1)]
        blank = BytesIO()
        Image.new("RGB", sizes[-1]).save(blank, "JPEG")
        self._jpegs.append(np.frombuffer(blank.getvalue(), np.uint8))
        self._rows = np.zeros(len(sizes), SAMPLE)
        self._rows["width"], self._rows["height"] = np.array(sizes).T
        self.sides = min(map(min, sizes)), max(map(min, sizes))
        self.quarantined = np.empty(0, np.int64)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def turned(self) -> bool:
        return False

    def rows(self, samples: Ints) -> NDArray[Any]:
        return self._rows[samples]

    def reads(self, samples: Ints) -> Iterator[Callable[[], NDArray[np.uint8]]]:
        return (partial(self._jpegs.__getitem__, sample) for sample in samples.tolist())

    def cached(self, samples: Ints) -> list[NDArray[np.uint8] | None]:
        return [self._jpegs[sample] for sample in samples.tolist()]

    def shards_of(self, samples: Ints) -> Ints:
        return np.zeros_like(samples)

    def keep(self, shards: Ints) -> None:
        """There is nothing to close."""

    def name(self, sample: int) -> str:
        return self._names[sample]
