"""Folders of images as they lie on a disk: links followed, litter passed over, and nothing left out without a word."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pipelines.errors import SourceError

# Folders and files that systems and programs leave among images; and whatever is hidden.
LITTER = {
    "__macosx",
    "lost+found",
    "@eadir",
    "#recycle",
    "$recycle.bin",
    "system volume information",
    "thumbs.db",
    "desktop.ini",
}
PASSED_OVER = "passed over: "  # how the reason of such a one begins
# What is wrong with a name, and stays so; any other error of a file system may be gone at the next try.
NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EISDIR, errno.ENAMETOOLONG)


class Folder(NamedTuple):
    """A folder to look into.

    Attributes:
        path: as the system knows it.
        name: below the root, in any locale the same; bytes that are not UTF-8 stand as surrogates.
        key: device and inode.
        above: those of it and of all folders on the way to it.
    """

    path: bytes
    name: str
    key: tuple[int, int]
    above: frozenset[tuple[int, int]]


class Found(NamedTuple):
    """A file: its name below the root, as of `Folder`, its size in bytes, and when it was changed, in ns."""

    name: str
    size: int
    changed: int


class Content(NamedTuple):
    """What lies in a folder, each sorted by name; `rejected` as in `Source`."""

    files: list[Found]
    folders: list[Folder]
    rejected: list[dict[str, str]]


def is_litter(name: str) -> bool:
    """Whether a name is none of an image or a class: `.ipynb_checkpoints`, `._0.jpg`, `@eaDir`, ..."""
    return name.startswith(".") or name.lower() in LITTER


def is_utf8(name: bytes) -> bool:
    """Whether a name can stand in a manifest, which is read everywhere."""
    try:
        name.decode()
    except UnicodeDecodeError:
        return False
    return True


def top(root: Path) -> Folder:
    """The folder that everything else is named below."""
    real = root.resolve()
    above = [_key(os.stat(folder)) for folder in (real, *real.parents)]
    return Folder(os.fsencode(root), "", above[0], frozenset(above))


def content(folder: Folder) -> Content:
    """Look into a folder. Raises SourceError if that cannot be done: what is not seen would be missed by nobody."""
    found = Content([], [], [])
    for name, entry in _entries(folder):
        inside = f"{folder.name}/{name}" if folder.name else name
        status, reason = (None, PASSED_OVER + "known as no image") if is_litter(name) else _status(entry)
        if not status:
            found.rejected.append({"file": inside, "reason": reason})
        elif not stat.S_ISDIR(status.st_mode):
            found.files.append(Found(inside, status.st_size, status.st_mtime_ns))
        elif (key := _key(status)) in folder.above:
            reason = "a link back to a folder that it lies in: not followed"
            found.rejected.append({"file": inside, "reason": reason})
        else:
            found.folders.append(Folder(os.path.join(folder.path, entry.name), inside, key, folder.above | {key}))
    return found


def contents(folder: Folder) -> Iterator[Content]:
    """Of a folder and all below it, each with its files before those of its folders. Raises SourceError."""
    waiting = [folder]
    while waiting:  # however deep it goes
        here = content(waiting.pop())
        yield here
        waiting += reversed(here.folders)


def unreadable(path: bytes, kind: str, error: OSError) -> SourceError:
    """What to raise where a file system refuses to show something that is there."""
    name = path.decode("utf-8", "backslashreplace")
    return SourceError(
        f"the {kind} {name} cannot be read ({error.strerror}): see to that and repeat the command, or move it away"
    )


def _key(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _entries(folder: Folder) -> list[tuple[str, os.DirEntry[bytes]]]:
    try:
        with os.scandir(folder.path) as entries:
            named = [(entry.name.decode("utf-8", "surrogateescape"), entry) for entry in entries]
    except OSError as error:
        raise unreadable(folder.path, "folder", error) from error
    return sorted(named, key=lambda pair: pair[0])


def _status(entry: os.DirEntry[bytes]) -> tuple[os.stat_result | None, str]:
    """Of what a name leads to; or None, and why it is neither file nor folder."""
    try:
        status = entry.stat()
    except OSError as error:
        if error.errno not in NO_FILE:
            raise unreadable(entry.path, "file", error) from error
        return None, f"{error.strerror}{': a link that leads nowhere' if entry.is_symlink() else ''}"
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        return None, "neither a file nor a folder"  # to read a pipe would wait for ever
    return status, ""
