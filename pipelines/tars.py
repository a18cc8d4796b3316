"""Samples of a tar, grouped as every WebDataset tool does."""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from pipelines.errors import first_line, of_the_system
from pipelines.files import regular
from pipelines.manifest import ShardError
from pipelines.rows import HEADER

PADDING = 1 << 20  # bytes behind the last member of a tar, at most; tar fills it up to a multiple of 10 kB
HEADERS = 256 << 10  # bytes of headers before one member: names and attributes of other tools take a few kB
DIGITS = re.compile(rb"\d{256}")
RECORDS = 1000  # of a tar's global PAX headers, which tarfile copies for each member

COMPANION = "AppleDouble companion of a file (._name), which a Mac writes"
HIDDEN = "its name begins with a dot"
NO_EXTENSION = "has no extension"
SPARSE = "is stored with holes: write the tar without --sparse"
LINK = "is a link: write the tar with --dereference --hard-dereference"
NO_FILE = "is not a regular file"
MIXED_UP = "shares its name with others that do not form whole samples, one after the other"


class Member(NamedTuple):
    """A member of a tar; `offset_data` is where its bytes begin."""

    name: str
    offset_data: int
    size: int


Members = dict[str, Member]  # members of a sample by extension


class _Headers:
    """A tar as tarfile reads it, which otherwise reads as much as a header claims to be long.

    Attributes:
        end: where it ends in its file.
        left: bytes that may be read before `next_member` is called again.
    """

    def __init__(self, file: BinaryIO, end: int) -> None:
        self.file, self.end, self.left = file, end, HEADERS
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        self.left -= size
        if size < 0 or self.left < 0:
            raise tarfile.ReadError(f"a member's header at byte {self.tell()} is longer than {HEADERS} bytes")
        data = self.file.read(max(0, min(size, self.end - self.tell())))
        if DIGITS.search(data):  # over which tarfile's patterns take the square of their number
            raise tarfile.ReadError(f"a member's header before byte {self.tell()} has a number without an end")
        return data


def tar_members(file: BinaryIO, start: int = 0, size: int | None = None) -> Iterator[tarfile.TarInfo]:
    """All members of a tar, in its order; none is kept. Their offsets are those in the file. Raises tarfile.TarError,
    and anything else on garbage.

    Args:
        start, size: the part of the file that is the tar, in bytes; None: to its end.
    """
    end = start + size if size is not None else file.seek(0, os.SEEK_END)
    headers = _Headers(file, end)
    file.seek(start)
    with tarfile.open(fileobj=headers, mode="r:") as tar:  # type: ignore[call-overload]
        while (member := tar.next()) is not None:
            tar.members.clear()
            whole = member.issparse() or not member.isreg() or member.offset_data + member.size <= end
            if not (whole and member.size >= 0 and member.offset < tar.offset <= end + HEADER):
                raise tarfile.ReadError(f"a member at byte {member.offset} claims {member.size} bytes")
            if len(tar.pax_headers) > RECORDS:
                raise tarfile.ReadError(f"it has more than {RECORDS} global PAX records")
            headers.left = HEADERS
            yield member
    file.seek(tar.offset)
    left = end - tar.offset
    # tarfile silently takes a damaged header for the end, and zeros, which a client that fetches pieces in any order
    # leaves for those that are missing.
    if left < HEADER or file.read(HEADER) != bytes(HEADER):
        raise tarfile.ReadError(f"it breaks off at byte {tar.offset}")
    if left > PADDING or any(file.read(left - HEADER)):
        raise tarfile.ReadError(f"zeros at byte {tar.offset}, with {left} bytes behind")


def tar_samples(path: Path, left: Callable[[str, str], object] = lambda *_: None) -> Iterator[tuple[str, Members]]:
    """Yields (key, {extension: member}) per sample of a tar.

    Members are grouped as in WebDataset: neighbours whose names agree up to the first dot of the file name. If a name
    repeats, it starts another sample of the same key, provided that has the same extensions; webdataset's own reader
    refuses such a tar. Like that reader, this one ignores names that begin with a dot.

    `left` is called with the name of each member, folders excepted, that is not part of a sample, and the reason.
    Raises ShardError if the tar is truncated, damaged or compressed.
    """
    try:
        with open(path, "rb", opener=regular) as file:
            key, members = "", list[tuple[str, Member]]()
            for member in tar_members(file):
                folder, _, base = member.name.rpartition("/")
                stem, _, extension = base.partition(".")
                if reason := no_file(member, base) or ("" if extension or member.isdir() else NO_EXTENSION):
                    left(member.name, reason)
                if reason or member.isdir():
                    continue
                if (name := f"{folder}/{stem}" if folder else stem) != key:
                    yield from _samples(key, members, left)
                    key, members = name, []
                members.append((extension.lower(), Member(member.name, member.offset_data, member.size)))
            yield from _samples(key, members, left)
    except Exception as error:  # tarfile raises anything on garbage
        if of_the_system(error):
            raise
        why = f"{path} is not a whole, uncompressed tar ({first_line(error)}): copy or make it anew"
        raise ShardError(why) from error


def passed_over(directory: Path, tars: Sequence[Path]) -> str:
    """Up to three names of files that look like part of a foreign set but are none of its tars, and how many more."""
    others = set(directory.glob("*")) - set(tars)
    kinds = re.compile(r"[^.].*\.(tar(\.\w+)?|tgz|tbz2?|txz)", re.IGNORECASE)
    named = (file.name for file in others if kinds.fullmatch(file.name))
    found = sorted([*named, *(str(tar.relative_to(directory)) for tar in directory.glob("*/*.tar"))])
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")


def no_file(member: tarfile.TarInfo, base: str) -> str:
    """Reason why a member, whose name ends in `base`, is no file to be packed; empty if it is one, or a folder."""
    if member.isdir():
        return ""
    if base.startswith("."):
        return COMPANION if base.startswith("._") else HIDDEN
    if member.issparse():
        return SPARSE
    if not member.isreg():
        return LINK if member.issym() or member.islnk() else NO_FILE
    return ""


def _samples(
    key: str, members: list[tuple[str, Member]], left: Callable[[str, str], object]
) -> Iterator[tuple[str, Members]]:
    """The samples made of neighbours of one key: one sample, unless an extension repeats."""
    samples: list[Members] = []
    for extension, member in members:
        if not samples or extension in samples[-1]:
            samples.append({})
        samples[-1][extension] = member
    if any(sample.keys() != samples[0].keys() for sample in samples):  # which label is whose?
        for _, member in members:
            left(member.name, MIXED_UP)
        return
    yield from ((key, sample) for sample in samples)
