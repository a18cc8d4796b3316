"""Images of ImageNet where they lie: in a tar of tars, a flat tar, class folders, or a flat folder."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from pipelines.errors import SourceError, first_line, of_the_system
from pipelines.files import HeldFile, regular
from pipelines.folders import PASSED_OVER, Found, is_litter
from pipelines.limits import limits
from pipelines.published.devkit import WNID
from pipelines.sources import ImageFolder
from pipelines.speech import bar
from pipelines.tars import Member, no_file, tar_members

INNER = ".tar"


class Image(NamedTuple):
    """An image: its file name, the name of the class folder or inner tar that it lies in, "" if it lies in none, and
    the argument of `load`."""

    name: str
    group: str
    reference: Any


@dataclass
class HeldInTar:
    """A tar that is read in place: of inner tars named by WordNet id, or of images.

    Attributes:
        rejected: as in `Source`, known once `images` is exhausted.
    """

    image_folders: ClassVar[Sequence[ImageFolder]] = ()
    path: Path

    def __post_init__(self) -> None:
        self.rejected = list[dict[str, str]]()

    @cached_property
    def _outer(self) -> list[Member]:
        with open(self.path, "rb", opener=regular) as file:
            return list(self._members(file, "", 0, None))

    @cached_property
    def groups(self) -> list[str]:
        """WordNet ids of the inner tars."""
        stems = (one.name.removesuffix(INNER) for one in self._outer if one.name.endswith(INNER))
        return sorted({stem for stem in stems if WNID.fullmatch(stem)})

    def images(self) -> Iterator[Image]:
        """Reads headers only. Raises SourceError."""
        if not self.groups:
            yield from (Image(one.name, "", (one.offset_data, one.size)) for one in self._outer)
            return
        with (
            open(self.path, "rb", opener=regular) as file,
            bar(len(self._outer), f"read headers of {self.path.name}", "tar", lines=True) as shown,
        ):
            for tar in self._outer:
                stem = tar.name.removesuffix(INNER)
                if stem in self.groups:
                    for one in self._members(file, f"{tar.name}/", tar.offset_data, tar.size):
                        yield Image(one.name, stem, (one.offset_data, one.size))
                else:
                    self.rejected.append({"file": tar.name, "reason": "not the tar of a class, such as n01440764.tar"})
                shown.update()

    def _members(self, file: Any, inside: str, start: int, size: int | None) -> Iterator[Member]:
        try:
            for member in tar_members(file, start, size):
                if member.isdir():
                    continue
                base = member.name.rpartition("/")[2]
                if reason := PASSED_OVER + "not an image" if is_litter(base) else no_file(member, base):
                    self.rejected.append({"file": f"{inside}{member.name}", "reason": reason})
                else:
                    yield Member(base, member.offset_data, member.size)
        except Exception as error:  # tarfile raises anything on garbage
            if isinstance(error, SourceError) or of_the_system(error):
                raise
            which = f"{inside.rstrip('/')} in {self.path}" if inside else str(self.path)
            raise SourceError(
                f"{which} is not a whole, uncompressed tar ({first_line(error)}): fetch {self.path.name} anew, or go "
                f"on with its download"
            ) from error

    def load(self, reference: tuple[int, int]) -> bytes:
        """The bytes of an image. Raises ValueError if there are too many, and SourceError if the tar has changed."""
        offset, size = reference
        limits().check_bytes(size)
        data = os.pread(self._file.fileno(), size, offset)
        if len(data) < size:
            raise SourceError(f"{self.path} is shorter than it was: restore it, and repeat the command")
        return data

    @cached_property
    def _file(self) -> HeldFile:
        return HeldFile(self.path, "rb", opener=regular)

    @property
    def found(self) -> list[Found]:
        """The tar itself, for `Files`."""
        status = self.path.stat()
        return [Found(self.path.name, status.st_size, status.st_mtime_ns)]


class HeldInFolder:
    """Files in class folders, or in one folder."""

    def __init__(self, path: Path) -> None:
        self.path, self._folder = path, ImageFolder(path)
        self.image_folders = [self._folder]

    @property
    def groups(self) -> list[str]:
        """WordNet ids of the class folders."""
        return [name for name in self._folder.classes if WNID.fullmatch(name)]

    def images(self) -> Iterator[Image]:
        """Raises SourceError."""
        for item in self._folder.items:
            group, _, inside = item.name.partition("/")
            yield Image(inside.rpartition("/")[2], group, item.name)
        for file in self._folder.top.files:
            yield Image(file.name, "", file.name)

    @property
    def rejected(self) -> list[dict[str, str]]:
        """As in `Source`."""
        loose = {file.name for file in self._folder.top.files}
        return [line for line in self._folder.rejected if line["file"] not in loose]

    @property
    def found(self) -> list[Found]:
        """For `Files`."""
        return [*self._folder.files.found, *self._folder.top.files]

    def load(self, reference: str) -> bytes:
        """The bytes of an image. Raises ValueError if there are too many, and OSError."""
        return self._folder.load(reference)


def held(path: Path) -> HeldInTar | HeldInFolder:
    """Raises SourceError."""
    return HeldInFolder(path) if path.is_dir() else HeldInTar(path)


def first_file(path: Path) -> str:
    """Name of the first file in a tar; "" if it has none. Raises what tarfile raises on garbage."""
    with open(path, "rb", opener=regular) as file:
        return next((one.name.rpartition("/")[2] for one in tar_members(file) if _is_file(one)), "")


def _is_file(member: tarfile.TarInfo) -> bool:
    return not member.isdir() and not is_litter(member.name.rpartition("/")[2])
