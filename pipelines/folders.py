"""Image folders on disk: links are followed, litter is skipped, and whatever is left out is reported."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pipelines.errors import SourceError

# Folders and files that systems and programs leave among images, besides hidden ones.
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
PASSED_OVER = "passed over: "  # prefix of the reason for litter
# Permanent errors of a name; any other file system error may be gone at the next try.
NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EISDIR, errno.ENAMETOOLONG)


class Folder(NamedTuple):
    """A folder to look into.

    Attributes:
        path: its path, in the system's bytes.
        name: path relative to the root, the same in any locale; bytes that are not UTF-8 are surrogates.
        key: device and inode.
        above: keys of this folder and of all folders above it.
    """

    path: bytes
    name: str
    key: tuple[int, int]
    above: frozenset[tuple[int, int]]


class Found(NamedTuple):
    """A file: name relative to the root as in `Folder`, size in bytes, modification time in ns."""

    name: str
    size: int
    changed: int


class Content(NamedTuple):
    """Content of a folder, each list sorted by name; `rejected` as in `Source`."""

    files: list[Found]
    folders: list[Folder]
    rejected: list[dict[str, str]]


def is_litter(name: str) -> bool:
    """True for a name that is neither an image nor a class: `.ipynb_checkpoints`, `._0.jpg`, `@eaDir`, ..."""
    return name.startswith(".") or name.lower() in LITTER


def is_utf8(name: bytes) -> bool:
    """True for a name that may go into a manifest, which is read everywhere."""
    try:
        name.decode()
    except UnicodeDecodeError:
        return False
    return True


def top(root: Path) -> Folder:
    """Root folder, which all names are relative to."""
    real = root.resolve()
    above = [_key(os.stat(folder)) for folder in (real, *real.parents)]
    return Folder(os.fsencode(root), "", above[0], frozenset(above))


def content(folder: Folder) -> Content:
    """Content of a folder. Raises SourceError if it cannot be read: nobody would miss what was not listed."""
    found = Content([], [], [])
    for name, entry in _entries(folder):
        inside = f"{folder.name}/{name}" if folder.name else name
        status, reason = (None, PASSED_OVER + "not an image") if is_litter(name) else _status(entry)
        if not status:
            found.rejected.append({"file": inside, "reason": reason})
        elif not stat.S_ISDIR(status.st_mode):
            found.files.append(Found(inside, status.st_size, status.st_mtime_ns))
        elif (key := _key(status)) in folder.above:
            reason = "a link to a folder above it: not followed"
            found.rejected.append({"file": inside, "reason": reason})
        else:
            found.folders.append(Folder(os.path.join(folder.path, entry.name), inside, key, folder.above | {key}))
    return found


def contents(folder: Folder) -> Iterator[Content]:
    """Contents of a folder and of all folders below it, parents first. Raises SourceError."""
    waiting = [folder]
    while waiting:  # no recursion: any depth
        here = content(waiting.pop())
        yield here
        waiting += reversed(here.folders)


def unreadable(path: bytes, kind: str, error: OSError) -> SourceError:
    """The error to raise if something exists but the file system cannot read it."""
    name = path.decode("utf-8", "backslashreplace")
    return SourceError(
        f"the {kind} {name} cannot be read ({error.strerror}): fix that and repeat the command, or move it away"
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
    """Status of what a name leads to; or None, and why it is neither a file nor a folder."""
    try:
        status = entry.stat()
    except OSError as error:
        if error.errno not in NO_FILE:
            raise unreadable(entry.path, "file", error) from error
        return None, f"{error.strerror}{': a link that leads nowhere' if entry.is_symlink() else ''}"
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        return None, "neither a file nor a folder"  # reading a pipe would block for ever
    return status, ""
