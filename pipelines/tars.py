"""Samples of a tar, grouped as every WebDataset tool does."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pipelines.manifest import ShardError
from pipelines.rows import HEADER

Members = dict[str, tarfile.TarInfo]  # members of a sample by extension

COMPANION = "AppleDouble companion of a file (._name), which a Mac writes"
HIDDEN = "its name begins with a dot"
NO_EXTENSION = "has no extension"
LINK = "is a link: write the tar with --dereference --hard-dereference"
NO_FILE = "is not a regular file"
MIXED_UP = "shares its name with others that do not form whole samples, one after the other"


def tar_samples(path: Path, left: Callable[[str, str], object] = lambda *_: None) -> Iterator[tuple[str, Members]]:
    """Yields (key, {extension: member}) per sample of a tar.

    Members are grouped as in WebDataset: neighbours whose names agree up to the first dot of the file name. If a name
    repeats, it starts another sample of the same key, provided that has the same extensions; webdataset's own reader
    refuses such a tar. Like that reader, this one ignores names that begin with a dot.

    `left` is called with the name of each member, folders excepted, that is not part of a sample, and the reason.
    Raises ShardError if the tar is truncated, damaged or compressed.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            key, members = "", list[tuple[str, tarfile.TarInfo]]()
            for member in tar:
                folder, _, base = member.name.rpartition("/")
                stem, _, extension = base.partition(".")
                if reason := _no_part(member, base, extension):
                    left(member.name, reason)
                if reason or member.isdir():
                    continue
                if (name := f"{folder}/{stem}" if folder else stem) != key:
                    yield from _samples(key, members, left)
                    key, members = name, []
                members.append((extension.lower(), member))
            yield from _samples(key, members, left)
            with open(path, "rb") as file:
                file.seek(tar.offset)
                if file.read(HEADER) != bytes(HEADER):  # tarfile silently takes a damaged header for the end
                    raise tarfile.ReadError(f"it breaks off at byte {tar.offset}")
    except tarfile.TarError as error:
        raise ShardError(f"{path} is not a whole, uncompressed tar ({error}): copy or make it anew") from error


def passed_over(directory: Path, tars: Sequence[Path]) -> str:
    """Up to three names of files that look like part of a foreign set but are none of its tars, and how many more."""
    others = set(directory.glob("*")) - set(tars)
    kinds = re.compile(r"[^.].*\.(tar(\.\w+)?|tgz|tbz2?|txz)", re.IGNORECASE)
    named = (file.name for file in others if kinds.fullmatch(file.name))
    found = sorted([*named, *(str(tar.relative_to(directory)) for tar in directory.glob("*/*.tar"))])
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")


def _no_part(member: tarfile.TarInfo, base: str, extension: str) -> str:
    """Reason why a member is not part of a sample; empty if it is one, or a folder."""
    if member.isdir():
        return ""
    if base.startswith("."):
        return COMPANION if base.startswith("._") else HIDDEN
    if not member.isreg():
        return LINK if member.issym() or member.islnk() else NO_FILE
    return "" if extension else NO_EXTENSION


def _samples(
    key: str, members: list[tuple[str, tarfile.TarInfo]], left: Callable[[str, str], object]
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
